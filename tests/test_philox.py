"""The random numbers: bit-exact against NumPy, the published vectors and Triton; the right law; independent streams."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest

from vllm_bebop.kernels.philox import Stream, gumbel, philox_4x32, uniform

# kat_vectors of Random123 for philox4x32-10: counter words, key words, output words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numpy_philox(seed: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10 in uint32 and uint64 arithmetic, as the paper writes it. seed [N] int64, counters [4, N]."""
    key = [seed.astype(np.uint64).astype(np.uint32), (seed.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)]
    word = [c.astype(np.uint32) for c in counters]
    for _ in range(10):
        product_0 = np.uint64(0xD2511F53) * word[0].astype(np.uint64)
        product_1 = np.uint64(0xCD9E8D57) * word[2].astype(np.uint64)
        high_0, low_0 = (product_0 >> np.uint64(32)).astype(np.uint32), product_0.astype(np.uint32)
        high_1, low_1 = (product_1 >> np.uint64(32)).astype(np.uint32), product_1.astype(np.uint32)
        word = [high_1 ^ word[1] ^ key[0], low_1, high_0 ^ word[3] ^ key[1], low_0]
        key = [key[0] + np.uint32(0x9E3779B9), key[1] + np.uint32(0xBB67AE85)]
    return np.stack(word).astype(np.int64)


def random_inputs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] int64 seeds of both signs and [4, n] counters, extremes included."""
    rng = np.random.default_rng(0)
    seeds = rng.integers(-(2**63), 2**63 - 1, n)
    seeds[:4] = [0, -1, 2**63 - 1, -(2**63)]
    counters = rng.integers(0, 2**32, (4, n))
    counters[:, 4:8] = [[0], [2**32 - 1], [2**31], [2**31 - 1]]
    return seeds, counters


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    k0, k1 = (int(word, 16) for word in key.split())
    seed = np.array([k0 | k1 << 32], dtype=np.uint64).astype(np.int64)
    counters = [int(word, 16) for word in counter.split()]
    expected = [int(word, 16) for word in answer.split()]
    assert [int(word) for word in philox_4x32(torch.from_numpy(seed), *counters)] == expected
    assert numpy_philox(seed, np.array(counters)[:, None])[:, 0].tolist() == expected


def test_philox_equals_numpy() -> None:
    seeds, counters = random_inputs(10_000)
    ours = torch.stack(philox_4x32(torch.from_numpy(seeds), *torch.from_numpy(counters)))
    assert np.array_equal(ours.numpy(), numpy_philox(seeds, counters))


def test_philox_broadcasts() -> None:
    seeds = torch.arange(3)[:, None]
    words = philox_4x32(seeds, torch.arange(5), 7, 2, 0)[0]
    assert words.shape == (3, 5)
    assert words[2, 4] == philox_4x32(torch.tensor(2), 4, 7, 2, 0)[0]


TRITON_PROGRAM = """
import sys
import numpy as np
import torch
import triton
import triton.language as tl
from vllm_bebop.kernels.device import four_uniforms, uniform

@triton.jit
def draw(seed_ptr, counter_ptr, word_ptr, uniform_ptr, four_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    seed = tl.load(seed_ptr + i, mask=mask, other=0)
    c0 = tl.load(counter_ptr + i, mask=mask, other=0)
    c1 = tl.load(counter_ptr + n + i, mask=mask, other=0)
    c2 = tl.load(counter_ptr + 2 * n + i, mask=mask, other=0)
    c3 = tl.load(counter_ptr + 3 * n + i, mask=mask, other=0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(word_ptr + i, w0.to(tl.int64), mask=mask)
    tl.store(word_ptr + n + i, w1.to(tl.int64), mask=mask)
    tl.store(word_ptr + 2 * n + i, w2.to(tl.int64), mask=mask)
    tl.store(word_ptr + 3 * n + i, w3.to(tl.int64), mask=mask)
    tl.store(uniform_ptr + i, uniform(seed, c1, c2, c0, c3), mask=mask)
    four = four_uniforms(seed[None, :], c1[None, :], c2[None, :], c0[None, :], c3[None, :] // 4 * 4)
    tl.store(four_ptr + 4 * i[None, :, None] + tl.arange(0, 4), four, mask=mask[None, :, None])

data = np.load(sys.argv[1])
seeds = torch.from_numpy(data["seeds"])
counters = torch.from_numpy(data["counters"].astype(np.uint32).view(np.int32))
n = seeds.numel()
words, uniforms = torch.full((4, n), -1, dtype=torch.int64), torch.full((n,), float("nan"))
fours = torch.full((n, 4), float("nan"))
draw[(triton.cdiv(n, 256),)](seeds, counters, words, uniforms, fours, n, BLOCK=256)
np.savez(sys.argv[2], words=words.numpy(), uniforms=uniforms.numpy(), fours=fours.numpy())
"""


def test_philox_equals_triton(tmp_path) -> None:
    pytest.importorskip("triton")
    seeds, counters = random_inputs(2_000)
    counters[2] = Stream.THINNING_KEEP
    counters[3] //= 2  # attempts are not negative in int32
    np.savez(tmp_path / "in.npz", seeds=seeds, counters=counters)
    (tmp_path / "program.py").write_text(TRITON_PROGRAM)
    # Triton reads TRITON_INTERPRET while it is imported, hence a process of its own.
    subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path / "in.npz", tmp_path / "out.npz"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=True,
    )
    theirs = np.load(tmp_path / "out.npz")
    assert np.array_equal(theirs["words"], numpy_philox(seeds, counters))
    c0, c1, _, c3 = torch.from_numpy(counters)
    ours = uniform(torch.from_numpy(seeds), c1, Stream.THINNING_KEEP, c0, c3)
    assert np.array_equal(ours.numpy(), theirs["uniforms"])
    for k in range(4):
        ours = uniform(torch.from_numpy(seeds), c1, Stream.THINNING_KEEP, c0, c3 // 4 * 4 + k)
        assert np.array_equal(ours.numpy(), theirs["fours"][:, k])
        assert torch.equal(
            ours[:1],
            uniform(torch.from_numpy(seeds[:1]), c1[:1], Stream.THINNING_KEEP, c0[:1], int(c3[0] // 4 * 4 + k)),
        )


def test_uniform_is_open_and_exact(monkeypatch) -> None:
    words = torch.tensor([0, 511, 512, 2**31, 2**32 - 1])
    monkeypatch.setattr("vllm_bebop.kernels.philox.philox_4x32", lambda *_: (words,) * 4)
    u = uniform(words, words, Stream.ACCEPT)
    assert u.dtype == torch.float32
    assert u.double().tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 0.5 + 2.0**-24, 1 - 2.0**-24]
    noise = gumbel(words, words, Stream.ACCEPT)
    assert noise.isfinite().all() and noise.min() > -2.9 and noise.max() < 16.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_has_the_gumbel_law(dtype: torch.dtype) -> None:
    seeds, positions = torch.arange(64)[:, None, None], torch.arange(64)[:, None]
    noise = gumbel(seeds, positions, Stream.DRAFT_TOKEN, torch.arange(256), dtype=dtype)
    assert noise.dtype == dtype and noise.numel() == 2**20
    assert kstest(noise.flatten().double().numpy(), "gumbel_r").pvalue > 1e-4


def test_streams_are_uncorrelated() -> None:
    n = 2**14
    seeds = torch.arange(n) * 0x9E3779B9
    numbers = {stream.name: uniform(seeds, torch.tensor(5), stream) for stream in Stream}
    numbers["next position"] = uniform(seeds, torch.tensor(6), Stream.ACCEPT)
    numbers["next index"] = uniform(seeds, torch.tensor(5), Stream.ACCEPT, 1)
    numbers["next attempt"] = uniform(seeds, torch.tensor(5), Stream.ACCEPT, 0, 1)
    numbers["next seed"] = uniform(seeds + 1, torch.tensor(5), Stream.ACCEPT)
    correlation = np.corrcoef(np.stack([u.numpy() for u in numbers.values()]))
    pairs = np.array([correlation[i, j] for i, j in itertools.combinations(range(len(numbers)), 2)])
    assert np.abs(pairs).max() < 6 / np.sqrt(n)
    assert chi2.sf(n * np.sum(pairs**2), pairs.size) > 1e-4
