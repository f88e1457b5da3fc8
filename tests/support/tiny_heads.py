"""A tiny config.json and random head tensors for every supported family."""

import copy
from typing import Any

import torch

from vllm_bebop.families import recognise

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_QWEN = _COMMON | {"head_dim": 32, "layer_types": ["full_attention"] * 2, "attn_output_gate": True}
_QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
_DEEPSEEK_MOE = {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": _QWEN
    | _QWEN_MOE
    | {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "decoder_sparse_step": 1},
    "qwen3_5": {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": _QWEN | {"model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1},
    },
    "qwen3_5_text": _QWEN
    | {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "mtp_num_hidden_layers": 1},
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": _QWEN | _QWEN_MOE | {"model_type": "qwen3_5_moe_text", "mtp_num_hidden_layers": 1},
    },
    "deepseek_v3": _COMMON
    | _DEEPSEEK_MOE
    | {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "glm4_moe": _COMMON
    | _DEEPSEEK_MOE
    | {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "mimo": _COMMON
    | {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1, "head_dim": 16},
}


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A fresh config.json with some keys changed, in the text config where there is one; None removes a key."""
    result = copy.deepcopy(CONFIGS[model_type])
    text = result.get("text_config", result)
    for key, value in changes.items():
        if value is None:
            text.pop(key)
        else:
            text[key] = value
    return result


def head(
    config: dict[str, Any], layout: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Random tensors of a complete head."""
    generator = torch.Generator().manual_seed(0)
    expected = recognise(config).expected_tensors(config, layout)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in expected.items()}
