"""A small head of every family, and what it is fed, the same in every process: for vLLM's module and for ours."""

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import vllm_bebop.train.target  # noqa: F401 (makes MiMo known)
from tests.support.tiny_heads import config, head
from vllm_bebop.families import recognise, text_config
from vllm_bebop.train.heads import MTPHead, head_tensors

NUM_STEPS = 3
ANCHORS = (0, 1, 6, 40)  # the first, and one beyond the first block of the key-value cache
SEQ_LEN = ANCHORS[-1] + NUM_STEPS + 1
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": config("qwen3_next"),
    "qwen3_5": config("qwen3_5"),
    "qwen3_5_moe": config("qwen3_5_moe"),
    "deepseek_v3": config(
        "deepseek_v3",
        **{"kv_lora_rank": 512, "qk_rope_head_dim": 64},  # the only sizes of vLLM's CPU kernel
        **{"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        max_position_embeddings=4096,
        rope_scaling={
            **{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 32},
            **{"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "glm4_moe": config("glm4_moe", n_routed_experts=8, routed_scaling_factor=2.5),
    "mimo": config("mimo", num_attention_heads=2, num_key_value_heads=1, head_dim=32),
}


def transformers_config(family: str) -> PretrainedConfig:
    """What Transformers makes of the family's config.json."""
    return CONFIG_MAPPING[CONFIGS[family]["model_type"]].from_dict(CONFIGS[family])


def weights(family: str) -> dict[str, Tensor]:
    """fp32 tensors of a complete head, scaled so that nothing saturates and every wrong input shows in its logits."""
    tensors = {name: 0.2 * tensor for name, tensor in head(CONFIGS[family], dtype=torch.float32).items()}
    if not recognise(CONFIGS[family]).norm_adds_one:
        tensors = {name: tensor + 1 if "norm" in name else tensor for name, tensor in tensors.items()}
    return tensors


def inputs(family: str) -> dict[str, Tensor]:
    """`token_ids` [SEQ_LEN], `hidden_states` [SEQ_LEN, hidden_size], and the target's `embed_tokens` and `lm_head`."""
    vocab_size, hidden_size = (text_config(CONFIGS[family])[key] for key in ("vocab_size", "hidden_size"))
    generator = torch.Generator().manual_seed(1)
    return {
        "token_ids": torch.randint(vocab_size, (SEQ_LEN,), generator=generator),
        "hidden_states": torch.randn(SEQ_LEN, hidden_size, generator=generator),
        "embed_tokens": torch.randn(vocab_size, hidden_size, generator=generator),
        "lm_head": 0.2 * torch.randn(vocab_size, hidden_size, generator=generator),
    }


def small_head(family: str) -> MTPHead:
    """Our head of this family with these weights, in fp32."""
    target = inputs(family)
    head = MTPHead(transformers_config(family), target["embed_tokens"], target["lm_head"])
    tensors, given = head_tensors(head), weights(family)
    assert tensors.keys() == given.keys()
    for name, tensor in given.items():
        tensors[name].copy_(tensor)
    return head


def small_target(family: str) -> PreTrainedModel:
    """A random target that the family's small head belongs to, in fp32."""
    torch.manual_seed(0)
    config = transformers_config(family).get_text_config()
    config.initializer_range = 0.2  # far from uniform
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # which start as the identity
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model
