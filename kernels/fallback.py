"""`sample` and `verify` in plain torch, for devices on which Triton does not run: the fused kernels' signatures.

The work is the reference's; here the per-slot tensors are only gathered and scattered. Slow, and it waits for the
device: no CUDA graph can contain it.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import DraftSample, Verification, sample_reference, verify_reference


def sample(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    slots: Tensor,
    streams: tuple[Stream, Stream] = (Stream.DRAFT_BLOCK, Stream.DRAFT_TOKEN),
    cache: Tensor | None = None,
    step: Tensor | None = None,
    **_fused_only: Any,
) -> DraftSample:
    """As `draft_sampling.sample` with slots; its other caches and its workspace are not needed here."""
    is_real = slots >= 0
    index = slots.long().clamp(min=0)
    temperature = temperature[index]
    if cache is not None:
        is_cached = is_real & (index < cache.shape[0])
        cache[index[is_cached], step] = logits[is_cached]
        temperature = temperature.where(is_cached, 0.0)
    out = sample_reference(logits, temperature, seeds[index], positions.long(), streams=streams)
    return replace(out, token_ids=out.token_ids.where(is_real, 0))


def verify(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_logits: Tensor | None,
    num_draft_tokens: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    slots: Tensor,
    target_is_processed: bool = False,
    bitmask: Tensor | None = None,
    min_p: Tensor | None = None,
    **_fused_only: Any,
) -> Verification:
    """As `verification.verify` with slots, none of them padding, and consecutive target rows."""
    index = slots.long()
    one_hot = None
    if draft_logits is not None:
        one_hot = index >= draft_logits.shape[0]
        draft_logits = draft_logits[index.where(~one_hot, 0)]
    return verify_reference(
        target_logits,
        draft_token_ids.long(),
        draft_logits,
        num_draft_tokens.long(),
        temperature[index],
        seeds[index],
        positions.long(),
        one_hot=one_hot,
        target_is_processed=target_is_processed,
        bitmask=bitmask,
        min_p=None if min_p is None else min_p[index],
    )
