"""Target rows of which only some tokens count: a bitmask of allowed tokens, and min-p as a threshold on the score.

No mask of a row is ever stored: a score is looked at together with its bit and the row's threshold, every time.
"""

import triton
import triton.language as tl

from vllm_bebop.kernels.device import NEG_INF, is_allowed, summarize, to_scores


@triton.jit
def load_kept(rows, ids, mask, inverse_temperature, bitmask_ptr, bitmask_row, threshold):
    """Scores [R, N] at ids [1 or R, N]; -inf where masked, where the bitmask forbids, and below the threshold [R]."""
    logits = tl.load(rows[:, None] + ids, mask=mask, other=NEG_INF).to(tl.float32)
    if bitmask_ptr is not None:
        logits = tl.where(is_allowed(bitmask_ptr + bitmask_row[:, None], ids, mask), logits, NEG_INF)
    scores = to_scores(logits, inverse_temperature[:, None])
    return tl.where(scores >= threshold[:, None], scores, NEG_INF)


@triton.jit
def load_kept_block(
    rows, block, mask, inverse_temperature, bitmask_ptr, bitmask_row, threshold, vocab_size, SUB_BLOCK: tl.constexpr
):
    """Scores and ids [R, SUB_BLOCK] of sub-block `block` [R] of each row, as `load_kept`."""
    ids = block[:, None] * SUB_BLOCK + tl.arange(0, SUB_BLOCK)[None, :]
    mask = mask[:, None] & (ids < vocab_size)
    return load_kept(rows, ids, mask, inverse_temperature, bitmask_ptr, bitmask_row, threshold), ids


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
    """Logsumexp and entropy [R, NB] of each sub-block's scores at or above the threshold [R] (-inf: as they were).

    Only sub-blocks whose largest score reaches the threshold are read again, one after the other: for a threshold of
    max + log(min_p) at most 1 / (min_p * p(max)) of them.
    """
    has_threshold = threshold > NEG_INF
    blocks = tl.arange(0, largest.shape[1])[None, :]
    pending = mask[:, None] & has_threshold[:, None] & (largest >= threshold[:, None])
    block_logsumexp = tl.where(has_threshold[:, None] & ~pending, NEG_INF, block_logsumexp)
    while tl.max(tl.max(pending.to(tl.int32), axis=1), axis=0) > 0:
        is_here = tl.max(pending.to(tl.int32), axis=1) > 0
        block = tl.argmax(pending.to(tl.int32), axis=1)
        scores, _ = load_kept_block(
            rows, block, is_here, inverse_temperature, bitmask_ptr, bitmask_row, threshold, vocab_size, SUB_BLOCK
        )
        top, log_total, entropy = summarize(scores, 1)
        here = is_here[:, None] & (blocks == block[:, None])
        block_logsumexp = tl.where(here, (top + log_total)[:, None], block_logsumexp)
        block_entropy = tl.where(here, entropy[:, None], block_entropy)
        pending = pending & ~here
    return block_logsumexp, block_entropy
