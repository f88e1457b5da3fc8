"""The rollout against the served sequence itself, built one anchor at a time."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.support.parity_inputs import CONFIGS, small_head, small_target
from vllm_bebop.train.chain_attention import StepKeys, chain_attention
from vllm_bebop.train.heads import MTPHead, new_head
from vllm_bebop.train.rollout import (
    complete_chains,
    exact_acceptance,
    expected_acceptance,
    rollout,
    target_hidden_states,
    teacher_rows,
)

NUM_STEPS = 4


def random_text(head: MTPHead, batch: int = 2, seq_len: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    vocab_size, hidden_size = head.lm_head.shape
    hidden_states = torch.randn(batch, seq_len, hidden_size, generator=generator)
    return hidden_states, torch.randint(vocab_size, (batch, seq_len), generator=generator)


def served_chain(head: MTPHead, hidden_states: Tensor, token_ids: Tensor, anchor: int) -> Tensor:
    """Draft logits [NUM_STEPS, vocab_size] of one anchor of one text, with a key-value cache and a query at a time.

    Slot s <= anchor of step 0 holds (token s + 1, hidden state s); each later step appends one slot.
    """
    layer = copy.deepcopy(head.layer)
    layer.self_attn.config._attn_implementation = "eager"
    cache = DynamicCache()
    family = head.family

    def run(token: Tensor, hidden: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        embedding = head.embed_tokens[token]
        if family.zero_embedding_at_0 and slot == 0:
            embedding = torch.zeros_like(embedding)
        e, h = head.norm_embedding(embedding), head.norm_hidden(hidden)
        x = head.project(torch.cat([e, h] if family.concat[0] == "embedding" else [h, e]))[None, None]
        rotary = head.rotary(x, torch.tensor([[slot]]))
        out = layer(x, position_embeddings=rotary, attention_mask=None, past_key_values=cache)[0, 0]
        normed = head.norm(out)
        return normed, normed if family.hidden_recycled == "post_norm" else out

    for slot in range(anchor + 1):
        normed, fed = run(token_ids[slot + 1], hidden_states[slot], slot)
    logits = [normed @ head.lm_head.T]
    for step in range(1, NUM_STEPS):
        normed, fed = run(token_ids[anchor + 1 + step], fed, anchor + step)
        logits.append(normed @ head.lm_head.T)
    return torch.stack(logits)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_rollout_equals_the_served_sequence(family: str) -> None:
    head = small_head(family)
    hidden_states, token_ids = random_text(head)
    logits = rollout(head, hidden_states, token_ids, NUM_STEPS)
    batch, seq_len = token_ids.shape
    assert logits.shape == (NUM_STEPS, batch, seq_len - NUM_STEPS, head.lm_head.shape[0])
    for entry in range(batch):
        for anchor in range(seq_len - NUM_STEPS):
            served = served_chain(head, hidden_states[entry], token_ids[entry], anchor)
            torch.testing.assert_close(logits[:, entry, anchor], served, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rollout_refuses_keys_that_serving_does_not_have() -> None:
    """The planted fault: step 1 attending to step 1 of other anchors, as most trainers have it, must show."""
    head = small_head("qwen3_next")
    hidden_states, token_ids = random_text(head)
    positions = torch.arange(token_ids.shape[1] - 2).expand(len(token_ids), -1)
    rows = positions.shape[1]
    _, fed = head(token_ids[:, 1 : 1 + rows], hidden_states[:, :rows], positions, [])
    wrong, _ = head(token_ids[:, 2 : 2 + rows], fed, positions + 1, [])
    right = rollout(head, hidden_states, token_ids, 2)[1]
    assert (head.logits(wrong) - right).abs().max() > 0.1


def test_rollout_trains_the_head_and_nothing_else() -> None:
    head = small_head("qwen3_next")
    hidden_states, token_ids = random_text(head)
    rollout(head, hidden_states, token_ids, NUM_STEPS).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert not head.embed_tokens.requires_grad and not head.lm_head.requires_grad


def test_rollout_refuses_a_text_without_a_complete_chain() -> None:
    head = small_head("qwen3_next")
    with pytest.raises(ValueError, match="no complete chain"):
        rollout(head, *random_text(head, seq_len=NUM_STEPS), NUM_STEPS)


def test_teacher_rows_are_the_tokens_drafted() -> None:
    """Row t, step j drafts what the target predicts at t + 1 + j."""
    target = torch.arange(9).expand(2, 9)[..., None]
    rows = teacher_rows(target, 3)
    assert rows.shape == (3, 2, 6, 1)
    assert all(rows[j, b, t] == t + 1 + j for j in range(3) for b in range(2) for t in range(6))


def test_expected_acceptance_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.3])
    acceptance = expected_acceptance(p.log(), q.log())
    torch.testing.assert_close(acceptance.rejection_sampling, torch.tensor(0.1 + 0.3 + 0.2))
    torch.testing.assert_close(acceptance.target_only, torch.tensor(0.3))
    hot = expected_acceptance(p.log() * 2, q.log() * 2, temperature=2.0)
    torch.testing.assert_close(hot, acceptance)


@pytest.mark.parametrize("family", ["qwen3_next", "mimo"])
def test_exact_acceptance_feeds_what_the_family_is_fed(family: str) -> None:
    model = small_target(family)
    head, token_ids = new_head(model), torch.randint(96, (2, 9))
    rates = exact_acceptance(model, head, token_ids, NUM_STEPS)
    for rate in rates:
        assert rate.shape == (NUM_STEPS, 2, 9 - NUM_STEPS)
        assert ((rate >= 0) & (rate <= 1 + 1e-6)).all()
    with torch.no_grad():
        fed, teacher = target_hidden_states(model, token_ids)
        target_logits = teacher_rows(model(token_ids).logits, NUM_STEPS)
        expected = expected_acceptance(target_logits, rollout(head, fed, token_ids, NUM_STEPS))
    torch.testing.assert_close(rates, expected)


@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3", "glm4_moe", "mimo"])
@torch.no_grad()
def test_target_hidden_states_are_on_the_right_side_of_the_final_norm(family: str) -> None:
    """lm_head reads the teacher; MiMo's head is fed what the final norm reads, the others' the teacher itself."""
    model, token_ids = small_target(family), torch.randint(96, (2, 9))
    fed, teacher = target_hidden_states(model, token_ids)
    torch.testing.assert_close(model.get_output_embeddings()(teacher), model(token_ids).logits)
    if family == "mimo":
        assert not torch.allclose(fed, teacher, atol=0.1)
        torch.testing.assert_close(model.get_decoder().norm(fed), teacher)
    else:
        assert fed is teacher
    longer = torch.cat([token_ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    torch.testing.assert_close(target_hidden_states(model, longer)[0][:, :9], fed)  # padding on the right


DOCUMENTS = torch.tensor([[3] * 6 + [0] * 7 + [-1] * 3, [5] * 16])


def packed_text(head: MTPHead) -> tuple[Tensor, Tensor]:
    return random_text(head, *DOCUMENTS.shape)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_rollout_of_packed_documents_equals_each_alone(family: str) -> None:
    head = small_head(family)
    hidden_states, token_ids = packed_text(head)
    packed = rollout(head, hidden_states, token_ids, NUM_STEPS, DOCUMENTS)
    unpacked = rollout(head, hidden_states, token_ids, NUM_STEPS)  # the planted fault: nothing is isolated
    complete = complete_chains(DOCUMENTS, NUM_STEPS)
    for entry, document in [(0, 3), (0, 0), (1, 5)]:
        inside = DOCUMENTS[entry] == document
        alone = rollout(head, hidden_states[entry, inside][None], token_ids[entry, inside][None], NUM_STEPS)[:, 0]
        rows = complete[entry] & inside[: complete.shape[1]]
        torch.testing.assert_close(packed[:, entry, rows], alone, rtol=1e-5, atol=5e-5)
        if document == 0:  # the only one that does not start at the first token
            assert (unpacked[:, entry, rows] - alone).abs().amax(-1).min() > 0.01


def test_rollout_of_padding_is_finite_and_without_influence() -> None:
    """Forward and backward; what the padding holds changes nothing."""
    head = small_head("qwen3_next")
    hidden_states, token_ids = packed_text(head)
    complete = complete_chains(DOCUMENTS, NUM_STEPS)
    gradients = []
    for filling in (hidden_states, torch.zeros_like(hidden_states)):
        filled = torch.where(DOCUMENTS[..., None] < 0, filling, hidden_states)
        drafted = rollout(head, filled, token_ids, NUM_STEPS, DOCUMENTS)
        assert drafted.isfinite().all()
        head.zero_grad()
        drafted[:, complete].square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_complete_chains_stay_inside_a_document() -> None:
    complete = complete_chains(DOCUMENTS, 4)
    assert complete.tolist() == [[True] * 2 + [False] * 4 + [True] * 3 + [False] * 3, [True] * 12]


def chain_of_attention(scores_at_once: int) -> tuple[Tensor, tuple[Tensor, ...], int]:
    """Outputs of three steps over 24 rows, their gradients, and the most elements of any tensor kept for those."""
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(3, 2, 4, 24, 8, generator=generator, requires_grad=True)
    keys_values = torch.randn(3, 2, 2, 2, 24, 8, generator=generator, requires_grad=True)
    mask = torch.ones(24, 24, dtype=torch.bool).tril().expand(2, 1, 24, 24)
    keys, outputs, kept = StepKeys(), [], []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for query, (key, value) in zip(queries, keys_values, strict=True):
            options = {"scaling": 0.3, "keys": keys, "scores_at_once": scores_at_once}
            outputs.append(chain_attention(torch.nn.Identity(), query, key, value, mask, **options)[0])
    out = torch.stack(outputs)
    return out, torch.autograd.grad(out.sin().sum(), (queries, keys_values)), max(kept)


def test_chain_attention_in_parts_equals_all_at_once_and_keeps_no_scores() -> None:
    all_scores = 2 * 4 * 24 * 24
    whole, gradients, kept = chain_of_attention(scores_at_once=all_scores)
    assert kept >= all_scores
    in_parts, gradients_in_parts, kept = chain_of_attention(scores_at_once=7 * all_scores // 24)
    assert kept < all_scores / 2
    torch.testing.assert_close(in_parts, whole)
    torch.testing.assert_close(gradients_in_parts, gradients, rtol=1e-4, atol=1e-5)
