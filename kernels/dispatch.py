"""The two functions that an engine calls: fused kernels where Triton runs, the plain-torch reference elsewhere.

Triton runs on CUDA and ROCm tensors, and on any tensor with TRITON_INTERPRET=1. Both sides use the same random numbers
and give the same tokens, up to draws whose best two scores differ by less than the rounding of fp32.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import DraftSample, Verification, sample_reference, verify_reference


def uses_triton(tensor: Tensor) -> bool:
    """Whether `sample` and `verify` run fused kernels on tensors like this one."""
    runs = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and tensor.dtype != torch.float64 and find_spec("triton") is not None


def sample(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    slots: Tensor | None = None,
    streams: tuple[Stream, Stream] = (Stream.DRAFT_BLOCK, Stream.DRAFT_TOKEN),
    cache: Tensor | None = None,
    cache_logsumexp: Tensor | None = None,
    cache_argmax: Tensor | None = None,
    step: Tensor | None = None,
    workspace: Any = None,
) -> DraftSample:
    """One token per row from softmax(logits / temperature); arguments and errors as for `draft_sampling.sample`.

    Without Triton, `workspace` is not used, and a padding row (slot -1) draws by the last slot and writes to its
    caches, so that a spare last slot is needed there.
    Reference: kernels.reference.sample_reference
    """
    if uses_triton(logits):
        from vllm_bebop.kernels import draft_sampling

        return draft_sampling.sample(
            logits,
            temperature,
            seeds,
            positions,
            slots=slots,
            streams=streams,
            cache=cache,
            cache_logsumexp=cache_logsumexp,
            cache_argmax=cache_argmax,
            step=step,
            workspace=workspace,
        )
    index = torch.arange(logits.shape[0], device=logits.device) if slots is None else slots.long()
    out = sample_reference(logits, temperature[index], seeds[index], positions.long(), streams=streams)
    argmax_ids = logits.masked_fill(logits.isnan(), float("-inf")).argmax(dim=1)
    for name, stored, value in (
        ("cache", cache, logits),
        ("cache_logsumexp", cache_logsumexp, out.logsumexp),
        ("cache_argmax", cache_argmax, argmax_ids),
    ):
        if stored is not None:
            if step is None:
                raise ValueError(f"step is needed to write {name}")
            stored[index, step.long()] = value
    return out


def verify(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_logits: Tensor | None,
    num_draft_tokens: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    one_hot: Tensor | None = None,
    target_is_processed: bool = False,
    slots: Tensor | None = None,
    first_rows: Tensor | None = None,
    draft_logsumexp: Tensor | None = None,
    draft_argmax: Tensor | None = None,
    single_launch: bool = False,
    workspace: Any = None,
) -> Verification:
    """Output tokens of one verification step; arguments and errors as for `verification.verify`.

    Without Triton, draft_logsumexp, draft_argmax, single_launch and workspace are not used, the requests' target rows
    must follow each other (first_rows is not used either), and a padding row (slot -1) reads the last slot. The
    statistics are then exact for every row.
    Reference: kernels.reference.verify_reference
    """
    if uses_triton(target_logits):
        from vllm_bebop.kernels import verification

        return verification.verify(
            target_logits,
            draft_token_ids,
            draft_logits,
            num_draft_tokens,
            temperature,
            seeds,
            positions,
            one_hot=one_hot,
            target_is_processed=target_is_processed,
            slots=slots,
            first_rows=first_rows,
            draft_logsumexp=draft_logsumexp,
            draft_argmax=draft_argmax,
            single_launch=single_launch,
            workspace=workspace,
        )
    if slots is not None:
        index = slots.long()
        temperature, seeds = temperature[index], seeds[index]
        draft_logits = None if draft_logits is None else draft_logits[index]
    return verify_reference(
        target_logits,
        draft_token_ids.long(),
        draft_logits,
        num_draft_tokens.long(),
        temperature,
        seeds,
        positions.long(),
        one_hot=one_hot,
        target_is_processed=target_is_processed,
    )
