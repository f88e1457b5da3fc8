"""The reference sampler is lossless: proofs by enumeration, by a grid of uniforms and by statistics.

Each statistical test also runs on samplers with a planted fault, which it must catch. Faults and scripted noise are
planted by replacing `uniform`, `gumbel`, `_draw` or `_sample_residual` in the module under test.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.requests import INF, draft, requests
from tests.support.statistics import assert_fault_is_caught, assert_law, assert_laws, g_test, independence_test
from vllm_bebop.kernels import philox, reference
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import sample_reference, verify_reference

TARGET_STREAMS = (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)


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
