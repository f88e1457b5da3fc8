"""The reference sampler is lossless: proofs by enumeration, by a grid of uniforms and by statistics; edge cases.

Each statistical test also runs on samplers with a planted fault, which it must catch. Faults and scripted noise are
planted by replacing `uniform`, `gumbel`, `_draw` or `_sample_residual` in the module under test.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.statistics import assert_fault_is_caught, assert_law, assert_laws, g_test, independence_test
from vllm_bebop.kernels import philox, reference
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import Verification, sample_reference, verify_reference

NAN, INF = float("nan"), float("inf")
TARGET_STREAMS = (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)


def logits_of(probs) -> Tensor:
    return torch.as_tensor(probs, dtype=torch.float64).log()


def requests(batch: int, temperature: float = 1.0, first_seed: int = 0, position: int = 100) -> dict[str, Tensor]:
    """The per-request arguments that both functions share."""
    return {
        "temperature": torch.full((batch,), temperature),
        "seeds": torch.arange(first_seed, first_seed + batch),
        "positions": torch.full((batch,), position),
    }


def draft(draft_logits: Tensor, shared: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws [B, max_drafts] tokens from draft_logits [B, max_drafts, V], as a drafter does step by step."""
    steps = [
        sample_reference(
            draft_logits[:, i], shared["temperature"], shared["seeds"], shared["positions"] + i, dtype=dtype
        ).token_ids
        for i in range(draft_logits.shape[1])
    ]
    return torch.stack(steps, dim=1) if steps else torch.empty(len(draft_logits), 0, dtype=torch.int64)


def verify_one(target_logits, token_ids, draft_logits=None, temperature=1.0, **options) -> Verification:
    """One request: target_logits [n + 1, V], token_ids [n], draft_logits [n, V] or None."""
    return verify_reference(
        torch.as_tensor(target_logits, dtype=torch.float32),
        torch.tensor([token_ids], dtype=torch.int64),
        None if draft_logits is None else torch.as_tensor(draft_logits, dtype=torch.float32)[None],
        torch.tensor([len(token_ids)]),
        **requests(1, temperature),
        **options,
    )


def assert_bitwise_equal(a, b) -> None:
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x.dtype == y.dtype and x.shape == y.shape, field.name
        same = (x == y) | (x.isnan() & y.isnan()) if x.is_floating_point() else x == y
        assert same.all(), field.name


# --- The output law, enumerated exactly in fp64 ---------------------------------------------------------------------

# u takes the midpoints of this many cells. That is exact: every p/q and q/p below is a multiple of 1/4 or at least 1.
NUM_UNIFORMS = 4
# (p, q): a usual pair, a steeper one, a token that p excludes, one that q excludes, p equal to q, disjoint supports.
PAIRS = [
    ([1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4]),
    ([1 / 8, 1 / 8, 3 / 4], [1 / 2, 1 / 8, 3 / 8]),
    ([0, 1 / 2, 1 / 2], [1 / 2, 1 / 4, 1 / 4]),
    ([1 / 4, 3 / 8, 3 / 8], [1 / 4, 0, 3 / 4]),
    ([1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4]),
    ([1, 0, 0], [0, 1 / 2, 1 / 2]),
]


class Enumeration:
    """Replaces all randomness of verify_reference by an exhaustive script; `seeds` number the scenarios.

    A scenario fixes every uniform (one of NUM_UNIFORMS cells) and every drawn token. `weight` is its probability: where
    the code draws, the script's token is weighed by the softmax of the scores that the code asked to draw from; a draw
    that the code does not make has the weight 1 / vocab_size for each of the script's tokens.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, vocab_size: int, num_drafts: int, thinning_rounds: int) -> None:
        self.vocab_size = vocab_size
        names = [f"y{i}" for i in range(num_drafts)] + ["target", "residual"]
        names += [f"x{k}" for k in range(thinning_rounds)]
        uniforms = [f"accept{i}" for i in range(num_drafts)] + [f"keep{k}" for k in range(thinning_rounds)]
        grid = [torch.arange(vocab_size)] * len(names) + [torch.arange(NUM_UNIFORMS)] * len(uniforms)
        scenarios = torch.cartesian_prod(*grid)
        self.script = dict(zip(names + uniforms, scenarios.unbind(1), strict=True))
        self.batch = len(scenarios)
        num_draws = len(names) - num_drafts  # the law of the drafts is up to the test
        every_draw_unused = 1.0 / (vocab_size**num_draws * NUM_UNIFORMS ** len(uniforms))
        self.weight = torch.full((self.batch,), every_draw_unused, dtype=torch.float64)
        monkeypatch.setattr(reference, "NUM_THINNING_ROUNDS", thinning_rounds)
        monkeypatch.setattr(reference, "uniform", self.uniform)
        monkeypatch.setattr(reference, "_draw", self.draw)

    def uniform(self, seeds, positions, stream, index=0, attempt=0):
        if stream is Stream.ACCEPT:
            steps = range(positions.shape[1])
            cell = torch.stack([self.script[f"accept{i}"][seeds[:, 0]] for i in steps], dim=1)
        else:
            assert stream is Stream.THINNING_KEEP
            cell = self.script[f"keep{attempt}"][seeds]
        return (cell + 0.5) / NUM_UNIFORMS

    def draw(self, scores, block_logsumexp, seeds, positions, streams, attempt=0):
        torch.testing.assert_close(block_logsumexp, scores.logsumexp(2), rtol=1e-12, atol=1e-12)
        name = {
            Stream.TARGET_BLOCK: "target",
            Stream.THINNING_BLOCK: f"x{attempt}",
            Stream.RESIDUAL_BLOCK: "residual",
        }[streams[0]]
        token = self.script[name][seeds]
        probs = scores.flatten(1).softmax(1).nan_to_num(0)
        self.weight[seeds] *= self.vocab_size * probs.gather(1, token[:, None]).squeeze(1)
        return token


@pytest.mark.parametrize("thinning_rounds", [0, 1, 2])
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_verify_output_law_equals_p_exactly(monkeypatch, pair: int, thinning_rounds: int) -> None:
    """Sum over every scenario: the first output token has the law p; p and q are taken from `PAIRS`."""
    p, q = (torch.tensor(law, dtype=torch.float64) for law in PAIRS[pair])
    world = Enumeration(monkeypatch, 3, 1, thinning_rounds)
    out = verify_reference(
        p.log().expand(2 * world.batch, 3),
        world.script["y0"][:, None],
        q.log().expand(world.batch, 1, 3),
        torch.ones(world.batch, dtype=torch.int64),
        **requests(world.batch),
        dtype=torch.float64,
    )
    weight = world.weight * q[world.script["y0"]]
    law = torch.zeros(3, dtype=torch.float64).index_add(0, out.token_ids[:, 0], weight)
    torch.testing.assert_close(law, p, rtol=0, atol=1e-13)
    acceptance = weight[out.num_accepted == 1].sum()
    torch.testing.assert_close(acceptance, torch.minimum(p, q).sum(), rtol=0, atol=1e-13)
    torch.testing.assert_close(out.overlap[0, 0], torch.minimum(p, q).sum(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("thinning_rounds", [0, 1])
@pytest.mark.parametrize("one_hot_step", [False, True])
def test_verify_joint_law_equals_product_exactly(monkeypatch, one_hot_step: bool, thinning_rounds: int) -> None:
    """Two drafts and the bonus, each conditional on the tokens before it: the joint law is the target's product."""
    first_p, first_q = (torch.tensor(law, dtype=torch.float64) for law in PAIRS[0])
    second_p, second_q = (torch.tensor([PAIRS[1][k], PAIRS[2][k], PAIRS[3][k]]).double() for k in (0, 1))
    third_p = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(2)

    world = Enumeration(monkeypatch, 3, 2, thinning_rounds)
    y0, y1 = world.script["y0"], world.script["y1"]
    if one_hot_step:  # target-only acceptance: the drafter always proposes 0, then 2 minus what it proposed
        quarters = torch.tensor([[1, 1, 2], [2, 0, 2], [3, 1, 0]]).double() / 4
        first_p, second_p = quarters[0], quarters
        first_q, second_q = torch.eye(3).double()[0], torch.eye(3).double().flip(0)
    weight = first_q[y0] * second_q[y0, y1]
    # Row 1 and row 2 are conditional on the drafts before them, as the target's forward pass computes them.
    target = torch.stack([first_p.expand(world.batch, 3), second_p[y0], third_p[y0, y1]], dim=1).log().flatten(0, 1)
    draft_logits = torch.stack([first_q.expand(world.batch, 3), second_q[y0]], dim=1).log()
    out = verify_reference(
        target,
        torch.stack([y0, y1], dim=1),
        None if one_hot_step else draft_logits,
        torch.full((world.batch,), 2),
        **requests(world.batch),
        dtype=torch.float64,
    )
    weight = weight * world.weight

    joint = torch.zeros(3, 3, 3, dtype=torch.float64)
    for tokens in itertools.product(range(3), repeat=3):
        # Tokens past the output come from later steps; by the first-token proof those follow p.
        tail = torch.tensor([1.0, second_p[tokens[0], tokens[1]], third_p[tokens]]).double()
        emitted = torch.where(out.token_ids >= 0, (out.token_ids == torch.tensor(tokens)).double(), tail)
        joint[tokens] = (weight * emitted.prod(dim=1)).sum()
    expected = first_p[:, None, None] * second_p[:, :, None] * third_p
    torch.testing.assert_close(joint, expected, rtol=0, atol=1e-13)


def test_draw_by_sub_block_is_exact() -> None:
    """P(sub-block) P(token | sub-block), from the numbers that the Gumbel-max sees, is softmax(scores)."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 1300, generator=generator, dtype=torch.float64) * 4
    scores[:, 512:1024] = -INF
    scores[1] = scores[1].masked_fill(torch.rand(1300, generator=generator) < 0.5, -INF)
    rows = reference._Rows.from_scores(scores)
    block_prob = rows.block_logsumexp.softmax(1)
    token_prob = rows.scores.softmax(2).nan_to_num(0)
    law = (block_prob[:, :, None] * token_prob).flatten(1)[:, :1300]
    torch.testing.assert_close(law, scores.softmax(1), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(rows.log_probs(), scores.log_softmax(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accepted_count_on_a_grid_of_uniforms(monkeypatch, dtype: torch.dtype) -> None:
    """For each token, exactly N min(1, p/q) +- 1 of N evenly spaced uniforms accept it."""
    n = 10_000
    grid = ((torch.arange(n) + 0.5) / n)[:, None]

    def grid_or_noise(seeds, positions, stream, index=0, attempt=0):
        return grid if stream is Stream.ACCEPT else philox.uniform(seeds, positions, stream, index, attempt)

    monkeypatch.setattr(reference, "uniform", grid_or_noise)
    generator = torch.Generator().manual_seed(1)
    target_logits, draft_logits = torch.randn(2, 1, 7, generator=generator) * 2
    p, q = target_logits.double().softmax(-1)[0], draft_logits.double().softmax(-1)[0]
    for token in range(7):
        out = verify_reference(
            target_logits.expand(2 * n, 7),
            torch.full((n, 1), token),
            draft_logits.expand(n, 1, 7),
            torch.ones(n, dtype=torch.int64),
            **requests(n),
            dtype=dtype,
        )
        assert abs(int(out.num_accepted.sum()) - n * min(1.0, float(p[token] / q[token]))) <= 1


# --- Statistics with the real random numbers ------------------------------------------------------------------------

P = torch.tensor(
    [[0.22, 0.12, 0.14, 0.12, 0.00, 0.40], [0.10, 0.25, 0.15, 0.25, 0.15, 0.10], [0.25, 0.15, 0.20, 0.05, 0.30, 0.05]]
)
# Chosen so that faults show: much of p lies where q > p, where the accept probability depends on u; the residual of
# step 0 has two tokens of very different q, which noise shared with the draft would favour differently; p excludes one.
Q = torch.tensor([[0.02, 0.18, 0.20, 0.18, 0.12, 0.30], [0.15, 0.10, 0.25, 0.10, 0.25, 0.15]])
NUM_SAMPLES = 30_000


def laws_of_verification(num_samples: int, first_seed: int, *, one_request: bool = False, one_hot: bool = False):
    """P-values of low-dimensional laws of two drafts and a bonus; `one_request`: one seed at many positions."""
    vocab_size = P.shape[1]
    shared = requests(num_samples, first_seed=first_seed)
    if one_request:
        shared["positions"] = 3 * shared["seeds"]
        shared["seeds"] = torch.full_like(shared["seeds"], 1234)
    q = torch.eye(vocab_size)[Q.argmax(1)] if one_hot else Q
    draft_logits = q.log().expand(num_samples, 2, vocab_size)
    token_ids = draft(draft_logits, shared)
    out = verify_reference(
        P.log().repeat(num_samples, 1),
        token_ids,
        None if one_hot else draft_logits,
        torch.full((num_samples,), 2),
        **shared,
    )

    overlap = torch.minimum(P[:2], q).sum(1)
    residual = (P[:2] - q).clamp(min=0)
    residual = residual / residual.sum(1, keepdim=True)
    first, second, third = out.token_ids.unbind(1)
    rejected, one, two = (out.num_accepted == k for k in range(3))

    def count(tokens: Tensor) -> np.ndarray:
        return tokens.bincount(minlength=vocab_size).numpy()

    def cross(rows: Tensor, columns: Tensor) -> np.ndarray:
        return (rows * vocab_size + columns).bincount(minlength=vocab_size**2).view(vocab_size, vocab_size).numpy()

    accept_law = [1 - overlap[0], overlap[0] * (1 - overlap[1]), overlap.prod()]
    accepted_law = (torch.minimum(P[:2], q) / overlap[:, None]).numpy()
    return {
        "accepted count": g_test(out.num_accepted.bincount(minlength=3).numpy(), accept_law),
        "token 1": g_test(count(first), P[0].numpy()),
        "token 2 given one accepted": g_test(count(second[~rejected]), P[1].numpy()),
        "bonus": g_test(count(third[two]), P[2].numpy()),
        "accepted token 1": g_test(count(first[~rejected]), accepted_law[0]),
        "residual 1": g_test(count(first[rejected]), residual[0].numpy()),
        "residual 2": g_test(count(second[one]), residual[1].numpy()),
        "rejected x recovered": independence_test(cross(token_ids[rejected, 0], first[rejected])),
        "token 1 x token 2": independence_test(cross(first[~rejected], second[~rejected])),
        "token 2 x bonus": independence_test(cross(second[two], third[two])),
    }


@pytest.mark.parametrize("sub_block", [512, 4, 1])
def test_verify_laws(monkeypatch, sub_block: int) -> None:
    monkeypatch.setattr(reference, "SUB_BLOCK", sub_block)
    assert_laws(laws_of_verification, NUM_SAMPLES)


def test_verify_laws_along_one_request() -> None:
    assert_laws(lambda n, first: laws_of_verification(n, first, one_request=True), NUM_SAMPLES)


def test_verify_laws_one_hot() -> None:
    assert_laws(lambda n, first: laws_of_verification(n, first, one_hot=True), NUM_SAMPLES)


@pytest.mark.parametrize("thinning_rounds", [0, 1])
def test_verify_laws_when_thinning_gives_up(monkeypatch, thinning_rounds: int) -> None:
    monkeypatch.setattr(reference, "NUM_THINNING_ROUNDS", thinning_rounds)
    monkeypatch.setattr(reference, "SUB_BLOCK", 4)
    assert_laws(laws_of_verification, NUM_SAMPLES)


def plant_residual_from_p(monkeypatch) -> None:
    """A recovered token drawn from p: the textbook mistake."""
    monkeypatch.setattr(
        reference, "_sample_residual", lambda target, log_q, s, pos: target.draw(s, pos, TARGET_STREAMS)
    )


def plant_shared_accept_noise(monkeypatch) -> None:
    """Thinning reuses the accept uniform, which is known to be large after a rejection."""

    def shared(seeds, positions, stream, index=0, attempt=0):
        return philox.uniform(seeds, positions, Stream.ACCEPT, index, 0)

    monkeypatch.setattr(reference, "uniform", shared)


def plant_shared_draft_noise(monkeypatch) -> None:
    """The recovered token reuses the Gumbel noise of the rejected draft (vLLM before its PR #54282)."""
    of_draft = {Stream.THINNING_BLOCK: Stream.DRAFT_BLOCK, Stream.THINNING_TOKEN: Stream.DRAFT_TOKEN}

    def shared(seeds, positions, stream, index=0, attempt=0, dtype=torch.float32):
        return philox.gumbel(seeds, positions, of_draft.get(stream, stream), index, attempt, dtype)

    monkeypatch.setattr(reference, "gumbel", shared)


def plant_biased_uniform(monkeypatch) -> None:
    """The accept uniform is 3 % too small."""

    def biased(seeds, positions, stream, index=0, attempt=0):
        return philox.uniform(seeds, positions, stream, index, attempt) * (0.97 if stream is Stream.ACCEPT else 1.0)

    monkeypatch.setattr(reference, "uniform", biased)


def plant_same_noise_at_every_step(monkeypatch) -> None:
    """The accept uniform forgets the position."""

    def same(seeds, positions, stream, index=0, attempt=0):
        return philox.uniform(seeds, torch.zeros_like(positions), stream, index, attempt)

    monkeypatch.setattr(reference, "uniform", same)


@pytest.mark.parametrize(
    "plant",
    [
        plant_residual_from_p,
        plant_shared_accept_noise,
        plant_shared_draft_noise,
        plant_biased_uniform,
        plant_same_noise_at_every_step,
    ],
)
def test_planted_faults_are_caught(monkeypatch, plant) -> None:
    plant(monkeypatch)
    assert_fault_is_caught(laws_of_verification, 4 * NUM_SAMPLES)  # as many as an honest rerun gets


def test_sample_law_over_many_sub_blocks() -> None:
    """1,100 tokens in three sub-blocks, counted by sub-block and for the most likely tokens."""
    logits = torch.randn(1100, generator=torch.Generator().manual_seed(2)) * 2
    probs = (logits.double() / 0.7).softmax(0)

    def counts(n: int, first_seed: int) -> np.ndarray:
        out = sample_reference(logits.expand(n, -1), **requests(n, 0.7, first_seed))
        return out.token_ids.bincount(minlength=1100).numpy()

    assert_law(counts, probs.numpy(), 5_000)


# --- Batches --------------------------------------------------------------------------------------------------------


def mixed_batch(vocab_size: int = 700, batch: int = 12, max_drafts: int = 3, seed: int = 0) -> dict:
    """Requests with 0 .. max_drafts drafts: sampled, greedy and one-hot; some rejected, some accepted."""
    generator = torch.Generator().manual_seed(seed)
    num_draft_tokens = torch.arange(batch) % (max_drafts + 1)
    draft_logits = torch.randn(batch, max_drafts, vocab_size, generator=generator) * 3
    shared = requests(batch)
    shared["temperature"] = torch.where(torch.arange(batch) % 5 == 4, 0.0, torch.linspace(0.3, 1.5, batch))
    rows = [
        F.pad(draft_logits[r, :n], (0, 0, 0, 1)) + torch.randn(n + 1, vocab_size, generator=generator)
        for r, n in enumerate(num_draft_tokens.tolist())
    ]
    token_ids = draft(draft_logits, shared)
    past_the_end = torch.arange(max_drafts) >= num_draft_tokens[:, None]
    return {
        "target_logits": torch.cat(rows),
        "draft_token_ids": token_ids.masked_fill(past_the_end, -1),
        "draft_logits": draft_logits,
        "num_draft_tokens": num_draft_tokens,
        **shared,
        "one_hot": torch.arange(batch) % 5 == 2,
    }


def select(arguments: dict, order: list[int]) -> dict:
    """The same requests in another order, or a part of them."""
    rows = arguments["target_logits"].split((arguments["num_draft_tokens"] + 1).tolist())
    chosen = {name: value[order] for name, value in arguments.items() if name != "target_logits"}
    return {"target_logits": torch.cat([rows[r] for r in order]), **chosen}


def select_output(out: Verification, order: list[int]) -> Verification:
    return Verification(**{field.name: getattr(out, field.name)[order] for field in dataclasses.fields(out)})


@pytest.mark.parametrize("vocab_size", [100, 513, 700])
def test_verify_does_not_depend_on_the_batch(vocab_size: int) -> None:
    arguments = mixed_batch(vocab_size)
    out = verify_reference(**arguments)
    assert out.num_accepted.unique().numel() >= 3
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    assert_bitwise_equal(verify_reference(**select(arguments, permutation)), select_output(out, permutation))
    for r in range(12):
        assert_bitwise_equal(verify_reference(**select(arguments, [r])), select_output(out, [r]))


def test_verify_does_not_read_padding() -> None:
    arguments = mixed_batch()
    out = verify_reference(**arguments)
    past_the_end = torch.arange(3) >= arguments["num_draft_tokens"][:, None]
    padded = arguments | {
        "draft_logits": torch.cat(
            [arguments["draft_logits"].masked_fill(past_the_end[:, :, None], NAN), torch.full((12, 2, 700), NAN)], dim=1
        ),
        "draft_token_ids": torch.cat(
            [arguments["draft_token_ids"].masked_fill(past_the_end, 5), torch.full((12, 2), 7)], dim=1
        ),
    }
    wide = verify_reference(**padded)
    assert (wide.token_ids[:, 4:] == -1).all() and wide.overlap[:, 3:].isnan().all()
    narrow = dataclasses.replace(
        wide,
        token_ids=wide.token_ids[:, :4],
        target_entropy_nats=wide.target_entropy_nats[:, :4],
        overlap=wide.overlap[:, :3],
        draft_argmax_prob=wide.draft_argmax_prob[:, :3],
    )
    assert_bitwise_equal(narrow, out)


def test_sample_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(9, 700, generator=torch.Generator().manual_seed(0))
    shared = requests(9, 0.8)
    out = sample_reference(logits, **shared)
    for r in range(9):
        alone = sample_reference(logits[r : r + 1], **{name: value[r : r + 1] for name, value in shared.items()})
        part = {field.name: getattr(out, field.name)[r : r + 1] for field in dataclasses.fields(out)}
        assert_bitwise_equal(alone, type(out)(**part))


def test_verify_mixed_batch_equals_uniform_batches() -> None:
    """Greedy, one-hot and sampled requests in one call give what separate calls give."""
    arguments = mixed_batch()
    out = verify_reference(**arguments)
    for r in range(12):
        alone = select(arguments, [r])
        if alone.pop("one_hot").item():
            alone["draft_logits"] = None
        assert_bitwise_equal(verify_reference(**alone), select_output(out, [r]))


def test_verify_single_and_double_precision_agree() -> None:
    arguments = mixed_batch(vocab_size=100, batch=2000)
    single, double = (verify_reference(**arguments, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert (single.token_ids != double.token_ids).any(dim=1).sum() <= 2
    for name in ("target_entropy_nats", "overlap", "draft_argmax_prob"):
        a, b = getattr(single, name).double(), getattr(double, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("vocab_size", [1, 63, 100, 513, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_verify_any_vocabulary(vocab_size: int, dtype: torch.dtype) -> None:
    batch = 4 if vocab_size > 1000 else 12
    arguments = mixed_batch(vocab_size, batch)
    arguments |= {name: arguments[name].to(dtype) for name in ("target_logits", "draft_logits")}
    out = verify_reference(**arguments)
    step = torch.arange(4)
    assert (out.num_accepted <= arguments["num_draft_tokens"]).all()
    assert ((out.token_ids >= 0) == (step <= out.num_accepted[:, None])).all()
    assert (out.token_ids < vocab_size).all()
    accepted = step[:3] < out.num_accepted[:, None]
    assert (out.token_ids[:, :3] == arguments["draft_token_ids"])[accepted].all()
    has_row = step <= arguments["num_draft_tokens"][:, None]
    assert (out.target_entropy_nats.isnan() == ~has_row).all()
    assert (out.overlap.isnan() == ~has_row[:, 1:]).all() and (out.draft_argmax_prob.isnan() == ~has_row[:, 1:]).all()
    assert (out.num_nan == 0).all() and (out.num_empty_rows == 0).all()


def test_last_token_of_an_odd_vocabulary() -> None:
    for vocab_size in (63, 100, 513, 151_936):
        logits = torch.full((2, vocab_size), -INF)
        logits[:, -1] = -3.0
        assert sample_reference(logits, **requests(2)).token_ids.tolist() == [vocab_size - 1] * 2
        assert verify_one(logits, [0], logits[:1] * 0).token_ids.tolist() == [[vocab_size - 1, -1]]


def test_sample_statistics() -> None:
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(0)) * 5
    out = sample_reference(logits, **requests(5, 0.6))
    scaled = logits.double() / 0.6
    torch.testing.assert_close(out.logsumexp.double(), scaled.logsumexp(1), rtol=1e-6, atol=1e-5)
    expected = scaled.log_softmax(1).gather(1, out.token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(out.log_prob.double(), expected, rtol=1e-6, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=scaled).entropy()
    torch.testing.assert_close(out.entropy_nats.double(), entropy, rtol=1e-5, atol=1e-5)


def test_verify_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft_logits = torch.randn(3, 50, generator=generator), torch.randn(2, 50, generator=generator)
    p, q = (target.double() / 0.8).softmax(1), (draft_logits.double() / 0.8).softmax(1)
    out = verify_one(target, [3, 4], draft_logits, temperature=0.8, dtype=torch.float64)
    torch.testing.assert_close(out.target_entropy_nats[0], torch.special.entr(p).sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.overlap[0], torch.minimum(p[:2], q).sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.draft_argmax_prob[0], p[[0, 1], q.argmax(1)], rtol=1e-6, atol=1e-6)
    flag = torch.tensor([True])
    for one_hot in (verify_one(target, [3, 4], None, 0.8), verify_one(target, [3, 4], draft_logits, 0.8, one_hot=flag)):
        torch.testing.assert_close(one_hot.overlap[0].double(), p[[0, 1], [3, 4]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one_hot.draft_argmax_prob[0].double(), p[[0, 1], [3, 4]], rtol=1e-5, atol=1e-6)


# --- Edge cases -----------------------------------------------------------------------------------------------------


def test_empty_batch() -> None:
    empty = requests(0)
    assert sample_reference(torch.empty(0, 5), **empty).token_ids.shape == (0,)
    for draft_logits in (torch.empty(0, 3, 5), None):
        none = torch.empty(0, dtype=torch.int64)
        out = verify_reference(torch.empty(0, 5), none.view(0, 3), draft_logits, none, **empty)
        assert out.token_ids.shape == (0, 4) and out.overlap.shape == (0, 3)


def test_no_drafts_draws_the_bonus_from_row_0() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    shared = requests(6)
    plain = sample_reference(logits, **shared, streams=TARGET_STREAMS)
    for width, draft_logits in ((0, None), (0, torch.empty(6, 0, 40)), (2, torch.full((6, 2, 40), NAN))):
        no_drafts = torch.full((6, width), -1)
        out = verify_reference(logits, no_drafts, draft_logits, torch.zeros(6, dtype=torch.int64), **shared)
        assert torch.equal(out.token_ids[:, 0], plain.token_ids)
        assert (out.num_accepted == 0).all() and (out.token_ids[:, 1:] == -1).all()


def test_greedy_takes_the_lowest_argmax_and_accepts_only_it() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]] * 3)
    for temperature in (0.0, 9e-6):
        out = sample_reference(logits, **requests(3, temperature))
        assert out.token_ids.tolist() == [1, 1, 1]
        assert out.log_prob.tolist() == [0, 0, 0] and out.entropy_nats.tolist() == [0, 0, 0]
        assert out.logsumexp.tolist() == [2, 2, 2]
        for draft_logits in (None, torch.zeros(2, 4)):  # what q was does not matter
            assert verify_one(logits, [1, 1], draft_logits, temperature).token_ids.tolist() == [[1, 1, 1]]
            rejected = verify_one(logits, [1, 3], draft_logits, temperature)  # 3 ties with 1, which has the lower id
            assert rejected.token_ids.tolist() == [[1, 1, -1]] and rejected.num_accepted.tolist() == [1]
            assert rejected.target_entropy_nats.tolist() == [[0, 0, 0]]
            assert rejected.overlap.tolist() == [[1, 0]] and rejected.draft_argmax_prob.tolist() == [[1, 0]]


def test_greedy_ties_across_sub_blocks() -> None:
    logits = torch.zeros(1, 1500)
    logits[0, [600, 700, 1400]] = 1.0
    assert sample_reference(logits, **requests(1, 0.0)).token_ids.tolist() == [600]


def test_token_of_zero_target_probability_is_rejected_and_never_emitted() -> None:
    target = torch.tensor([[-INF, 0.0, 0.0], [0.0, 0.0, 0.0]])
    n = 1000
    draft_logits = torch.tensor([5.0, 0.0, 0.0]).expand(n, 1, 3)
    one, zero = torch.ones(n, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.int64)
    out = verify_reference(target.repeat(n, 1), zero, draft_logits, one, **requests(n))
    assert (out.num_accepted == 0).all() and set(out.token_ids[:, 0].tolist()) == {1, 2}


@pytest.mark.parametrize("case", ["q(y) = 0", "empty q", "padding", "id past the vocabulary", "one-hot padding"])
def test_missing_draft_is_rejected_and_p_is_sampled(case: str) -> None:
    """The token is the one that p gives on the target streams, not a residual."""
    n, vocab_size = 300, 5
    target = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(0))
    token = {"padding": -1, "one-hot padding": -1, "id past the vocabulary": vocab_size}.get(case, 2)
    q_logits = torch.zeros(vocab_size)
    if case == "q(y) = 0":
        q_logits[2] = -INF
    if case == "empty q":
        q_logits[:] = -INF
    shared = requests(n)
    out = verify_reference(
        target.repeat(n, 1),
        torch.full((n, 1), token),
        None if case == "one-hot padding" else q_logits.expand(n, 1, vocab_size),
        torch.ones(n, dtype=torch.int64),
        **shared,
    )
    plain = sample_reference(target[:1].expand(n, -1), **shared, streams=TARGET_STREAMS)
    assert (out.num_accepted == 0).all()
    assert torch.equal(out.token_ids[:, 0], plain.token_ids)
    assert out.overlap.isnan().all() == (case in ("empty q", "one-hot padding"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p_equal_to_q_always_accepts(monkeypatch, dtype: torch.dtype) -> None:
    largest = torch.tensor(1 - 2.0**-24)
    monkeypatch.setattr(reference, "uniform", lambda seeds, positions, *_, **__: largest.expand_as(seeds + positions))
    vocab_size, batch = 5000, 20
    draft_logits = torch.randn(batch, 2, vocab_size, generator=torch.Generator().manual_seed(0)) * 8
    shared = requests(batch, 0.9)
    target = torch.cat([draft_logits, torch.zeros(batch, 1, vocab_size)], dim=1).flatten(0, 1)
    # Any token, however unlikely: its log-probability is large, and rounding must not decide.
    token_ids = torch.randint(vocab_size, (batch, 2), generator=torch.Generator().manual_seed(1))
    out = verify_reference(target, token_ids, draft_logits, torch.full((batch,), 2), **shared, dtype=dtype)
    assert (out.num_accepted == 2).all()


def test_zero_residual_keeps_the_last_draw_from_p() -> None:
    log_p = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(500, 3)
    rows = reference._Rows.from_scores(log_p)
    shared = requests(500)
    tokens = reference._sample_residual(rows, rows.log_probs(), shared["seeds"], shared["positions"])
    last = rows.draw(
        shared["seeds"],
        shared["positions"],
        (Stream.THINNING_BLOCK, Stream.THINNING_TOKEN),
        reference.NUM_THINNING_ROUNDS - 1,
    )
    assert torch.equal(tokens, last)
    assert g_test(tokens.bincount(minlength=3).numpy(), [0.1, 0.2, 0.7]) > 1e-4


def test_residual_never_gives_a_token_outside_its_support() -> None:
    """q covers all of p but one rare token: thinning almost always gives up, and only that token may come out."""
    p = torch.tensor([0.5 - 1e-4, 1e-4, 0.5])
    q = torch.tensor([0.5, 0.0, 0.5])
    rows = reference._Rows.from_scores(p.log().expand(2000, 3))
    shared = requests(2000)
    log_q = q.log().expand(2000, 3)
    tokens = reference._sample_residual(rows, log_q, shared["seeds"], shared["positions"])
    assert (tokens == 1).float().mean() > 0.99  # 0.5 - 1e-4 and 0.5 differ from q by rounding only
    assert (tokens != 0).all()


def test_nan_is_minus_infinity_and_counted() -> None:
    clean = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    clean[1, 10:20] = -INF
    dirty = clean.clone()
    dirty[1, 10:20] = NAN
    expected, out = (sample_reference(logits, **requests(3)) for logits in (clean, dirty))
    assert out.num_nan.tolist() == [0, 10, 0] and expected.num_nan.tolist() == [0, 0, 0]
    assert_bitwise_equal(dataclasses.replace(out, num_nan=expected.num_nan), expected)
    for temperature in (0.0, 1.0):
        expected, out = (verify_one(rows, [1, 2], clean[:2], temperature) for rows in (clean, dirty))
        assert out.num_nan.tolist() == [10]
        assert_bitwise_equal(dataclasses.replace(out, num_nan=expected.num_nan), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plus_infinity_is_clamped_and_wins(temperature: float) -> None:
    logits = torch.zeros(3, 600)
    logits[:, 550] = INF
    logits[0, 580] = INF  # a tie: the lowest id
    out = sample_reference(logits, **requests(3, temperature))
    assert out.token_ids.tolist() == [550] * 3
    assert out.log_prob.isfinite().all() and out.entropy_nats.isfinite().all()
    assert verify_one(logits, [1, 2], None, temperature).token_ids.tolist() == [[550, -1, -1]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fill", [-INF, NAN])
def test_empty_row_gives_token_0_and_is_counted(temperature: float, fill: float) -> None:
    empty = torch.full((1, 600), fill)
    sample = sample_reference(empty, **requests(1, temperature))
    assert sample.token_ids.tolist() == [0] and sample.is_empty.tolist() == [True]
    assert sample.log_prob.tolist() == [-INF] and sample.entropy_nats.tolist() == [0]
    for token in (0, 5):
        for draft_logits in (None, torch.zeros(2, 600)):
            target = torch.cat([empty, torch.zeros(1, 600), empty])
            out = verify_one(target, [token, 1], draft_logits, temperature)
            assert out.token_ids.tolist() == [[0, -1, -1]] and out.num_accepted.tolist() == [0]
            assert out.num_empty_rows.tolist() == [2]


def test_processed_target_keeps_its_temperature_and_masks() -> None:
    """Processed rows equal raw rows whose temperature and top-k mask the caller applied; greedy still means argmax."""
    arguments = mixed_batch()
    temperature_of_row = arguments["temperature"].repeat_interleave(arguments["num_draft_tokens"] + 1)
    divisor = torch.where(temperature_of_row < 1e-5, 1.0, temperature_of_row)[:, None]
    masked = arguments["target_logits"].clone()
    masked[masked < masked.topk(20).values[:, -1:]] = -INF
    raw = verify_reference(**arguments | {"target_logits": masked})
    processed = verify_reference(**arguments | {"target_logits": masked / divisor}, target_is_processed=True)
    assert_bitwise_equal(processed, raw)


@pytest.mark.parametrize(
    "name, value",
    [
        ("target_logits", torch.zeros(3, 8)),
        ("target_logits", torch.zeros(4, 8, dtype=torch.int64)),
        ("target_logits", torch.zeros(4, 0)),
        ("target_logits", torch.zeros(4, 8, 1)),
        ("draft_token_ids", torch.zeros(2, dtype=torch.int64)),
        ("draft_token_ids", torch.zeros(2, 2, dtype=torch.int32)),
        ("draft_logits", torch.zeros(2, 2, 7)),
        ("draft_logits", torch.zeros(2, 2, 8, device="meta")),
        ("num_draft_tokens", torch.tensor([1, 1, 0])),
        ("num_draft_tokens", torch.tensor([-1, 3])),
        ("num_draft_tokens", torch.tensor([3, -1])),
        ("temperature", torch.ones(2, dtype=torch.float64)),
        ("seeds", torch.zeros(3, dtype=torch.int64)),
        ("positions", torch.zeros(2)),
        ("one_hot", torch.zeros(2, dtype=torch.int64)),
        ("dtype", torch.bfloat16),
    ],
)
def test_verify_names_the_wrong_argument(name: str, value) -> None:
    arguments = {
        "target_logits": torch.zeros(4, 8),
        "draft_token_ids": torch.zeros(2, 2, dtype=torch.int64),
        "draft_logits": torch.zeros(2, 2, 8),
        "num_draft_tokens": torch.tensor([1, 1]),
        **requests(2),
    }
    verify_reference(**arguments)
    with pytest.raises(ValueError, match=f"^{name} "):
        verify_reference(**arguments | {name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("logits", torch.zeros(8)),
        ("logits", torch.zeros(2, 8, dtype=torch.int32)),
        ("temperature", torch.ones(3)),
        ("seeds", torch.zeros(2)),
        ("positions", torch.zeros(2, dtype=torch.int32)),
        ("dtype", torch.float16),
    ],
)
def test_sample_names_the_wrong_argument(name: str, value) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        sample_reference(**{"logits": torch.zeros(2, 8), **requests(2)} | {name: value})


def test_entropy_of_a_uniform_row() -> None:
    out = sample_reference(torch.zeros(1, 600), **requests(1))
    assert out.entropy_nats.item() == pytest.approx(math.log(600), rel=1e-6)
