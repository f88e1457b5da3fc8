"""Rows of which only some tokens count: a grammar's bitmask, and min-p, top-k and top-p as a threshold.

No mask of a row is ever stored: a logit is looked at together with its bit and its row's threshold, every time. What a
threshold is, and the same in plain torch: `filters`. Finding it reads only sub-blocks whose largest logit reaches the
bounds known so far, GROUP of them at once; with the row just streamed they come from the L2 cache.
"""

import triton
import triton.language as tl

from vllm_bebop.kernels.device import (
    NEG_INF,
    finite,
    from_first_lane,
    is_allowed,
    merge_logsumexp,
    pick,
    to_scores,
)

GROUP = tl.constexpr(2)  # sub-blocks that a row reads at once
LOWEST = tl.constexpr(-1e30)  # below every logit that counts
INF = tl.constexpr(float("inf"))


@triton.jit
def load_logits(rows, ids, mask, bitmask_ptr, bitmask_row):
    """fp32 logits [R, N] at ids [1 or R, N], at most MAX_SCORE; -inf for NaN, where masked, and where forbidden."""
    logits = tl.load(rows[:, None] + ids, mask=mask, other=NEG_INF).to(tl.float32)
    if bitmask_ptr is not None:
        logits = tl.where(is_allowed(bitmask_ptr + bitmask_row[:, None], ids, mask), logits, NEG_INF)
    return to_scores(logits, 1.0)


@triton.jit
def load_kept(rows, ids, mask, inverse_temperature, bitmask_ptr, bitmask_row, threshold):
    """Scores [R, N] at ids [1 or R, N]; -inf where masked, where the bitmask forbids, and below the threshold [R]."""
    logits = load_logits(rows, ids, mask, bitmask_ptr, bitmask_row)
    return tl.where(logits >= threshold[:, None], to_scores(logits, inverse_temperature[:, None]), NEG_INF)


@triton.jit
def load_kept_block(
    rows, block, mask, inverse_temperature, bitmask_ptr, bitmask_row, threshold, vocab_size, SUB_BLOCK: tl.constexpr
):
    """Scores [R, SUB_BLOCK] of sub-block `block` [R] of each row, as `load_kept`."""
    ids = block[:, None] * SUB_BLOCK + tl.arange(0, SUB_BLOCK)[None, :]
    mask = mask[:, None] & (ids < vocab_size)
    return load_kept(rows, ids, mask, inverse_temperature, bitmask_ptr, bitmask_row, threshold)


@triton.jit
def load_filters(top_k_ptr, top_p_ptr, min_p_ptr, slot, mask):
    """top-k, top-p, min-p [R] of the slots [R]; what filters nothing where masked or not asked for."""
    top_k, top_p = tl.zeros_like(slot).to(tl.int32), tl.zeros_like(slot).to(tl.float32) + 1.0
    min_p = top_p - 1.0
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + slot, mask=mask, other=0)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + slot, mask=mask, other=1.0)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + slot, mask=mask, other=0.0)
    return top_k, top_p, min_p


@triton.jit
def has_filter(top_k, top_p, min_p, vocab_size):
    """[R]: which rows these leave a part of."""
    return ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1) | (min_p > 0)


@triton.jit
def find_threshold(
    rows,
    mask,
    inverse_temperature,
    bitmask_ptr,
    bitmask_row,
    top_k,
    top_p,
    min_p,
    largest,
    block_logsumexp,
    block_entropy,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
):
    """The row's threshold [R] (-inf: none), and the statistics [R, NB] of what it leaves of each sub-block.

    mask: rows that are filtered at all. top_k, top_p, min_p: [R]. largest, block_logsumexp, block_entropy: [R, NB] of
    all allowed tokens. Reference: `filters.find_threshold`.
    """
    has_min_p = mask & (min_p > 0)
    at_most = tl.max(largest, axis=1) + tl.log(tl.where(has_min_p, min_p, 1.0)) / inverse_temperature
    threshold = tl.where(has_min_p, at_most, NEG_INF)

    has_top_k = mask & (top_k > 0) & (top_k < vocab_size)
    if from_first_lane(tl.max(has_top_k.to(tl.int32), axis=0)) > 0:
        # The k sub-blocks with the largest maxima hold k tokens at or above the k-th of these.
        ordered = largest
        if largest.shape[1] > 1:  # Triton's AMD backend cannot sort one number
            ordered = tl.sort(largest, descending=True)
        bound = pick(ordered, tl.where(has_top_k, top_k - 1, 0))
        bound = tl.maximum(tl.where(top_k <= largest.shape[1], bound, LOWEST), LOWEST)
        kth_largest = _largest_with(
            rows, has_top_k, inverse_temperature, bitmask_ptr, bitmask_row, bound, top_k.to(tl.float32),
            tl.zeros_like(bound), largest, vocab_size, SUB_BLOCK, False,
        )  # fmt: skip
        threshold = tl.where(has_top_k, tl.maximum(threshold, kth_largest), threshold)
    block_logsumexp, block_entropy = apply_threshold(
        rows, mask, inverse_temperature, bitmask_ptr, bitmask_row, threshold, largest, block_logsumexp, block_entropy,
        vocab_size, SUB_BLOCK,
    )  # fmt: skip

    has_top_p = mask & (top_p < 1)
    if from_first_lane(tl.max(has_top_p.to(tl.int32), axis=0)) > 0:
        logsumexp = finite(merge_logsumexp(block_logsumexp, ~mask))
        # Tokens below this hold less than 1 - top_p even if the whole vocabulary stood there.
        bound = (logsumexp + tl.log((1 - tl.minimum(top_p, 0.999999)) / vocab_size)) / inverse_temperature
        bound = tl.maximum(tl.maximum(bound, threshold), LOWEST)
        nucleus_end = _largest_with(
            rows, has_top_p, inverse_temperature, bitmask_ptr, bitmask_row, bound, top_p, logsumexp, largest,
            vocab_size, SUB_BLOCK, True,
        )  # fmt: skip
        threshold = tl.where(has_top_p, tl.maximum(threshold, nucleus_end), threshold)
        block_logsumexp, block_entropy = apply_threshold(
            rows, has_top_p, inverse_temperature, bitmask_ptr, bitmask_row, threshold, largest, block_logsumexp,
            block_entropy, vocab_size, SUB_BLOCK,
        )  # fmt: skip
    return threshold, block_logsumexp, block_entropy


@triton.jit
def _largest_with(
    rows,
    mask,
    inverse_temperature,
    bitmask_ptr,
    bitmask_row,
    low,
    wanted,
    logsumexp,
    largest,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The largest logit t [R] such that the tokens at or above t weigh at least `wanted` [R].

    A token weighs e^(score - logsumexp) if BY_MASS, else 1. `low` [R]: a bound at which that is known to hold.
    Bisection whose bounds are logits of the row: it ends when they meet.
    """
    high = tl.max(largest, axis=1)
    active = mask & (low < high)
    while from_first_lane(tl.max(active.to(tl.int32), axis=0)) > 0:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        pending = active[:, None] & (largest >= low[:, None])
        num_pending = from_first_lane(tl.max(tl.sum(pending.to(tl.int32), axis=1), axis=0))
        weight = tl.zeros([rows.shape[0], GROUP * SUB_BLOCK], tl.float32)
        above, below = weight + INF, weight + NEG_INF
        first = 0
        while first < num_pending:
            ids, here, _ = _group(pending, first, vocab_size, SUB_BLOCK)
            logits = load_logits(rows, ids, here, bitmask_ptr, bitmask_row)
            is_above = logits >= middle[:, None]
            each = tl.zeros_like(logits) + 1.0
            if BY_MASS:
                each = tl.exp(to_scores(logits, inverse_temperature[:, None]) - logsumexp[:, None])
            weight += tl.where(is_above, each, 0.0)
            above = tl.minimum(above, tl.where(is_above, logits, INF))
            below = tl.maximum(below, tl.where(is_above, NEG_INF, logits))
            first += GROUP
        holds = tl.sum(weight, axis=1) >= wanted
        low = tl.where(active & holds, tl.min(above, axis=1), low)
        high = tl.where(active & ~holds, tl.maximum(tl.max(below, axis=1), low), high)
        active = active & (low < high)
    return low


@triton.jit
def apply_threshold(
    rows,
    mask,
    inverse_temperature,
    bitmask_ptr,
    bitmask_row,
    threshold,
    largest,
    block_logsumexp,
    block_entropy,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
):
    """Logsumexp and entropy [R, NB] of each sub-block's logits at or above the threshold [R] (-inf: as they were)."""
    has_threshold = (mask & (threshold > NEG_INF))[:, None]
    pending = has_threshold & (largest >= threshold[:, None])
    block_logsumexp = tl.where(has_threshold & ~pending, NEG_INF, block_logsumexp)
    num_pending = from_first_lane(tl.max(tl.sum(pending.to(tl.int32), axis=1), axis=0))
    first = 0
    while first < num_pending:
        ids, here, place = _group(pending, first, vocab_size, SUB_BLOCK)
        scores = load_kept(rows, ids, here, inverse_temperature, bitmask_ptr, bitmask_row, threshold)
        scores = tl.reshape(scores, [rows.shape[0], GROUP, SUB_BLOCK])
        top = tl.max(scores, axis=2)
        log_total, entropy = _summarize(scores, top, 2)
        is_here = tl.max(place.to(tl.int32), axis=1) > 0
        logsumexps = tl.sum(tl.where(place, (top + log_total)[:, :, None], 0.0), axis=1)
        block_logsumexp = tl.where(is_here, logsumexps, block_logsumexp)
        entropies = tl.sum(tl.where(place, entropy[:, :, None], 0.0), axis=1)
        block_entropy = tl.where(is_here, entropies, block_entropy)
        first += GROUP
    return block_logsumexp, block_entropy


@triton.jit
def _summarize(scores, largest, axis: tl.constexpr):
    """log sum exp(score - largest) and entropy in nats along `axis`; 0 and 0 where all are -inf."""
    below = scores - tl.expand_dims(finite(largest), axis)
    weight = tl.exp(below)
    # A sub-block that is not empty has a sum of at least 1, so the clamp only keeps the logarithm of an empty one at 0.
    total = tl.maximum(tl.sum(weight, axis=axis), 1.0)
    log_total = tl.log(total)
    mean_below = tl.sum(weight * tl.maximum(below, -1e4), axis=axis) / total  # weight 0 times -inf would be NaN
    return log_total, log_total - mean_below


@triton.jit
def _group(pending, first, vocab_size, SUB_BLOCK: tl.constexpr):
    """GROUP sub-blocks of each row, from the first-th of those pending [R, NB].

    Returns the ids [R, GROUP * SUB_BLOCK] of their tokens, whether each is one, and which sub-block each of the group
    is [R, GROUP, NB].
    """
    rank = tl.cumsum(pending.to(tl.int32), axis=1) - 1
    member = first + tl.arange(0, GROUP)
    place = pending[:, None, :] & (rank[:, None, :] == member[None, :, None])
    blocks = tl.arange(0, pending.shape[1])[None, None, :]
    block = tl.sum(tl.where(place, blocks, 0), axis=2)
    is_block = tl.max(place.to(tl.int32), axis=2) > 0
    ids = (block * SUB_BLOCK)[:, :, None] + tl.arange(0, SUB_BLOCK)[None, None, :]
    here = is_block[:, :, None] & (ids < vocab_size)
    shape: tl.constexpr = [pending.shape[0], GROUP * SUB_BLOCK]
    return tl.reshape(ids, shape), tl.reshape(here, shape), place
