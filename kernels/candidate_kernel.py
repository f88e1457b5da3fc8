"""Finding the candidates of draft rows in one pass, and looking tokens up among them: see `candidates`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_bebop.kernels.arguments import (
    check_contiguous,
    check_integers,
    check_rows,
    check_tensor,
)
from vllm_bebop.kernels.candidates import GROUP, NUM_KEPT, Candidates, num_candidates
from vllm_bebop.kernels.device import NEG_INF, to_scores
from vllm_bebop.kernels.launch import compile_options, requests_per_program

_GROUP, _NUM_KEPT = tl.constexpr(GROUP), tl.constexpr(NUM_KEPT)
_LEAST = tl.constexpr(-3e38)


def find_candidates(
    logits: Tensor,
    *,
    slots: Tensor | None = None,
    cache_ids: Tensor | None = None,
    step: Tensor | None = None,
    out: Candidates | None = None,
) -> Candidates:
    """The NUM_KEPT largest of every GROUP logits, in one pass.

    Args:
        logits: [B, V] bf16, fp16 or fp32; unit stride inside a row. NaN counts as -inf.
        slots: [B] int32 or int64, each row's place in the cache; -1, or one past the cache, is stored nowhere.
        cache_ids: [num_slots, max_drafts, C] int32, contiguous: row [slot, step] receives the ids, for `verify`.
        step: scalar integer tensor on the device, required with cache_ids.
        out: at least B rows to write to and return; without it, they are allocated.
    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the argument.
    Reference: candidates.find_candidates_reference
    """
    check_rows("logits", logits, (None, None), logits.device)
    (batch, vocab_size), device = logits.shape, logits.device
    num_kept = num_candidates(vocab_size)
    if out is None:
        out = Candidates.allocate(batch, vocab_size, logits.dtype, device)
    elif out.logits.dtype != logits.dtype or out.ids.shape[1] != num_kept or len(out.ids) < batch:
        raise ValueError(f"out does not fit {batch} rows of {num_kept} candidates, {logits.dtype}")
    out = Candidates(out.ids[:batch], out.logits[:batch])
    if cache_ids is not None:
        check_tensor("cache_ids", cache_ids, (None, None, num_kept), torch.int32, device)
        check_contiguous("cache_ids", cache_ids)
        if slots is None or step is None:
            raise ValueError("slots and step are needed to write cache_ids")
        check_integers("slots", slots, (batch,), device)
        check_integers("step", step, (), device)
    if batch == 0:
        return out
    per_program = requests_per_program(batch, GROUP)
    candidates_kernel[(num_kept // NUM_KEPT, triton.cdiv(batch, per_program))](
        logits,
        logits.stride(0),
        slots,
        cache_ids,
        0 if cache_ids is None else cache_ids.shape[0],
        0 if cache_ids is None else cache_ids.shape[1],
        step,
        out.ids,
        out.logits,
        batch,
        vocab_size,
        REQUESTS=per_program,
        **compile_options(4),
    )
    return out


@triton.jit(do_not_specialize=["num_cached", "batch"])
def candidates_kernel(
    logits_ptr,
    logits_stride,
    slots_ptr,
    cache_ids_ptr,
    num_cached,
    max_drafts,
    step_ptr,
    ids_ptr,
    kept_ptr,
    batch,
    vocab_size,
    REQUESTS: tl.constexpr,
):
    """Grid (groups of the vocabulary, groups of REQUESTS requests)."""
    group, num_groups = tl.program_id(0), tl.num_programs(0)
    request = (tl.program_id(1) * REQUESTS + tl.arange(0, REQUESTS)).to(tl.int64)
    in_batch = request < batch
    ids = group * _GROUP + tl.arange(0, _GROUP)[None, :]
    is_left = in_batch[:, None] & (ids < vocab_size)
    logits = tl.load(logits_ptr + (request * logits_stride)[:, None] + ids, mask=is_left, other=NEG_INF)
    scores = to_scores(logits, 1.0)
    place = (request * num_groups + group) * _NUM_KEPT
    cached = place
    is_cached = in_batch
    if cache_ids_ptr is not None:
        slot = tl.load(slots_ptr + request, mask=in_batch, other=-1).to(tl.int64)
        is_cached = in_batch & (slot >= 0) & (slot < num_cached)
        cached = ((slot * max_drafts + tl.load(step_ptr)) * num_groups + group) * _NUM_KEPT
    for i in range(_NUM_KEPT):
        # An impossible token still comes before no token at all.
        best = tl.argmax(tl.where(is_left, tl.maximum(scores, _LEAST), NEG_INF), axis=1)
        is_best = is_left & (tl.arange(0, _GROUP)[None, :] == best[:, None])
        is_token = tl.max(is_best.to(tl.int32), axis=1) > 0
        token = tl.where(is_token, group * _GROUP + best, -1)
        kept = tl.max(tl.where(is_best, scores, NEG_INF), axis=1)
        tl.store(ids_ptr + place + i, token, mask=in_batch)
        tl.store(kept_ptr + place + i, kept, mask=in_batch)
        if cache_ids_ptr is not None:
            tl.store(cache_ids_ptr + cached + i, token, mask=is_cached)
        is_left = is_left & ~is_best


@triton.jit
def load_candidates(rows, ids_rows, ids, mask, inverse_temperature, threshold):
    """Scores [R, N] of ids [1 or R, N]; -inf where masked, below the threshold [R], and for what is no candidate.

    rows, ids_rows: [R] pointers to the first candidate's logit and id.
    """
    first = (ids // _GROUP) * _NUM_KEPT
    scores = tl.where(mask, NEG_INF, NEG_INF)
    for i in range(_NUM_KEPT):
        candidate = tl.load(ids_rows[:, None] + first + i, mask=mask, other=-1)
        is_here = mask & (candidate == ids)
        logits = tl.load(rows[:, None] + first + i, mask=is_here, other=NEG_INF).to(tl.float32)
        is_here = is_here & (logits >= threshold[:, None])
        scores = tl.where(is_here, to_scores(logits, inverse_temperature[:, None]), scores)
    return scores
