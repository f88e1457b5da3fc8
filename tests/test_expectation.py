"""The offline expectation against an enumeration of the served process: each draft drawn, accepted or rejected."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.support.parity_inputs import small_head, small_target
from vllm_bebop.bench import expectation
from vllm_bebop.bench.expectation import (
    SURVIVAL,
    block_survival,
    expected_survival,
    rejection_sampling_survival,
)
from vllm_bebop.train.evaluate import Text, chain_statistics
from vllm_bebop.train.losses import SamplingPolicy

VOCAB_SIZE, NUM_STEPS = 4, 3
PLAIN = SamplingPolicy(0.7)
TOP_P = SamplingPolicy(0.7, top_p=0.8)
TOP_K = SamplingPolicy(0.7, top_k=2)
Laws = dict[tuple[int, ...], Tensor]  # fp64 [VOCAB_SIZE] after every prefix shorter than NUM_STEPS


def laws(policy: SamplingPolicy, seed: int) -> Laws:
    generator = torch.Generator().manual_seed(seed)
    prefixes = [prefix for n in range(NUM_STEPS) for prefix in itertools.product(range(VOCAB_SIZE), repeat=n)]
    logits = torch.randn(len(prefixes), VOCAB_SIZE, generator=generator, dtype=torch.float64)
    return dict(zip(prefixes, policy.filter(logits / policy.temperature).softmax(-1), strict=True))


def toy(target_policy: SamplingPolicy, draft_policy: SamplingPolicy) -> tuple[Laws, Laws]:
    return laws(target_policy, seed=0), laws(draft_policy, seed=1)


def served_survival(target: Laws, draft: Laws, acceptance: str) -> Tensor:
    """[NUM_STEPS] chance to accept at least j + 1 drafts, summed over every sequence of drafts."""
    chances = torch.zeros(NUM_STEPS, dtype=torch.float64)
    accept = accept_block if acceptance == "block" else accept_one_by_one
    for drafts in itertools.product(range(VOCAB_SIZE), repeat=NUM_STEPS):
        p, q = ([law[drafts[:step]] for step in range(NUM_STEPS)] for law in (target, draft))
        if acceptance == "target_only":
            q = [torch.nn.functional.one_hot(law.argmax(), VOCAB_SIZE).double() for law in q]
        drafted = torch.stack([law[token] for law, token in zip(q, drafts, strict=True)]).prod()
        if drafted > 0:
            chances += drafted * accept(p, q, drafts)
    return chances


def accept_one_by_one(p: list[Tensor], q: list[Tensor], drafts: tuple[int, ...]) -> Tensor:
    """[NUM_STEPS] chance to accept at least j + 1 of these drafts, each with min(1, p / q)."""
    ratios = [(p[i][token] / q[i][token]).clamp(max=1) for i, token in enumerate(drafts)]
    return torch.stack(ratios).cumprod(0)


def accept_block(p: list[Tensor], q: list[Tensor], drafts: tuple[int, ...]) -> Tensor:
    """The same as a block: the longest prefix whose own coin, of chance h_i, says so (`kernels.block_reference`)."""
    weight, coins = torch.tensor(1.0, dtype=torch.float64), []
    for i, token in enumerate(drafts):
        weight = (weight * p[i][token] / q[i][token]).clamp(max=1)
        if i + 1 == NUM_STEPS:
            coins.append(weight)
        else:
            residual = (weight * p[i + 1] - q[i + 1]).clamp(min=0).sum()
            coins.append(residual / (residual + 1 - weight))
    # At least j + 1: not all of the coins from j on say no.
    return 1 - torch.stack([1 - coin for coin in coins]).flip(0).cumprod(0).flip(0)


def expectation_over_text(survival: expectation.Survival, target: Laws, draft: Laws) -> Tensor:
    """[NUM_STEPS] mean of the estimate over every text, each weighted by the target's probability of it."""
    texts = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=NUM_STEPS - 1)))
    prefixes = [[tuple(text[:step].tolist()) for text in texts] for step in range(NUM_STEPS)]
    p, q = (
        torch.stack([torch.stack([law[prefix] for prefix in step]) for step in prefixes]) for law in (target, draft)
    )
    weights = p[:-1].gather(-1, texts.T[..., None]).squeeze(-1).prod(0)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    return survival(p.log(), q.log(), texts.T) @ weights


@pytest.mark.parametrize(
    "policies", [(PLAIN, PLAIN), (TOP_P, TOP_P), (TOP_P, PLAIN), (TOP_K, TOP_K)], ids=["plain", "p", "stock p", "k"]
)
@pytest.mark.parametrize("acceptance", SURVIVAL)
def test_survival_is_unbiased(acceptance, policies) -> None:
    target, draft = toy(*policies)
    expected = expectation_over_text(SURVIVAL[acceptance], target, draft)
    torch.testing.assert_close(expected, served_survival(target, draft, acceptance))


def plain_product_of_alphas(log_p: Tensor, log_q: Tensor, token_ids: Tensor) -> Tensor:
    """Leaves out how the accepted tokens steer the chain (Eq. 12)."""
    return torch.minimum(log_p, log_q).exp().sum(-1).cumprod(0)


def forgotten_weight(log_p: Tensor, log_q: Tensor, token_ids: Tensor) -> Tensor:
    """Weighs p by min(1, c_j), not by the smallest so far: a step that drafts too much makes up for one before it."""
    log_ratio = (log_q - log_p)[:-1].gather(-1, token_ids[..., None]).squeeze(-1)
    log_c = torch.nn.functional.pad(log_ratio, (0, 0, 1, 0)).cumsum(0)[..., None]
    return torch.minimum(log_c + log_q, log_c.clamp(max=0) + log_p).exp().sum(-1)


@pytest.mark.parametrize(
    "fault, acceptance",
    [
        (plain_product_of_alphas, "rejection"),
        (rejection_sampling_survival, "block"),
        (forgotten_weight, "block"),
    ],
)
def test_biased_survival_would_be_caught(fault, acceptance) -> None:
    target, draft = toy(PLAIN, PLAIN)
    difference = expectation_over_text(fault, target, draft) - served_survival(target, draft, acceptance)
    assert difference[0].abs() < 1e-12
    assert difference[1:].abs().max() > 1e-3


def normalised(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(6).log_softmax(-1)


@pytest.mark.parametrize("survival", SURVIVAL.values())
def test_survival_range_and_shape(survival) -> None:
    log_p, log_q = normalised(4, 5, 7, seed=1), normalised(4, 5, 7, seed=2)
    chances = survival(log_p, log_q, torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(3)))
    assert chances.shape == (4, 5)
    assert ((chances >= 0) & (chances <= 1 + 1e-6)).all()
    assert (survival(log_p[:1], log_q[:1], torch.empty(0, 5, dtype=torch.long)) == chances[:1]).all()


@pytest.mark.parametrize("survival", [rejection_sampling_survival, block_survival])
def test_a_perfect_draft_is_always_accepted(survival) -> None:
    log_p = normalised(3, 2, 5, seed=2)
    torch.testing.assert_close(survival(log_p, log_p, torch.zeros(2, 2, dtype=torch.long)), torch.ones(3, 2))


@pytest.mark.parametrize("survival", [rejection_sampling_survival, block_survival])
@pytest.mark.parametrize("draft_has_it", [False, True])
def test_text_token_rounded_to_probability_0_gives_no_nan(survival, draft_has_it) -> None:
    log_p = torch.tensor([[[0.0, -torch.inf]], [[0.0, 0.0]]]).log_softmax(-1)
    log_q = torch.zeros(2, 1, 2).log_softmax(-1) if draft_has_it else log_p
    chances = survival(log_p, log_q, torch.tensor([[1]]))
    torch.testing.assert_close(chances, torch.tensor([[0.5 if draft_has_it else 1.0], [1.0]]))


def test_expected_survival_filters_target_and_draft_each_by_its_policy(monkeypatch) -> None:
    """A model whose hidden states are its logits; chains of one draft from slots 0 and 2."""
    target, draft = (torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    model = SimpleNamespace(device="cpu", get_output_embeddings=lambda: lambda hidden: hidden)
    monkeypatch.setattr(expectation, "target_hidden_states", lambda model, ids: (target[None], target[None]))
    monkeypatch.setattr(expectation, "rollout_hidden_states", lambda head, hidden, ids, num_steps: draft[None, None])
    head = SimpleNamespace(logits=lambda hidden: hidden)

    def survival(target_policy: SamplingPolicy, draft_policy: SamplingPolicy) -> Tensor:
        return expected_survival(model, head, range(5), [0, 2], 1, target_policy, draft_policy, "rejection")[0]

    plain, top_k = SamplingPolicy(0.5), SamplingPolicy(0.5, top_k=2)
    p, q = (target[[1, 3]] / 0.5).softmax(-1), (draft[[0, 2]] / 0.5).softmax(-1)
    torch.testing.assert_close(survival(plain, plain), torch.minimum(p, q).sum(-1))
    cut_p, cut_q = (x * (x >= x.topk(2).values[:, 1:]) / x.topk(2).values.sum(-1, keepdim=True) for x in (p, q))
    torch.testing.assert_close(survival(top_k, top_k), torch.minimum(cut_p, cut_q).sum(-1))
    torch.testing.assert_close(survival(top_k, plain), torch.minimum(cut_p, q).sum(-1))


@pytest.mark.parametrize("family", ["qwen3_next", "mimo"])
def test_expected_survival_is_what_evaluation_predicts(family) -> None:
    """`bebop eval` computes the first step's overlap on its own; MiMo's head is fed what the final norm reads."""
    model, head = small_target(family), small_head(family)
    model.get_output_embeddings().weight.data.copy_(head.lm_head)
    token_ids = torch.randint(96, (12,), generator=torch.Generator().manual_seed(5)).tolist()
    policy = SamplingPolicy(0.7)
    expected = expected_survival(model, head, token_ids, range(11), 1, policy, policy, "rejection")
    overlap = chain_statistics(model, head, Text(token_ids), 1, policy).rates["rejection_sampling"]
    torch.testing.assert_close(expected, overlap)
