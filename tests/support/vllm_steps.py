"""Run each family's head in vLLM, with its own attention and key-value cache, over random tokens and hidden states.

    python -m tests.support.vllm_steps logits.safetensors qwen3_next glm4_moe

Writes one tensor per family, [len(ANCHORS), NUM_STEPS, vocab_size]: the logits of each anchor's draft steps, called
as vLLM's proposer calls them (v1/spec_decode/llm_base_proposer.py, `propose`). A process of its own, because vLLM's
distributed state is global.
"""

import os
import sys
import tempfile
from pathlib import Path

# Only the model classes are wanted: no plugin, no network.
os.environ |= {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.support.parity_inputs import ANCHORS, CONFIGS, NUM_STEPS, SEQ_LEN, inputs, weights
from tests.support.vllm_heads import FROM_TARGET, build_head

_ENGINE = {"deepseek_v3": {"attention_backend": "CPU_MLA"}}  # the same kernel on every CPU


class Module:
    """vLLM's MTP module with a key-value cache for one request."""

    def __init__(self, family: str, directory: Path) -> None:
        self.head, self.config = build_head(CONFIGS[family], directory, torch.float32, **_ENGINE.get(family, {}))
        draft = self.config.speculative_config.draft_model_config
        self.returns_tuple = draft.hf_config.architectures == ["DeepSeekMTPModel"]  # as the proposer decides it
        self.head.load_weights(iter(weights(family).items()))
        target = inputs(family)
        for name, parameter in self.head.named_parameters():
            if any(part in name for part in FROM_TARGET):
                source = target["embed_tokens" if "embed_tokens" in name else "lm_head"]
                parameter.data[: len(source)] = source
        with set_default_torch_dtype(torch.float32), set_current_vllm_config(self.config):
            process_weights_after_loading(self.head, draft, torch.device("cpu"))
            self._allocate()

    def _allocate(self) -> None:
        layers = self.config.compilation_config.static_forward_context
        ((self.layer, layer),) = ((n, layer) for n, layer in layers.items() if isinstance(layer, AttentionLayerBase))
        spec = layer.get_kv_cache_spec(self.config)
        self.num_blocks = -(-SEQ_LEN // spec.block_size)
        size = spec.block_size, spec.page_size_bytes // spec.block_size // spec.num_kv_heads // 4
        heads = () if spec.num_kv_heads == 1 and "MLA" in type(spec).__name__ else (spec.num_kv_heads,)
        # What lies in unused slots must not matter, but must be finite: vLLM's kernel multiplies it by zero.
        cache = torch.full((self.num_blocks, *heads, *size), 1e3)
        if hasattr(layer, "bind_kv_cache"):
            layer.bind_kv_cache(cache)
        else:  # until 0.24
            layer.kv_cache = cache
        self.builder = layer.get_attn_backend().get_builder_cls()(spec, [self.layer], self.config, torch.device("cpu"))

    def __call__(self, token_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the last token, and what the next step is fed."""
        queries, length = len(positions), int(positions[-1]) + 1
        bounds, lengths = torch.tensor([0, queries], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
        metadata = CommonAttentionMetadata(
            query_start_loc=bounds,
            query_start_loc_cpu=bounds,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=1,
            num_actual_tokens=queries,
            max_query_len=queries,
            max_seq_len=length,
            block_table_tensor=torch.arange(self.num_blocks, dtype=torch.int32)[None],
            slot_mapping=positions,
        )
        with set_current_vllm_config(self.config):
            built = {self.layer: self.builder.build(0, metadata)}
            with set_forward_context(built, self.config, num_tokens=queries, slot_mapping={self.layer: positions}):
                result = self.head(token_ids, positions, hidden_states)
            last, fed = result if self.returns_tuple else (result, result)
            return self.head.compute_logits(last[-1:])[0], fed[-1:]


@torch.inference_mode()
def steps(family: str, directory: Path) -> Tensor:
    module, fed_to_both = Module(family, directory), inputs(family)
    token_ids, hidden_states, logits = fed_to_both["token_ids"], fed_to_both["hidden_states"], []
    for anchor in ANCHORS:
        slots = torch.arange(anchor + 1)
        drafted, fed = module(token_ids[slots + 1], slots, hidden_states[slots])
        logits.append(drafted)
        for step in range(1, NUM_STEPS):
            slot = torch.tensor([anchor + step])
            drafted, fed = module(token_ids[slot + 1], slot, fed)
            logits.append(drafted)
    return torch.stack(logits).unflatten(0, (len(ANCHORS), NUM_STEPS))


if __name__ == "__main__":
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for family in sys.argv[2:]:
            (place := Path(directory) / family).mkdir()
            results[family] = steps(family, place)
    save_file(results, sys.argv[1])
