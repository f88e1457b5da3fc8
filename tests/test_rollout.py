"""The rollout against the served sequence itself, built one anchor at a time."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from vllm_bebop.train.heads import MTPHead, head_tensors, load_head, new_head
from vllm_bebop.train.rollout import exact_acceptance, expected_acceptance, rollout, teacher_rows

NUM_STEPS = 4
SIZES = {
    "vocab_size": 63,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # far from uniform, so that a wrong key or position shows
}
EXPERTS = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
CONFIGS = {
    "qwen3_next": lambda: Qwen3NextConfig(**SIZES, **EXPERTS),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(**SIZES),
    "qwen3_5_moe_text": lambda: Qwen3_5MoeTextConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, **EXPERTS
    ),
}
WIRINGS = {
    "as the family has it": {},
    "hidden first": {"concat": ("hidden", "embedding")},
    "no first embedding": {"zero_embedding_at_0": True},
    "pre-norm recycled": {"hidden_recycled": "pre_norm"},
}


def random_head(config_name: str) -> MTPHead:
    torch.manual_seed(0)
    config = CONFIGS[config_name]()
    weights = torch.randn(2, config.vocab_size, config.hidden_size)
    head = MTPHead(config, *weights)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim == 1:  # norms, which start at zero
                parameter.normal_(std=0.3)
    return head


def random_text(head: MTPHead, batch: int = 2, seq_len: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    vocab_size, hidden_size = head.lm_head.shape
    hidden_states = torch.randn(batch, seq_len, hidden_size, generator=generator)
    return hidden_states, torch.randint(vocab_size, (batch, seq_len), generator=generator)


def served_chain(head: MTPHead, hidden_states: Tensor, token_ids: Tensor, anchor: int) -> Tensor:
    """Draft logits [NUM_STEPS, vocab_size] of one anchor of one text, with a key-value cache and a query at a time.

    Slot s <= anchor of step 0 holds (token s + 1, hidden state s); each later step appends one slot.
    """
    layer = copy.deepcopy(head.layers[0])
    layer.self_attn.config._attn_implementation = "eager"
    cache = DynamicCache()
    family = head.family

    def run(token: Tensor, hidden: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        embedding = head.embed_tokens[token]
        if family.zero_embedding_at_0 and slot == 0:
            embedding = torch.zeros_like(embedding)
        e, h = head.pre_fc_norm_embedding(embedding), head.pre_fc_norm_hidden(hidden)
        x = head.fc(torch.cat([e, h] if family.concat[0] == "embedding" else [h, e]))[None, None]
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


@pytest.mark.parametrize("config_name", CONFIGS)
@pytest.mark.parametrize("wiring", WIRINGS)
@torch.no_grad()
def test_rollout_equals_the_served_sequence(config_name: str, wiring: str) -> None:
    head = random_head(config_name)
    head.family = dataclasses.replace(head.family, **WIRINGS[wiring])
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
    head = random_head("qwen3_next")
    hidden_states, token_ids = random_text(head)
    positions = torch.arange(token_ids.shape[1] - 2).expand(len(token_ids), -1)
    rows = positions.shape[1]
    _, fed = head(token_ids[:, 1 : 1 + rows], hidden_states[:, :rows], positions, [])
    wrong, _ = head(token_ids[:, 2 : 2 + rows], fed, positions + 1, [])
    right = rollout(head, hidden_states, token_ids, 2)[1]
    assert (head.logits(wrong) - right).abs().max() > 0.1


def test_rollout_trains_the_head_and_nothing_else() -> None:
    head = random_head("qwen3_next")
    hidden_states, token_ids = random_text(head)
    rollout(head, hidden_states, token_ids, NUM_STEPS).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert not head.embed_tokens.requires_grad and not head.lm_head.requires_grad


def test_rollout_refuses_a_text_without_a_complete_chain() -> None:
    head = random_head("qwen3_next")
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


def tiny_model():
    from transformers import Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(**SIZES | {"layer_types": ["full_attention"] * 2}, **EXPERTS)
    return Qwen3NextForCausalLM(config).eval()


def test_exact_acceptance_shapes_and_range() -> None:
    model = tiny_model()
    for rates in exact_acceptance(model, new_head(model), torch.randint(63, (2, 9)), NUM_STEPS):
        assert rates.shape == (NUM_STEPS, 2, 9 - NUM_STEPS)
        assert ((rates >= 0) & (rates <= 1 + 1e-6)).all()


def test_load_head_round_trip_and_refusals(tmp_path) -> None:
    model = tiny_model()
    head = new_head(model)
    stored = {name: tensor.clone() for name, tensor in head_tensors(head).items()}
    assert "mtp.layers.0.mlp.experts.2.up_proj.weight" in stored
    copies = {"mtp.embed_tokens.weight": torch.zeros(1), "model.norm.weight": torch.zeros(1)}  # not the head's: unread

    save_file(stored | copies, tmp_path / "model.safetensors")
    loaded = load_head(tmp_path, model)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)

    faults = {
        "lacks mtp.fc.weight": {n: t for n, t in stored.items() if n != "mtp.fc.weight"},
        "does not belong": stored | {"mtp.layers.1.fc.weight": torch.zeros(2)},
        r"shape \(2, 2\)": stored | {"mtp.norm.weight": torch.zeros(2, 2)},
    }
    for message, tensors in faults.items():
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_head(tmp_path, model)


def test_head_holds_what_its_family_says() -> None:
    """Names and shapes of `head_tensors` are those of the released checkpoints, for every family."""
    for name in CONFIGS:
        head, config = random_head(name), CONFIGS[name]().to_dict()
        shapes = {tensor_name: tuple(tensor.shape) for tensor_name, tensor in head_tensors(head).items()}
        assert shapes == head.family.expected_tensors(config)
