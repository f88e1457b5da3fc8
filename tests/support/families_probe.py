"""Serves a random model of another family with bebop: `python -m tests.support.families_probe FAMILY DIRECTORY`.

A process of its own, because Qwen3.5 needs help to be imported without a GPU (tests/cpu_support). Prints one JSON line:
greedy tokens without speculation and with bebop, seeded tokens served twice, and what was accepted.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.engines import BEBOP, accepted_per_position, engine, token_ids
from vllm_bebop.families import recognise

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}


def _glm4_moe() -> torch.nn.Module:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(**_SIZES, **experts, first_k_dense_replace=1, use_qk_norm=True, num_nextn_predict_layers=1)
    )


def _qwen3_5() -> torch.nn.Module:
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_SIZES, layer_types=["full_attention"] * 2, mtp_num_hidden_layers=1))


FAMILIES = {"glm4_moe": _glm4_moe, "qwen3_5": _qwen3_5}


def write_checkpoint(family: str, directory: Path) -> None:
    """A random target of this family with a random head under its native names."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    table = recognise(config)
    for name, shape in table.expected_tensors(config).items():
        is_norm = len(shape) == 1
        tensors[name] = torch.full(shape, 0.0 if table.norm_adds_one else 1.0) if is_norm else 0.15 * torch.randn(shape)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def main() -> None:
    from vllm import SamplingParams

    family, directory = sys.argv[1], Path(sys.argv[2])
    write_checkpoint(family, directory)
    prompts = [{"prompt_token_ids": [i + 1, 2, 3, 4]} for i in range(6)]
    greedy, seeded = (
        SamplingParams(temperature=t, seed=5, max_tokens=24, ignore_eos=True, detokenize=False) for t in (0.0, 1.0)
    )
    result = {}
    options = {"model": str(directory), "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}
    with engine(**options) as llm:
        result["stock_greedy"] = token_ids(llm.generate(prompts, greedy, use_tqdm=False))
    with engine(BEBOP, **options) as llm:
        result["greedy"] = token_ids(llm.generate(prompts, greedy, use_tqdm=False))
        result["seeded"], result["again"] = (token_ids(llm.generate(prompts, seeded, use_tqdm=False)) for _ in range(2))
        result["rounds"], result["accepted"] = accepted_per_position(llm)
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
