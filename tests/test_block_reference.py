"""Block verification is lossless and accepts no fewer drafts: exact sums over tiny laws, many rounds, edge cases.

The law of the code is taken apart without sampling: how far it gets is found by bisecting the uniform numbers that it
compares with, and what it then draws from is read where it draws. Faults are planted by replacing functions of
`block_reference`; each must be caught by the test that an honest rule passes.
"""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from tests.support.requests import INF, NAN, assert_bitwise_equal, mixed_batch, requests, select, select_output
from tests.support.statistics import assert_fault_is_caught, assert_laws, g_test, independence_test
from vllm_bebop.kernels import block_reference, philox, reference
from vllm_bebop.kernels.block_reference import accept_block, verify_block_reference
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import sample_reference, verify_reference

TARGET_STREAMS = (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)
LARGEST_UNIFORM = 1 - 2.0**-24

# --- The law of one round, exactly in fp64 --------------------------------------------------------------------------

NUM_BISECTIONS = 56


@dataclasses.dataclass(frozen=True)
class Round:
    """Every way that a round of drafts can go: paths [N, n], in a tree of laws conditional on the tokens before.

    p[i], q[i]: [vocab] * i + [vocab], the law of token i.
    """

    p: list[Tensor]
    q: list[Tensor]

    @property
    def vocab_size(self) -> int:
        return self.p[0].numel()

    @property
    def paths(self) -> Tensor:
        return torch.tensor(list(itertools.product(range(self.vocab_size), repeat=len(self.q))))

    def along(self, laws: list[Tensor]) -> Tensor:
        """[N, len(laws), vocab]: the laws met on each path."""
        return torch.stack([law[tuple(self.paths[:, :i].unbind(1))].expand(len(self.paths), -1) if i else
                            law.expand(len(self.paths), -1) for i, law in enumerate(laws)], dim=1)  # fmt: skip

    def chance_of_paths(self) -> Tensor:
        """[N, n]: probability of x_1 .. x_{i+1} under q."""
        return self.along(self.q).gather(2, self.paths[:, :, None]).squeeze(2).cumprod(dim=1)

    def joint(self) -> Tensor:
        """[vocab] * (n + 1): the target's joint law of all tokens of the round."""
        joint = torch.ones((), dtype=torch.float64)
        for law in self.p:
            joint = joint[..., None] * law
        return joint


def some_round(kind: str, num_drafts: int = 3, vocab_size: int = 3, seed: int = 0) -> Round:
    generator = torch.Generator().manual_seed(seed)

    def laws(count: int) -> list[Tensor]:
        shapes = [(vocab_size,) * (i + 1) for i in range(count)]
        return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1) for shape in shapes]

    p, q = laws(num_drafts + 1), laws(num_drafts)
    if kind == "p equal to q after the first":
        q = [q[0], *p[1:-1]]
    if kind == "tokens that p or q excludes":
        for laws_with_zeros, token in ((p, 0), (q, 1)):
            for law in laws_with_zeros[1:]:
                law[..., token] = 0
                law /= law.sum(-1, keepdim=True)
    if kind == "one-hot":
        q = [torch.nn.functional.one_hot(law.argmax(-1), vocab_size).double() for law in q]
    return Round(p, q)


ROUNDS = ["random", "p equal to q after the first", "tokens that p or q excludes", "one-hot"]


def law_of_rule(monkeypatch: pytest.MonkeyPatch, round_: Round, one_hot: bool = False) -> tuple[Tensor, Tensor]:
    """The code's joint law of n + 1 tokens, later rounds taken to follow p; and the mean number of accepted drafts."""
    paths, n = round_.paths, len(round_.q)
    p, q = round_.along(round_.p), round_.along(round_.q)
    drawn_from = torch.zeros(len(paths), round_.vocab_size, dtype=torch.float64)
    eta = torch.ones(len(paths), n + 1, dtype=torch.float64)

    def draw(scores, block_logsumexp, seeds, positions, streams, attempt=0):
        drawn_from[seeds] = scores.flatten(1).softmax(1)[:, : round_.vocab_size].nan_to_num(0)
        return torch.zeros_like(seeds)

    def run(uniforms: Tensor) -> Tensor:
        eta.copy_(uniforms)
        return verify_block_reference(
            p.log().flatten(0, 1),
            paths,
            None if one_hot else q.log(),
            torch.full((len(paths),), n),
            **requests(len(paths)),
            dtype=torch.float64,
        ).num_accepted

    with monkeypatch.context() as patch:
        patch.setattr(reference, "_draw", draw)
        patch.setattr(block_reference, "uniform", lambda *_, **__: eta)
        # The chance of tau >= i if everything after i is rejected: the largest eta_i at which that happens.
        reached = torch.ones(len(paths), n + 1, dtype=torch.float64)
        for i in range(1, n + 1):
            low, high = torch.zeros(len(paths)).double(), torch.ones(len(paths)).double()
            for _ in range(NUM_BISECTIONS):
                uniforms = torch.ones_like(eta)
                uniforms[:, i] = (low + high) / 2
                is_reached = run(uniforms) >= i
                low, high = uniforms[:, i].where(is_reached, low), uniforms[:, i].where(~is_reached, high)
            reached[:, i] = low.where(low < 1 - 1e-15, 1.0)
        joint = torch.zeros_like(round_.joint())
        mean_accepted = torch.zeros((), dtype=torch.float64)
        for i in range(n + 1):  # tau = i
            chance = reached[:, i] * (1 - reached[:, i + 1 :]).prod(1) * round_.chance_of_paths()[:, -1]
            uniforms = torch.full_like(eta, 1.0)
            uniforms[:, i] = 1e-300
            num_accepted = run(uniforms)
            assert (num_accepted == i)[chance > 0].all()
            mean_accepted += i * chance.sum()
            for path, row, weight in zip(paths.tolist(), drawn_from.clone(), chance, strict=True):
                if weight == 0:
                    continue
                tail = row.clone()
                for law in round_.p[i + 1 :]:
                    tail = tail[..., None] * law[tuple(path[:i])]
                joint[tuple(path[:i])] += weight * tail
    return joint, mean_accepted


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
@pytest.mark.parametrize("kind", ROUNDS)
def test_verify_block_joint_law_equals_product_exactly(monkeypatch, kind: str, num_drafts: int) -> None:
    round_ = some_round(kind, num_drafts)
    joint, mean_accepted = law_of_rule(monkeypatch, round_, one_hot=kind == "one-hot")
    torch.testing.assert_close(joint, round_.joint(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mean_accepted, expected_accepted(round_), rtol=0, atol=1e-12)


def expected_accepted(round_: Round) -> Tensor:
    """sum_i E[w_i], since P(tau >= i | x_1 .. x_i) = w_i."""
    weight, total = torch.ones(len(round_.paths), dtype=torch.float64), 0.0
    for ratio in ratios(round_).unbind(1):
        weight = (weight * ratio).clamp(max=1)
        total = total + (round_.chance_of_paths()[:, -1] * weight).sum()
    return total


def ratios(round_: Round) -> Tensor:
    """[N, n]: p / q of each draft on the path, 0 where q is 0."""
    p, q = (round_.along(laws)[:, : len(round_.q)].gather(2, round_.paths[:, :, None]).squeeze(2)
            for laws in (round_.p, round_.q))  # fmt: skip
    return (p / q).where(q > 0, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_verify_block_accepts_no_fewer_drafts_than_one_by_one(seed: int) -> None:
    round_ = some_round("random", num_drafts=3, seed=seed)
    one_by_one = (round_.chance_of_paths()[:, -1:] * ratios(round_).clamp(max=1).cumprod(1)).sum()
    assert expected_accepted(round_) > one_by_one + 1e-3


def plant_weight_for_its_chance(monkeypatch) -> None:
    """A draft is reached with probability w_i instead of h_i."""
    monkeypatch.setattr(block_reference, "_is_reached", lambda eta, weight, residual_sum: eta <= weight)


def plant_residual_of_weight_one(monkeypatch) -> None:
    """max(0, p - q) in place of max(0, w p - q)."""
    honest = block_reference._residual
    monkeypatch.setattr(
        block_reference,
        "_residual",
        lambda log_weight, log_p, log_q: honest(0 * log_weight.clamp(min=-1), log_p, log_q),
    )


def plant_residual_from_p(monkeypatch) -> None:
    monkeypatch.setattr(block_reference, "draw_residual", lambda residual, seeds, positions: torch.zeros_like(seeds))


def plant_forgotten_history(monkeypatch) -> None:
    """Each draft counts by its own min(1, p / q), as one by one, but the last that passes decides."""
    monkeypatch.setattr(block_reference, "_is_reached", lambda eta, weight, residual_sum: eta <= residual_sum)


@pytest.mark.parametrize(
    "plant",
    [plant_weight_for_its_chance, plant_residual_of_weight_one, plant_residual_from_p, plant_forgotten_history],
)
def test_verify_block_planted_faults_change_the_joint_law(monkeypatch, plant) -> None:
    round_ = some_round("random")
    plant(monkeypatch)
    joint, _ = law_of_rule(monkeypatch, round_)
    assert (joint - round_.joint()).abs().sum() > 0.01


# --- Several rounds with the real random numbers --------------------------------------------------------------------

P = torch.tensor([[0.65, 0.35], [0.25, 0.75]])  # the law of the next token, by the last one
Q = torch.tensor([[0.25, 0.75], [0.70, 0.30]])
NUM_TOKENS, NUM_DRAFTS = 4, 3
NUM_SAMPLES = 20_000


def serve(num_samples: int, first_seed: int, round_key: bool = True) -> Tensor:
    """[N, 4]: the first tokens that rounds of three drafts give, after token 0."""
    shared = requests(num_samples, first_seed=first_seed)
    out = torch.zeros(num_samples, 1 + NUM_TOKENS + NUM_DRAFTS, dtype=torch.int64)
    count = torch.zeros(num_samples, dtype=torch.int64)
    while (pending := (count < NUM_TOKENS).nonzero().squeeze(1)).numel():
        now = {name: value[pending] for name, value in shared.items()}
        now["positions"] = now["positions"] + count[pending]
        last = [out[pending, count[pending]]]
        for i in range(NUM_DRAFTS):
            position = now["positions"] + i
            rounds = now["positions"] if round_key else None
            law = Q[last[-1]].log()
            last.append(sample_reference(law, now["temperature"], now["seeds"], position, rounds=rounds).token_ids)
        drafts = torch.stack(last[1:], dim=1)
        step = verify_block_reference(
            torch.stack([P[token].log() for token in last], dim=1).flatten(0, 1),
            drafts,
            torch.stack([Q[token].log() for token in last[:-1]], dim=1),
            torch.full_like(pending, NUM_DRAFTS),
            **now,
        )
        column = 1 + count[pending, None] + torch.arange(NUM_DRAFTS + 1)
        is_token = step.token_ids >= 0
        out[pending[:, None].expand_as(column)[is_token], column[is_token]] = step.token_ids[is_token]
        count[pending] += step.num_accepted + 1
    return out[:, 1 : 1 + NUM_TOKENS]


def laws_of_rounds(num_samples: int, first_seed: int, round_key: bool = True) -> dict[str, float]:
    tokens = serve(num_samples, first_seed, round_key)
    joint = P[0]
    for _ in range(NUM_TOKENS - 1):
        joint = joint[..., None] * P
    cell = (tokens * 2 ** torch.arange(NUM_TOKENS).flip(0)).sum(1)
    return {
        "tokens 1 to 4": g_test(cell.bincount(minlength=2**NUM_TOKENS).numpy(), joint.flatten().numpy()),
        "token 1": g_test(tokens[:, 0].bincount(minlength=2).numpy(), P[0].numpy()),
        "token 1 x token 3, given token 2": independence_test(
            (tokens[:, 0] * 2 + tokens[:, 2])[tokens[:, 1] == 0].bincount(minlength=4).view(2, 2).numpy()
        ),
    }


def test_rounds_of_verify_block_follow_the_joint_law() -> None:
    assert_laws(laws_of_rounds, NUM_SAMPLES)


@pytest.mark.parametrize("forgotten", ["drafts", "acceptance", "both"])
def test_rounds_that_share_noise_are_caught(monkeypatch, forgotten: str) -> None:
    if forgotten != "drafts":
        monkeypatch.setattr(
            block_reference,
            "uniform",
            lambda seeds, positions, stream, attempt: philox.uniform(seeds, positions, stream),
        )
    assert_fault_is_caught(
        lambda n, first: laws_of_rounds(n, first, round_key=forgotten == "acceptance"), 4 * NUM_SAMPLES
    )


# --- Batches and edge cases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [100, 700])
def test_verify_block_does_not_depend_on_the_batch(vocab_size: int) -> None:
    arguments = mixed_batch(vocab_size)
    out = verify_block_reference(**arguments)
    assert out.num_accepted.unique().numel() >= 3
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    assert_bitwise_equal(verify_block_reference(**select(arguments, order)), select_output(out, order))
    for r in range(12):
        assert_bitwise_equal(verify_block_reference(**select(arguments, [r])), select_output(out, [r]))


def test_verify_block_of_greedy_requests_is_verify() -> None:
    arguments = mixed_batch(batch=64)
    arguments["temperature"] = torch.zeros(64)
    out = verify_block_reference(**arguments)
    assert out.num_accepted.unique().numel() >= 3
    assert_bitwise_equal(out, verify_reference(**arguments))


def test_verify_block_without_drafts_draws_the_bonus_from_row_0() -> None:
    logits, shared = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), requests(6)
    plain = sample_reference(logits, **shared, streams=TARGET_STREAMS)
    for width in (0, 2):
        no_drafts, none = torch.full((6, width), -1), torch.zeros(6, dtype=torch.int64)
        out = verify_block_reference(logits, no_drafts, torch.full((6, width, 40), NAN), none, **shared)
        assert torch.equal(out.token_ids[:, 0], plain.token_ids) and (out.num_accepted == 0).all()


@pytest.mark.parametrize("case", ["padding", "id past the vocabulary", "q(y) = 0", "empty q", "empty p"])
def test_verify_block_ends_where_a_draft_is_missing(case: str) -> None:
    """As if the drafts had ended there, whatever comes after; an empty target row gives token 0."""
    n, vocab_size, end = 500, 5, 1
    generator = torch.Generator().manual_seed(0)
    target, draft_logits = torch.randn(n, 4, vocab_size, generator=generator), torch.randn(n, 3, vocab_size)
    token_ids = torch.randint(vocab_size, (n, 3), generator=generator)
    shorter = verify_block_reference(
        target[:, : end + 1].flatten(0, 1), token_ids, draft_logits, torch.full((n,), end), **requests(n)
    )
    if case in ("padding", "id past the vocabulary"):
        token_ids[:, end] = -1 if case == "padding" else vocab_size
    elif case == "q(y) = 0":
        draft_logits[:, end].scatter_(1, token_ids[:, end, None], -INF)
    elif case == "empty q":
        draft_logits[:, end] = -INF
    else:
        target[:, end] = NAN
    out = verify_block_reference(target.flatten(0, 1), token_ids, draft_logits, torch.full((n,), 3), **requests(n))
    assert torch.equal(out.num_accepted, shorter.num_accepted) and set(out.num_accepted.tolist()) == {0, end}
    same = out.token_ids[:, : end + 1] == shorter.token_ids[:, : end + 1]
    if case == "empty p":
        assert (out.token_ids[out.num_accepted == end, end] == 0).all() and (out.num_empty_rows == 1).all()
        assert same[out.num_accepted < end].all()
    else:
        assert same.all()


def test_verify_block_never_emits_a_token_of_zero_target_probability() -> None:
    n = 2000
    target = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    target[:, 1] = -INF
    shared = requests(n)
    draft_logits = torch.zeros(n, 2, 4)
    drafts = [sample_reference(draft_logits[:, i], shared["temperature"], shared["seeds"], shared["positions"] + i,
                               rounds=shared["positions"]).token_ids for i in range(2)]  # fmt: skip
    out = verify_block_reference(
        target.repeat(n, 1), torch.stack(drafts, 1), draft_logits, torch.full((n,), 2), **shared
    )
    assert (out.token_ids != 1).all() and set(out.num_accepted.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verify_block_of_p_equal_to_q_always_accepts(monkeypatch, dtype: torch.dtype) -> None:
    largest = torch.tensor(LARGEST_UNIFORM)
    monkeypatch.setattr(
        block_reference, "uniform", lambda seeds, positions, *_, **__: largest.expand_as(seeds + positions)
    )
    vocab_size, batch = 5000, 20
    draft_logits = torch.randn(batch, 2, vocab_size, generator=torch.Generator().manual_seed(0)) * 8
    target = torch.cat([draft_logits, torch.zeros(batch, 1, vocab_size)], dim=1).flatten(0, 1)
    token_ids = torch.randint(vocab_size, (batch, 2), generator=torch.Generator().manual_seed(1))
    out = verify_block_reference(
        target, token_ids, draft_logits, torch.full((batch,), 2), **requests(batch, 0.9), dtype=dtype
    )
    assert (out.num_accepted == 2).all()


def test_verify_block_draws_from_p_where_the_residual_is_zero() -> None:
    """A draft that is rejected although p equals q, as rounding might make it: the residual has nothing to give."""
    n = 500
    logits, shared = torch.tensor([[0.1, 0.2, 0.7]]).log(), requests(n)

    def with_impossible_draft(proposal):
        return accept_block(dataclasses.replace(proposal, log_p_token=torch.full((n, 1), -INF)))

    out = verify_reference(
        logits.expand(2 * n, 3),
        torch.zeros(n, 1, dtype=torch.int64),
        logits.expand(n, 1, 3),
        torch.ones(n, dtype=torch.int64),
        **shared,
        rule=with_impossible_draft,
    )
    plain = sample_reference(logits.expand(n, 3), **shared, streams=TARGET_STREAMS)
    assert (out.num_accepted == 0).all() and torch.equal(out.token_ids[:, 0], plain.token_ids)


def test_verify_block_single_and_double_precision_agree() -> None:
    arguments = mixed_batch(vocab_size=100, batch=2000)
    single, double = (verify_block_reference(**arguments, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert (single.token_ids != double.token_ids).any(dim=1).sum() <= 2


def test_verify_block_names_the_wrong_argument() -> None:
    arguments = mixed_batch()
    with pytest.raises(ValueError, match="^seeds "):
        verify_block_reference(**arguments | {"seeds": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="^rounds "):
        sample_reference(torch.zeros(2, 8), **requests(2), rounds=torch.zeros(3, dtype=torch.int64))
