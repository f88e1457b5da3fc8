"""What one row of the target decides: whether the draft token at its step is accepted."""

import triton
import triton.language as tl

from vllm_bebop.kernels.device import (
    NEG_INF,
    finish_statistics,
    finite,
    load_statistics,
    merge_entropy,
    merge_logsumexp,
    uniform,
)
from vllm_bebop.kernels.filtering import find_threshold, load_kept, load_kept_block
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.resampling import draft_log_prob, is_below_ratio, load_draft_threshold
from vllm_bebop.kernels.verification_rows import (
    ACCEPTED,
    ARGMAX_PROB,
    ENTROPY,
    LOG_RATIO,
    LSE_P,
    LSE_Q,
    NO_DRAFT,
    NUM_NAN,
    OVERLAP,
    REJECTED,
    THRESHOLD,
)

ACCEPT_STREAM = tl.constexpr(int(Stream.ACCEPT))


@triton.jit
def decide_row(
    target_row,
    bitmask_ptr,
    bitmask_row,
    top_k,
    top_p,
    min_p,
    draft_row,
    draft_ids,
    draft_logsumexp_ptr,
    draft_argmax_ptr,
    draft_threshold_ptr,
    slot,
    step,
    max_drafts,
    token,
    is_row,
    is_read,
    has_draft,
    is_point_mass,
    is_greedy,
    seed,
    position,
    inverse_target,
    inverse_draft,
    target_statistics,
    draft_statistics,
    plane,
    rows,
    row_plane,
    verdicts,
    num_blocks,
    vocab_size,
    FILTERED: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    """Whether each row [R] accepts its draft token, from the statistics of its sub-blocks.

    Stores what the rows are known by from here on: verdicts, the planes of `rows`, and L_j and H_j of their sub-blocks
    in the statistics' first two planes. With FILTERED, which is for rows that have a filter, it finds their
    thresholds and replaces L_j and H_j by those of what they leave.
    """
    threshold = tl.zeros_like(inverse_target) + NEG_INF
    if FILTERED:
        block_logsumexp = load_statistics(target_statistics, is_row, num_blocks, PADDED_BLOCKS, NEG_INF)
        block_entropy = load_statistics(target_statistics + plane, is_row, num_blocks, PADDED_BLOCKS, 0.0)
        largest = load_statistics(target_statistics + 3 * plane, is_row, num_blocks, PADDED_BLOCKS, NEG_INF)
        threshold, block_logsumexp, block_entropy = find_threshold(
            target_row, is_read, inverse_target, bitmask_ptr, bitmask_row, top_k, top_p, min_p,
            largest, block_logsumexp, block_entropy, vocab_size, SUB_BLOCK,
        )  # fmt: skip
    else:
        block_logsumexp, block_entropy, num_nan, largest = finish_statistics(
            target_statistics, plane, is_row, inverse_target, is_greedy, num_blocks, PADDED_BLOCKS
        )
        tl.store(rows + NUM_NAN * row_plane, tl.sum(num_nan, axis=1), mask=is_row)
    all_blocks = tl.arange(0, PADDED_BLOCKS)[None, :]
    is_block = is_row[:, None] & (all_blocks < num_blocks)
    kept = target_statistics[:, None] + all_blocks
    tl.debug_barrier()  # all warps have read what is overwritten here
    tl.store(kept, block_logsumexp, mask=is_block)
    tl.store(kept + plane, block_entropy, mask=is_block)
    logsumexp_p = merge_logsumexp(block_logsumexp, is_greedy)
    entropy = merge_entropy(block_logsumexp, block_entropy, logsumexp_p, is_greedy)
    logsumexp_q = tl.zeros_like(logsumexp_p)
    if draft_logsumexp_ptr is not None:
        is_kept = has_draft & ~is_point_mass
        logsumexp_q = tl.load(draft_logsumexp_ptr + slot * max_drafts + step, mask=is_kept, other=NEG_INF)
    elif draft_row is not None:
        of_draft = finish_statistics(
            draft_statistics, plane, is_row, inverse_draft, is_greedy, num_blocks, PADDED_BLOCKS
        )
        logsumexp_q = merge_logsumexp(of_draft[0], is_greedy)

    draft_threshold = load_draft_threshold(draft_threshold_ptr, slot, step, max_drafts, has_draft & ~is_point_mass)
    is_token = is_read & (token >= 0)
    score = tl.max(
        load_kept(target_row, token[:, None], is_token[:, None], inverse_target, bitmask_ptr, bitmask_row, threshold),
        axis=1,
    )
    log_p = score - finite(logsumexp_p)
    if tl.max(is_greedy.to(tl.int32), axis=0) > 0:
        top_block = tl.argmax(block_logsumexp, axis=1)
        scores = load_kept_block(
            target_row, top_block, is_read, inverse_target, bitmask_ptr, bitmask_row, threshold, vocab_size,
            SUB_BLOCK,
        )  # fmt: skip
        is_argmax = (score > NEG_INF) & (token == top_block * SUB_BLOCK + tl.argmax(scores, axis=1))
        log_p = tl.where(is_greedy, tl.where(is_argmax, 0.0, NEG_INF), log_p)
    log_q = tl.max(
        draft_log_prob(
            draft_row,
            draft_ids,
            draft_threshold,
            is_token[:, None],
            token[:, None],
            token,
            is_point_mass,
            logsumexp_q,
            inverse_draft,
        ),
        axis=1,
    )
    is_drawn = log_q > NEG_INF
    u = uniform(seed, position, ACCEPT_STREAM, tl.zeros_like(step), 0)
    accepts = is_drawn & is_below_ratio(u, log_p, log_q)
    log_ratio = log_p - finite(log_q)
    overlap = tl.exp(tl.minimum(log_ratio, 0.0))
    argmax_prob = tl.where(is_point_mass, overlap, float("nan"))
    if draft_argmax_ptr is not None:
        at_argmax = is_read & is_drawn & ~is_point_mass
        argmax_q = tl.load(draft_argmax_ptr + slot * max_drafts + step, mask=at_argmax, other=0)
        if draft_ids is not None:
            argmax_q = tl.load(draft_ids + argmax_q, mask=at_argmax, other=0).to(tl.int64)
        score = tl.max(
            load_kept(
                target_row, argmax_q[:, None], at_argmax[:, None], inverse_target, bitmask_ptr, bitmask_row,
                threshold,
            ),
            axis=1,
        )  # fmt: skip
        argmax_prob = tl.where(is_point_mass, overlap, tl.exp(score - finite(logsumexp_p)))
    verdict = tl.where(accepts, ACCEPTED, tl.where(is_drawn, REJECTED, NO_DRAFT))

    tl.store(rows + THRESHOLD * row_plane, threshold, mask=is_row)
    tl.store(rows + LSE_P * row_plane, logsumexp_p, mask=is_row)
    tl.store(rows + LSE_Q * row_plane, logsumexp_q, mask=is_row)
    tl.store(rows + ENTROPY * row_plane, entropy, mask=is_row)
    tl.store(rows + OVERLAP * row_plane, tl.where(is_drawn, overlap, float("nan")), mask=is_row)
    tl.store(rows + ARGMAX_PROB * row_plane, tl.where(is_drawn, argmax_prob, float("nan")), mask=is_row)
    tl.store(rows + LOG_RATIO * row_plane, log_ratio, mask=is_row)
    tl.store(verdicts, verdict, mask=is_row)
    return accepts
