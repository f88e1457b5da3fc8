"""`sample` and `verify` in plain torch, for devices on which Triton does not run: the fused kernels' signatures.

The work is the reference's; here the per-slot tensors are only gathered and scattered. Slow, and it waits for the
device: no CUDA graph can contain it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_bebop.kernels.block_reference import verify_block_reference
from vllm_bebop.kernels.candidates import Candidates, expand_candidates, find_candidates_reference
from vllm_bebop.kernels.filters import NO_FILTERS, Filters
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import DraftSample, Verification, sample_reference, verify_reference
from vllm_bebop.kernels.tally import tally_reference


def find_candidates(
    logits: Tensor, *, slots: Tensor, cache_ids: Tensor, step: Tensor, out: Candidates | None = None
) -> Candidates:
    """As `candidate_kernel.find_candidates`; `out` is not written to."""
    found = find_candidates_reference(logits)
    is_cached = (slots >= 0) & (slots < cache_ids.shape[0])
    cache_ids[slots[is_cached].long(), step] = found.ids[is_cached]
    return found


def sample(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    slots: Tensor,
    rounds: Tensor | None = None,
    streams: tuple[Stream, Stream] = (Stream.DRAFT_BLOCK, Stream.DRAFT_TOKEN),
    filters: Filters = NO_FILTERS,
    ids: Tensor | None = None,
    cache: Tensor | None = None,
    cache_logsumexp: Tensor | None = None,
    cache_argmax: Tensor | None = None,
    cache_threshold: Tensor | None = None,
    cache_token_ids: Tensor | None = None,
    cache_positions: Tensor | None = None,
    step: Tensor | None = None,
    position_offset: int = 0,
    workspace: None = None,
) -> DraftSample:
    """As `draft_sampling.sample` with slots. cache_logsumexp and cache_argmax, which save the kernels a pass, are left
    as they are: see `verify`."""
    del cache_logsumexp, cache_argmax, workspace
    positions = positions.long() + position_offset
    is_real = slots >= 0
    index = slots.long().clamp(min=0)
    temperature = temperature[index]
    is_cached = is_real
    if cache is not None:
        is_cached = is_real & (index < cache.shape[0])
        cache[index[is_cached], step] = logits[is_cached]
        temperature = temperature.where(is_cached, 0.0)
    out = sample_reference(
        logits,
        temperature,
        seeds[index],
        positions,
        rounds=None if rounds is None else rounds.long(),
        streams=streams,
        filters=filters.of(index),
    )
    token_ids = out.token_ids
    if ids is not None:
        token_ids = ids.gather(1, token_ids[:, None]).squeeze(1).long().clamp(min=0)
    for kept, values in (
        (cache_threshold, out.threshold),
        (cache_token_ids, token_ids),
        (cache_positions, positions),
    ):
        if kept is not None:
            kept[index[is_cached], step] = values[is_cached]
    return replace(out, token_ids=token_ids.where(is_real, 0))


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
    first_rows: Tensor | None = None,
    one_hot: Tensor | None = None,
    target_is_processed: bool = False,
    bitmask: Tensor | None = None,
    filters: Filters = NO_FILTERS,
    draft_logsumexp: Tensor | None = None,
    draft_argmax: Tensor | None = None,
    draft_threshold: Tensor | None = None,
    draft_ids: Tensor | None = None,
    num_scheduled: Tensor | None = None,
    block: bool = False,
    totals: Tensor | None = None,
    workspace: None = None,
) -> Verification:
    """As `verification.verify` with slots, none of them padding. What draft_logsumexp and draft_argmax say is computed
    from draft_logits."""
    del draft_logsumexp, draft_argmax, workspace
    index, num_rows = slots.long(), num_draft_tokens.long() + 1
    if first_rows is not None:  # wherever a request's rows lie, the reference wants them one after the other
        request = torch.arange(len(slots), device=slots.device).repeat_interleave(num_rows)
        step = torch.arange(len(request), device=slots.device) - (num_rows.cumsum(0) - num_rows)[request]
        rows = (first_rows.long()[request] + step).clamp(max=len(target_logits) - 1)
        target_logits = target_logits[rows]
        bitmask = None if bitmask is None else bitmask[rows]
    if draft_logits is not None:
        is_past = index >= draft_logits.shape[0]
        row = index.where(~is_past, 0)
        one_hot = is_past if one_hot is None else one_hot | is_past
        draft_logits = draft_logits[row]
        if draft_ids is not None:
            draft_logits = expand_candidates(draft_ids[row], draft_logits, target_logits.shape[1])
        draft_threshold = None if draft_threshold is None else draft_threshold[row]
    verification = (verify_block_reference if block else verify_reference)(
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
        filters=filters.of(index),
        draft_threshold=draft_threshold,
        num_scheduled=None if num_scheduled is None else num_scheduled.long(),
    )
    if totals is not None:
        tally_reference(verification, totals)
    return verification
