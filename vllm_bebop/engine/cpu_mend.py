"""Mends two faults of vLLM's CPU build that would make any comparison with the stock sampler meaningless.

On a CPU, `expand_batch_to_tokens` returns uninitialised memory (vLLM issue #55005, versions 0.30 to 0.33): the kernel
writes into a temporary copy of its output, so stock rejection sampling divides by arbitrary temperatures. And
`apply_top_k_only` fails on the empty batch that a step without drafts gives to it. bebop's own path meets neither. The
benchmarks switch these mends on with `VLLM_BEBOP_MEND_CPU=1`, for the stock baseline's sake.

Upstream symbols, in `vllm.v1.sample`: `rejection_sampler.expand_batch_to_tokens` and
`ops.topk_topp_sampler.apply_top_k_only`. Fixes of them retire this file.
"""

import functools

import torch
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops import topk_topp_sampler


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat x[i] once for each token of request i: [batch_size] -> [num_tokens]. As upstream documents it."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return torch.where(expanded == replace_from, torch.full_like(expanded, replace_to), expanded)


def install() -> None:
    """Replace the faulty functions, once; does nothing on a GPU, where they work."""
    upstream = topk_topp_sampler.apply_top_k_only
    if not current_platform.is_cpu() or hasattr(upstream, "_bebop_original"):
        return

    @functools.wraps(upstream)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return upstream(logits, k) if len(logits) else logits

    apply_top_k_only._bebop_original = upstream  # type: ignore[attr-defined]
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    topk_topp_sampler.apply_top_k_only = apply_top_k_only
