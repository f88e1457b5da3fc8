"""What verification keeps of each row between its launches, and how it becomes the output."""

import triton
import triton.language as tl

from vllm_bebop.kernels.device import NEG_INF

# What a row decided.
ACCEPTED, REJECTED, NO_DRAFT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Planes of a row's merged numbers, fp32. LOG_RATIO is log p(y) - log q(y).
LSE_P, LSE_Q, ENTROPY, NUM_NAN, OVERLAP, ARGMAX_PROB, THRESHOLD, LOG_RATIO = (tl.constexpr(i) for i in range(8))
NUM_ROW_PLANES = 8


@triton.jit
def store_output(
    request,
    in_batch,
    num_accepted,
    last_used,
    num_drafts,
    num_scheduled_ptr,
    max_drafts,
    tokens_ptr,
    tokens_stride,
    rows_ptr,
    row_plane,
    token_ids_ptr,
    num_accepted_ptr,
    num_tokens_ptr,
    entropy_ptr,
    overlap_ptr,
    argmax_prob_ptr,
    num_nan_ptr,
    num_empty_ptr,
    PADDED_STEPS: tl.constexpr,
):
    """All but the token after the accepted ones [R]: statistics are those of the rows up to last_used [R]."""
    steps = tl.arange(0, PADDED_STEPS)[None, :]
    index = request[:, None] * (max_drafts + 1) + steps
    is_step = in_batch[:, None] & (steps <= max_drafts)
    is_accepted = in_batch[:, None] & (steps < num_accepted[:, None])
    accepted = tl.load(tokens_ptr + request[:, None] * tokens_stride + steps, mask=is_accepted, other=-1)
    tl.store(token_ids_ptr + index, accepted.to(tl.int64), mask=is_step & (steps != num_accepted[:, None]))
    tl.store(num_accepted_ptr + request, num_accepted.to(tl.int64), mask=in_batch)
    num_counted = num_accepted
    if num_scheduled_ptr is not None:
        num_scheduled = tl.load(num_scheduled_ptr + request, mask=in_batch, other=0).to(tl.int32)
        num_counted = tl.minimum(num_accepted, num_scheduled)
    tl.store(num_tokens_ptr + request, num_counted + 1, mask=in_batch)

    is_used = in_batch[:, None] & (steps <= last_used[:, None])
    is_used_draft = is_used & (steps < num_drafts[:, None])
    used_row = rows_ptr + index
    entropy = tl.load(used_row + ENTROPY * row_plane, mask=is_used, other=float("nan"), cache_modifier=".cg")
    tl.store(entropy_ptr + index, entropy, mask=is_step)
    overlap = tl.load(used_row + OVERLAP * row_plane, mask=is_used_draft, other=float("nan"), cache_modifier=".cg")
    prob = tl.load(used_row + ARGMAX_PROB * row_plane, mask=is_used_draft, other=float("nan"), cache_modifier=".cg")
    draft_index = request[:, None] * max_drafts + steps
    tl.store(overlap_ptr + draft_index, overlap, mask=is_step & (steps < max_drafts))
    tl.store(argmax_prob_ptr + draft_index, prob, mask=is_step & (steps < max_drafts))
    num_nan = tl.load(used_row + NUM_NAN * row_plane, mask=is_used, other=0.0, cache_modifier=".cg")
    tl.store(num_nan_ptr + request, tl.sum(num_nan, axis=1).to(tl.int64), mask=in_batch)
    logsumexps = tl.load(used_row + LSE_P * row_plane, mask=is_used, other=0.0, cache_modifier=".cg")
    num_empty = tl.sum((logsumexps == NEG_INF).to(tl.int32), axis=1)
    tl.store(num_empty_ptr + request, num_empty.to(tl.int64), mask=in_batch)
