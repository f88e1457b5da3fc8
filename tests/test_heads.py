"""Heads of every family: their tensors, where they come from, and in which dtype they compute."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5TextConfig

from tests.support.parity_inputs import CONFIGS, inputs, small_head, small_target, transformers_config
from vllm_bebop.families import PER_EXPERT, STACKED, FamilyError
from vllm_bebop.tensor_files import CheckpointError
from vllm_bebop.train.heads import MTPHead, head_tensors, initial_head, load_head, new_head
from vllm_bebop.train.rollout import rollout, rollout_hidden_states, target_hidden_states

FULL_ATTENTION_LAST = ["qwen3_next", "deepseek_v3", "glm4_moe", "mimo"]


@pytest.mark.parametrize("family", CONFIGS)
def test_head_tensors_are_those_of_the_released_checkpoints(family: str) -> None:
    head = small_head(family)
    for layout in head.family.expert_layouts or (None,):
        shapes = {name: tuple(tensor.shape) for name, tensor in head_tensors(head, layout).items()}
        assert shapes == head.family.expected_tensors(CONFIGS[family], layout)
    assert head_tensors(head).keys() == head_tensors(head, (head.family.expert_layouts or (None,))[0]).keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_head_trains_every_tensor_but_the_routers_correction(family: str) -> None:
    """Which is stored with the head, and keeps fp32 in a head of any dtype."""
    head = small_head(family)
    parameters = {parameter.data_ptr() for parameter in head.parameters()}
    held_back = [name for name, tensor in head.state_dict().items() if tensor.data_ptr() not in parameters]
    corrected = family in ("deepseek_v3", "glm4_moe")
    assert held_back == ["layer.mlp.gate.e_score_correction_bias"] * corrected
    target = inputs(family)
    half = MTPHead(transformers_config(family), target["embed_tokens"], target["lm_head"], torch.bfloat16)
    for name, tensor in head_tensors(half).items():
        assert tensor.dtype == (torch.float32 if "correction" in name else torch.bfloat16)


@pytest.mark.parametrize("family", CONFIGS)
def test_head_of_fp32_on_a_bf16_target(family: str) -> None:
    """Master weights: the head computes in fp32 from the target's bf16, and in bf16 under autocast."""
    head, fed = small_head(family), inputs(family)
    head.embed_tokens, head.lm_head = head.embed_tokens.bfloat16(), head.lm_head.bfloat16()
    arguments = fed["hidden_states"][None, :12].bfloat16(), fed["token_ids"][None, :12], 3
    drafted = rollout_hidden_states(head, *arguments)
    assert drafted.dtype == torch.float32 and rollout(head, *arguments).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        faster = rollout_hidden_states(head, *arguments)
    error = (faster - drafted).norm(dim=-1) / drafted.norm(dim=-1)
    assert 0 < error.median() < 0.05  # the median: a row whose experts change by rounding is far off
    faster.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in head.parameters()
    )


def test_head_refuses_what_it_cannot_train() -> None:
    target = inputs("deepseek_v3")
    weights = target["embed_tokens"], target["lm_head"]
    config = transformers_config("deepseek_v3")
    config.num_nextn_predict_layers = 2
    with pytest.raises(FamilyError, match="one MTP layer .* asks for 2"):
        MTPHead(config, *weights)
    config = transformers_config("deepseek_v3")
    config.scoring_func = "softmax"
    with pytest.raises(FamilyError, match="scoring_func is 'softmax', only 'sigmoid'"):
        MTPHead(config, *weights)
    config = transformers_config("mimo")
    config.model_type = "qwen2"
    with pytest.raises(FamilyError, match="no MTP head for model_type 'qwen2'; known: qwen3_next"):
        MTPHead(config, *weights)


@pytest.mark.parametrize("family", CONFIGS)
def test_load_head_reads_what_head_tensors_gives(family: str, tmp_path: Path) -> None:
    """In every layout that vLLM reads, beside what is left unread: the target's own, and scales of the KV cache."""
    head, model = small_head(family), small_target(family)
    unread = {head.prefix + name: torch.zeros(1) for name in (*head.family.copies, "self_attn.k_scale")}
    others = unread | {"model.norm.weight": torch.zeros(1), "model.layers.0.mlp.gate.weight": torch.zeros(1)}
    for layout in head.family.expert_layouts or (None,):
        stored = {name: tensor.contiguous() for name, tensor in head_tensors(head, layout).items()}
        save_file(stored | others, tmp_path / "model.safetensors")
        loaded = load_head(tmp_path, model)
        for name, tensor in head.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_load_head_refuses_an_incomplete_or_foreign_head(tmp_path: Path) -> None:
    model = small_target("qwen3_next")
    stored = {name: tensor.clone() for name, tensor in head_tensors(new_head(model), PER_EXPERT).items()}
    stacked = {name: tensor.clone() for name, tensor in head_tensors(new_head(model), STACKED).items()}
    faults = {
        "lacks mtp.fc.weight": {n: t for n, t in stored.items() if n != "mtp.fc.weight"},
        "lacks mtp.layers.0.mlp.experts.down_proj": {n: t for n, t in stacked.items() if "experts.down" not in n},
        "lacks mtp.layers.0.mlp.experts.3.up_proj.weight": {n: t for n, t in stored.items() if "3.up" not in n},
        "does not belong": stored | {"mtp.layers.1.fc.weight": torch.zeros(2)},
        r"shape \(2, 2\)": stored | {"mtp.norm.weight": torch.zeros(2, 2)},
        "is quantised": stored | {"mtp.fc.weight": stored["mtp.fc.weight"].to(torch.float8_e4m3fn)},
    }
    for message, tensors in faults.items():
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_head(tmp_path, model)


def test_initial_head_is_the_checkpoints_own_where_there_is_one(tmp_path: Path) -> None:
    model, own = small_target("glm4_moe"), small_head("glm4_moe")
    save_file({name: tensor.contiguous() for name, tensor in head_tensors(own).items()}, tmp_path / "model.safetensors")
    head = initial_head(tmp_path, model)
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in own.state_dict().items())
    half = {name: tensor.contiguous() for name, tensor in head_tensors(own).items() if "eh_proj" not in name}
    save_file(half, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.eh_proj\.weight"):
        initial_head(tmp_path, model)


def without_layer_output(head: MTPHead) -> None:
    for name, tensor in head.layer.state_dict().items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()


@pytest.mark.parametrize("family", FULL_ATTENTION_LAST)
@torch.no_grad()
def test_initial_head_passes_the_hidden_state_through_a_copy_of_the_last_layer(family: str, tmp_path: Path) -> None:
    """Where the layer adds nothing, the head says at step 0 what the target has said."""
    model = small_target(family)
    save_file({"model.norm.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    head = initial_head(tmp_path, model)
    last = model.get_decoder().layers[-1].state_dict()
    assert head.layer.state_dict().keys() == last.keys()
    assert all(torch.equal(tensor, last[name]) for name, tensor in head.layer.state_dict().items())

    token_ids = torch.randint(96, (2, 9))
    fed, teacher = target_hidden_states(model, token_ids)
    without_layer_output(head)
    drafted = rollout_hidden_states(head, fed, token_ids, 1)[0]
    relative = (drafted - teacher[:, :-1]).norm() / teacher.norm()
    assert relative < 0.02
    head.norm.weight.zero_()  # the planted fault: a norm that is not the target's
    assert (rollout_hidden_states(head, fed, token_ids, 1)[0] - teacher[:, :-1]).norm() / teacher.norm() > 0.2


def hybrid_target() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "head_dim": 32, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "num_hidden_layers": 3},
        layer_types=["full_attention", "full_attention", "linear_attention"],
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16},
        linear_value_head_dim=16,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_initial_head_is_not_made_of_a_quantised_layer(tmp_path: Path) -> None:
    save_file({"unrelated": torch.zeros(1)}, tmp_path / "model.safetensors")
    model = small_target("mimo")
    weight = model.model.layers[-1].self_attn.o_proj.weight
    weight.requires_grad_(False).data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="its last layer, .*, is quantised: give a draft"):
        initial_head(tmp_path, model)


def test_initial_head_copies_a_full_attention_layer(tmp_path: Path) -> None:
    model = hybrid_target()
    save_file({"model.norm.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    head = initial_head(tmp_path, model)
    copied: dict[str, Tensor] = model.get_decoder().layers[1].state_dict()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in head.layer.state_dict().items())
