"""Block verification on row statistics that are already there: the parts of its launch of `verify_kernel`.

    w_0 = 1,   w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)),   R_i = sum_v max(0, w_i p_{i+1}(v) - q_{i+1}(v))

Every program knows the w_i from the rows' numbers. The R_i take a second look at rows of p and of q, and many are not
needed: none if the last draft is accepted (eta_n <= w_n), which w alone decides, none before the last w_i = 1, which is
sure to be accepted, none where w_i = 0, and none for greedy requests, where w is 0 or 1. A tile whose row is not needed
reads nothing. At most gamma rows of p and of q are read, for gamma = 3 in bf16 12 bytes per request and vocabulary
entry, on top of the 8 of the statistics.

The sums per sub-block are kept: the token after the accepted drafts is drawn from them, without thinning.
Rule, random streams and counters are those of `block_reference`.
"""

import triton
import triton.language as tl

from vllm_bebop.kernels.device import NEG_INF, add_gumbel, load_statistics, pick, uniform
from vllm_bebop.kernels.filtering import load_kept_block
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.resampling import RESIDUAL_BLOCK, RESIDUAL_TOKEN, TARGET_BLOCK, TARGET_TOKEN, residual_of
from vllm_bebop.kernels.verification_rows import LOG_RATIO, LSE_P, NO_DRAFT

ACCEPT = tl.constexpr(int(Stream.ACCEPT))


@triton.jit
def weigh_block(
    request,
    in_batch,
    num_drafts,
    is_greedy,
    seed,
    first_position,
    rows_ptr,
    row_plane,
    verdicts_ptr,
    max_drafts,
    PADDED_STEPS: tl.constexpr,
):
    """The block's end n [R]; by step [R, PADDED_STEPS] log w_i, eta_i, and whether R_i is needed.

    The block ends at the first step without a draft token, or whose target row is empty.
    """
    steps = tl.arange(0, PADDED_STEPS)[None, :]
    index = request[:, None] * (max_drafts + 1) + steps
    is_row = in_batch[:, None] & (steps <= num_drafts[:, None])
    verdict = tl.load(verdicts_ptr + index, mask=is_row, other=NO_DRAFT)
    logsumexp_p = tl.load(rows_ptr + LSE_P * row_plane + index, mask=is_row, other=NEG_INF)
    end = tl.min(tl.where((verdict == NO_DRAFT) | (logsumexp_p == NEG_INF), steps, max_drafts), axis=1)
    is_end = steps == end[:, None]

    in_block = steps < end[:, None]
    log_ratio = tl.load(rows_ptr + LOG_RATIO * row_plane + index, mask=in_block, other=0.0)
    log_weight = tl.zeros_like(log_ratio)
    latest = tl.zeros_like(end).to(tl.float32)
    for step in range(max_drafts):
        latest = tl.minimum(latest + tl.max(tl.where(steps == step, log_ratio, NEG_INF), axis=1), 0.0)
        log_weight = tl.where(steps == step + 1, latest[:, None], log_weight)

    position, round_key = first_position[:, None] + steps - 1, first_position[:, None]
    eta = uniform(seed[:, None], position, ACCEPT, tl.zeros_like(position), round_key)
    weight = tl.exp(log_weight)
    all_accepted = tl.max((is_end & is_reached(eta, weight, weight)).to(tl.int32), axis=1) > 0
    last_certain = tl.max(tl.where((in_block | is_end) & (weight == 1.0), steps, 0), axis=1)
    needs_sum = in_block & (steps >= last_certain[:, None]) & (log_weight > NEG_INF)
    needs_sum = needs_sum & ~(all_accepted | is_greedy)[:, None]
    return end, log_weight, eta, needs_sum


@triton.jit
def is_reached(eta, weight, residual_sum):
    """eta <= R / (R + 1 - w), in the form of the reference: true for w = 1 whatever R."""
    return eta * (residual_sum + (1.0 - weight)) <= residual_sum


@triton.jit
def count_accepted(
    request, end, log_weight, eta, needs_sum, sums_ptr, max_drafts, num_blocks, PADDED_BLOCKS: tl.constexpr
):
    """tau [R] and R_tau [R], 0 where it was not summed."""
    steps = tl.arange(0, log_weight.shape[1])[None, :]
    weight = tl.exp(log_weight)
    residual_sum = tl.where(steps == end[:, None], weight, 0.0)
    for step in range(max_drafts):
        is_summed = tl.max((needs_sum & (steps == step)).to(tl.int32), axis=1) > 0
        sums = load_statistics(
            sums_ptr + (request * max_drafts + step) * num_blocks, is_summed, num_blocks, PADDED_BLOCKS, 0.0
        )
        residual_sum = tl.where(is_summed[:, None] & (steps == step), tl.sum(sums, axis=1)[:, None], residual_sum)
    accepts = is_reached(eta, weight, residual_sum) & (steps <= end[:, None])
    num_accepted = tl.max(tl.where(accepts, steps, 0), axis=1)
    return num_accepted, pick(residual_sum, num_accepted)


@triton.jit
def draw_after_block(
    target_row,
    bitmask_ptr,
    bitmask_row,
    threshold,
    draft_row,
    draft_ids,
    draft_threshold,
    is_read,
    from_residual,
    rejected,
    is_point_mass,
    is_greedy,
    block_scores,
    logsumexp_p,
    logsumexp_q,
    inverse_target,
    inverse_draft,
    seed,
    position,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    """[R]: a token from max(0, w p - q) where from_residual, otherwise from p.

    block_scores [R, PADDED_BLOCKS]: the logarithm of each sub-block's weight in that; logsumexp_p is less by log w.
    """
    blocks, places = tl.arange(0, PADDED_BLOCKS)[None, :], tl.arange(0, SUB_BLOCK)[None, :]
    block_stream = tl.where(from_residual, RESIDUAL_BLOCK, TARGET_BLOCK)[:, None]
    token_stream = tl.where(from_residual, RESIDUAL_TOKEN, TARGET_TOKEN)[:, None]
    block = tl.argmax(add_gumbel(block_scores, seed, position, block_stream, blocks, 0, is_greedy), axis=1)
    scores = load_kept_block(
        target_row, block, is_read & ~from_residual, inverse_target, bitmask_ptr, bitmask_row, threshold, vocab_size,
        SUB_BLOCK,
    )  # fmt: skip
    residual = residual_of(
        target_row, bitmask_ptr, bitmask_row, threshold, draft_row, draft_ids, draft_threshold, is_read & from_residual,
        block[:, None] * SUB_BLOCK + places, rejected, is_point_mass, logsumexp_p, logsumexp_q, inverse_target,
        inverse_draft, vocab_size,
    )  # fmt: skip
    scores = tl.where(from_residual[:, None], tl.log(residual), scores)
    inside = tl.argmax(add_gumbel(scores, seed, position, token_stream, places, 0, is_greedy), axis=1)
    return block * SUB_BLOCK + inside
