"""Mends a fault of vLLM's CPU build that would make any comparison with the stock sampler meaningless.

On a CPU, `expand_batch_to_tokens` returns uninitialised memory (vLLM issue #55005, versions 0.30 to 0.33): the kernel
writes into a temporary copy of its output, so stock rejection sampling divides by arbitrary temperatures. bebop's own
path does not call it. The benchmarks switch this mend on with `VLLM_BEBOP_MEND_CPU=1`, for the stock baseline's sake.

Upstream symbol: `vllm.v1.sample.rejection_sampler.expand_batch_to_tokens`. A fix of #55005 retires this file.
"""

import torch
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler


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
    """Replace the faulty function; does nothing on a GPU, where it works."""
    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
