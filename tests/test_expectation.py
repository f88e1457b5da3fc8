"""The offline expectation against an enumeration of the served process: each draft drawn, accepted or rejected."""

import itertools

import pytest
import torch
from torch import Tensor

from vllm_bebop.bench.expectation import rejection_sampling_survival, target_only_survival

VOCAB_SIZE, NUM_STEPS = 3, 3
TEMPERATURE = 0.7


@pytest.fixture
def toy() -> tuple[dict[tuple[int, ...], Tensor], dict[tuple[int, ...], Tensor]]:
    """Target and draft logits [VOCAB_SIZE] after every prefix shorter than NUM_STEPS."""
    generator = torch.Generator().manual_seed(0)
    prefixes = [prefix for n in range(NUM_STEPS) for prefix in itertools.product(range(VOCAB_SIZE), repeat=n)]
    target, draft = ({prefix: torch.randn(VOCAB_SIZE, generator=generator) for prefix in prefixes} for _ in range(2))
    return target, draft


def served_survival(target, draft, greedy: bool) -> Tensor:
    """[NUM_STEPS] chance to accept at least j + 1 drafts, summed over every sequence of drafts."""
    chances = torch.zeros(NUM_STEPS)
    for drafts in itertools.product(range(VOCAB_SIZE), repeat=NUM_STEPS):
        chance = torch.tensor(1.0)
        for step in range(NUM_STEPS):
            p = (target[drafts[:step]] / TEMPERATURE).softmax(-1)
            q = (draft[drafts[:step]] / TEMPERATURE).softmax(-1)
            if greedy:
                q = torch.nn.functional.one_hot(q.argmax(), VOCAB_SIZE).float()
            token = drafts[step]
            chance = chance * torch.minimum(p[token], q[token])  # drafted with q, then accepted with min(1, p / q)
            # Later drafts of this sequence share the prefix: count it once.
            chances[step] += chance / VOCAB_SIZE ** (NUM_STEPS - 1 - step)
    return chances


def expectation_over_text(survival, target, draft) -> Tensor:
    """[NUM_STEPS] mean of the estimate over every text, each weighted by the target's probability of it."""
    texts = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=NUM_STEPS - 1)))
    prefixes = [[tuple(text[:step].tolist()) for text in texts] for step in range(NUM_STEPS)]
    target_logits = torch.stack([torch.stack([target[prefix] for prefix in step]) for step in prefixes])
    draft_logits = torch.stack([torch.stack([draft[prefix] for prefix in step]) for step in prefixes])
    p = (target_logits[:-1] / TEMPERATURE).softmax(-1)
    weights = p.gather(-1, texts.T[..., None]).squeeze(-1).prod(0)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    return survival(target_logits, draft_logits, texts.T, TEMPERATURE) @ weights


@pytest.mark.parametrize("survival, greedy", [(rejection_sampling_survival, False), (target_only_survival, True)])
def test_survival_is_unbiased(toy, survival, greedy) -> None:
    torch.testing.assert_close(expectation_over_text(survival, *toy), served_survival(*toy, greedy))


def test_plain_product_of_alphas_would_be_caught(toy) -> None:
    """The planted fault: leaving out how the accepted tokens steer the chain is visibly biased."""

    def plain(target_logits: Tensor, draft_logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
        p, q = ((logits / temperature).softmax(-1) for logits in (target_logits, draft_logits))
        return torch.minimum(p, q).sum(-1).cumprod(0)

    difference = expectation_over_text(plain, *toy) - served_survival(*toy, greedy=False)
    assert difference[0].abs() < 1e-5
    assert difference[1:].abs().max() > 1e-3


@pytest.mark.parametrize("survival", [rejection_sampling_survival, target_only_survival])
def test_survival_range_and_shape(survival) -> None:
    generator = torch.Generator().manual_seed(1)
    target, draft = torch.randn(2, 4, 5, 7, generator=generator) * 3
    chances = survival(target, draft, torch.randint(7, (3, 5), generator=generator), 0.5)
    assert chances.shape == (4, 5)
    assert ((chances >= 0) & (chances <= 1 + 1e-6)).all()
    assert (survival(target[:1], draft[:1], torch.empty(0, 5, dtype=torch.long), 0.5) == chances[:1]).all()


def test_a_perfect_draft_is_always_accepted() -> None:
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2))
    chances = rejection_sampling_survival(logits, logits, torch.zeros(2, 2, dtype=torch.long), 1.0)
    torch.testing.assert_close(chances, torch.ones(3, 2))


def test_masked_tokens_give_no_nan() -> None:
    target, draft = torch.tensor([[[0.0, -torch.inf]], [[0.0, 0.0]]]), torch.tensor([[[0.0, -torch.inf]], [[0.0, 0.0]]])
    chances = rejection_sampling_survival(target, draft, torch.tensor([[1]]), 1.0)
    torch.testing.assert_close(chances, torch.ones(2, 1))
