"""Build each family's head in vLLM, load random tensors under our names, and report what vLLM makes of them.

    python -m tests.support.vllm_heads qwen3_next glm4_moe

Prints one JSON object: family -> [parameters left unwritten, whether vLLM's elements are exactly ours, whether they
are still with one element changed]. A process of its own, because vLLM's distributed state is global; several, with
RANK, WORLD_SIZE and RENDEZVOUS in the environment, share each head as tensor-parallel ranks.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Only the model classes are wanted: no plugin, no network.
os.environ |= {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.support import parity_inputs  # noqa: F401 (makes MiMo's config known)
from tests.support.tiny_heads import config, head
from vllm_bebop.engine.draft_shards import checksum_over_ranks
from vllm_bebop.tensor_files import add_checksums, element_checksum

RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
FROM_TARGET = ("embed_tokens", "lm_head", "shared_head.head")


def build_head(config: dict[str, Any], directory: Path, dtype: torch.dtype, **engine: Any) -> tuple[Any, VllmConfig]:
    """vLLM's MTP module for a model of this config, its weights not loaded, and the configuration it is built with."""
    (directory / "config.json").write_text(json.dumps(config))
    speculation = {"method": "mtp", "model": str(directory), "num_speculative_tokens": 1}
    vllm_config = EngineArgs(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=64,
        speculative_config=speculation,
        tensor_parallel_size=WORLD_SIZE,
        **engine,
    ).create_engine_config()
    with set_current_vllm_config(vllm_config):
        meeting = os.environ.get("RENDEZVOUS", directory / "rendezvous")
        init_distributed_environment(WORLD_SIZE, RANK, f"file://{meeting}", RANK, "gloo")
        ensure_model_parallel_initialized(WORLD_SIZE, 1)
    with set_default_torch_dtype(dtype):
        model = initialize_model(vllm_config, model_config=vllm_config.speculative_config.draft_model_config)
    return model, vllm_config


def load_head(family: str, directory: Path) -> tuple[list[str], bool, bool]:
    # With fewer key-value heads than ranks: two ranks hold the same one.
    sizes = config(family, num_key_value_heads=1) if WORLD_SIZE > 1 and family != "deepseek_v3" else config(family)
    model, _ = build_head(sizes, directory, torch.bfloat16)
    parameters = {n: p for n, p in model.named_parameters() if not any(part in n for part in FROM_TARGET)}
    for parameter in parameters.values():
        parameter.data.fill_(float("nan"))
    tensors = head(sizes)
    model.load_weights(iter(tensors.items()))
    unwritten = [name for name, parameter in parameters.items() if parameter.isnan().any()]
    ours = add_checksums(*(element_checksum(tensor, torch.bfloat16) for tensor in tensors.values()))
    equal = checksum_over_ranks(model, parameters, torch.bfloat16) == ours
    if RANK == WORLD_SIZE - 1:
        next(p for n, p in parameters.items() if n.endswith("o_proj.weight")).data[0, 0] += 1
    return unwritten, equal, checksum_over_ranks(model, parameters, torch.bfloat16) == ours


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        report = {}
        for family in sys.argv[1:]:
            (place := Path(directory) / family).mkdir()
            report[family] = load_head(family, place)
    print(json.dumps(report))
