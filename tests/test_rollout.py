"""The rollout against the served sequence itself, built one anchor at a time."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from tests.support.parity_inputs import CONFIGS, small_head, small_target
from vllm_bebop.train import rollout as rollout_module
from vllm_bebop.train.chain_attention import Packing, StepKeys, chain_attention
from vllm_bebop.train.heads import MTPHead
from vllm_bebop.train.rollout import complete_chains, rollout, rollout_hidden_states, target_hidden_states

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


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes():
            self.numel = max(self.numel, out.numel())
        return out


@contextmanager
def tensors_kept() -> Iterator[list[int]]:
    """Elements of every tensor that autograd keeps outside of what it computes again."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


ROWS = 24
PACKING = Packing.of(torch.tensor([[4] * 10 + [2] * 14, [0] * 9 + [1] * 8 + [-1] * 7]))


def chain_of_attention(scores_at_once: int, packing: Packing | None) -> tuple[Tensor, tuple[Tensor, ...], int, int]:
    """Outputs of three steps, their gradients, and the most elements of any tensor kept for those, and of any made."""
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(3, 2, 4, ROWS, 8, generator=generator, requires_grad=True)
    keys_values = torch.randn(3, 2, 2, 2, ROWS, 8, generator=generator, requires_grad=True)
    keys, outputs = StepKeys(), []
    with Largest() as largest, tensors_kept() as kept:
        for query, (key, value) in zip(queries, keys_values, strict=True):
            options = {"scaling": 0.3, "keys": keys, "scores_at_once": scores_at_once}
            outputs.append(chain_attention(torch.nn.Identity(), query, key, value, packing, **options)[0])
        made = largest.numel
    out = torch.stack(outputs)
    return out, torch.autograd.grad(out.sin().sum(), (queries, keys_values)), max(kept), made


def test_packing_says_where_documents_begin() -> None:
    assert PACKING.starts.tolist() == [[0] * 10 + [10] * 14, [0] * 9 + [9] * 8 + [17] * 7]
    assert PACKING.lowest == [0] * 10 + [9] * 7 + [10] * 7


@pytest.mark.parametrize("packing", [None, PACKING])
def test_chain_attention_in_parts_equals_all_at_once_and_keeps_no_scores(packing: Packing | None) -> None:
    all_scores = 2 * 4 * ROWS * ROWS
    whole, gradients, kept, made = chain_of_attention(all_scores, packing)
    assert min(kept, made) >= all_scores
    in_parts, gradients_in_parts, kept, made = chain_of_attention(7 * all_scores // ROWS, packing)
    assert kept < all_scores / 2
    assert made < all_scores / 2  # no scores of all rows, nor a mask
    torch.testing.assert_close(in_parts, whole)
    torch.testing.assert_close(gradients_in_parts, gradients, rtol=1e-4, atol=1e-5)


def test_chain_attention_sees_no_other_document() -> None:
    packed, alone = chain_of_attention(1 << 20, PACKING)[0], chain_of_attention(1 << 20, None)[0]
    torch.testing.assert_close(packed[:, :, :9], alone[:, :, :9])  # the first documents
    assert (packed[:, 0, 10:] - alone[:, 0, 10:]).abs().amax(-1).min() > 0.01


def test_rollout_holds_no_intermediate_results_of_its_steps() -> None:
    """They are computed again, step by step; the gradients are those of steps that keep everything."""
    head = small_head("qwen3_next")
    hidden_states, token_ids = random_text(head)
    gradients = []
    for keeps_all in (False, True):
        head.zero_grad()
        with pytest.MonkeyPatch.context() as patch, tensors_kept() as kept:
            if keeps_all:
                patch.setattr(rollout_module, "checkpoint", lambda step, *arguments, **_: step(*arguments))
            drafted = rollout_hidden_states(head, hidden_states, token_ids, NUM_STEPS)
        assert (sum(kept) > 10 * drafted.numel()) == keeps_all
        drafted.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
