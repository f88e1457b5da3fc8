"""The token after the accepted ones: drawn from p, by thinning from max(0, p - q), or from that residual itself."""

import triton
import triton.language as tl

from vllm_bebop.kernels.candidate_kernel import load_candidates
from vllm_bebop.kernels.device import (
    LOAD_BITS,
    NEG_INF,
    add_four_gumbels,
    add_gumbel,
    finite,
    four_uniforms,
    from_first_lane,
)
from vllm_bebop.kernels.filtering import load_kept
from vllm_bebop.kernels.philox import Stream

TARGET_BLOCK, TARGET_TOKEN = tl.constexpr(int(Stream.TARGET_BLOCK)), tl.constexpr(int(Stream.TARGET_TOKEN))
THINNING_BLOCK, THINNING_TOKEN = tl.constexpr(int(Stream.THINNING_BLOCK)), tl.constexpr(int(Stream.THINNING_TOKEN))
THINNING_KEEP = tl.constexpr(int(Stream.THINNING_KEEP))
RESIDUAL_BLOCK, RESIDUAL_TOKEN = tl.constexpr(int(Stream.RESIDUAL_BLOCK)), tl.constexpr(int(Stream.RESIDUAL_TOKEN))


@triton.jit
def load_draft_threshold(threshold_ptr, slot, step, max_drafts, mask):
    """[R]: the lowest logit that counts in each draft row; -inf where masked or not given."""
    threshold = tl.full(mask.shape, NEG_INF, tl.float32)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + slot * max_drafts + step, mask=mask, other=NEG_INF)
    return threshold


@triton.jit
def draft_log_prob(draft_row, draft_ids, threshold, mask, ids, token, is_point_mass, logsumexp, inverse_temperature):
    """log q [R, N] at ids [R, N], -inf where masked: of what the threshold [R] leaves of the draft row, or of the point
    mass on `token` [R]. With draft_ids [R] the row holds candidates, whose ids stand there.
    """
    log_prob = tl.where(mask & (ids == token[:, None]), 0.0, NEG_INF)
    if draft_row is not None:
        from_row = mask & ~is_point_mass[:, None]
        if draft_ids is None:
            scores = load_kept(draft_row, ids, from_row, inverse_temperature, None, None, threshold)
        else:
            scores = load_candidates(draft_row, draft_ids, ids, from_row, inverse_temperature, threshold)
        of_row = scores - finite(logsumexp)[:, None]
        log_prob = tl.where(is_point_mass[:, None], log_prob, of_row)
    return log_prob


@triton.jit
def is_below_ratio(u, log_a, log_b):
    """u < a / b, in the form that gives True for equal a and b: see `reference._is_below_ratio`."""
    return (log_a > NEG_INF) & (tl.log(u) < log_a - finite(log_b))


@triton.jit
def draw_last_token(
    target_row,
    bitmask_ptr,
    bitmask_row,
    threshold,
    draft_row,
    draft_ids,
    draft_threshold,
    in_batch,
    is_read,
    from_residual,
    rejected,
    is_point_mass,
    is_greedy,
    block_logsumexp,
    logsumexp_p,
    logsumexp_q,
    inverse_target,
    inverse_draft,
    seed,
    position,
    num_thinning_rounds,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    """The token after the accepted ones [R], and whether thinning gave up on it.

    Every request draws from p. Where the token must come from max(0, p - q), a draw x is dropped with probability
    min(1, q(x) / p(x)) and drawn anew, num_thinning_rounds times at most: see `reference._sample_residual`. Four draws
    are made at once, [R, N, 4]: one after the other, each would wait for memory three times.
    """
    blocks, places = tl.arange(0, PADDED_BLOCKS)[None, :], tl.arange(0, SUB_BLOCK)[None, :]
    block_stream = tl.where(from_residual, THINNING_BLOCK, TARGET_BLOCK)[:, None]
    token_stream = tl.where(from_residual, THINNING_TOKEN, TARGET_TOKEN)[:, None]
    num_attempts = tl.where(from_residual, num_thinning_rounds, 1)
    token = tl.zeros_like(rejected)
    is_pending, is_dropped = in_batch & (num_attempts > 0), from_residual
    first = 0
    while from_first_lane(tl.max(is_pending.to(tl.int32), axis=0)) > 0:
        attempts = first + tl.arange(0, 4)[None, :]
        is_tried = is_pending[:, None] & (attempts < num_attempts[:, None])
        noisy = add_four_gumbels(block_logsumexp[:, :, None], seed, position, block_stream, blocks, first, is_greedy)
        block = tl.argmax(noisy, axis=1)
        ids = tl.reshape(block[:, None, :] * SUB_BLOCK + places[:, :, None], [block.shape[0], 4 * SUB_BLOCK])
        mask = tl.broadcast_to((is_read[:, None] & is_tried)[:, None, :], [block.shape[0], SUB_BLOCK, 4])
        mask = tl.reshape(mask, [block.shape[0], 4 * SUB_BLOCK]) & (ids < vocab_size)
        scores = load_kept(target_row, ids, mask, inverse_target, bitmask_ptr, bitmask_row, threshold)
        scores = tl.reshape(scores, [block.shape[0], SUB_BLOCK, 4])
        inside = tl.argmax(add_four_gumbels(scores, seed, position, token_stream, places, first, is_greedy), axis=1)
        draw = block * SUB_BLOCK + inside
        score = tl.max(tl.where(places[:, :, None] == inside[:, None, :], scores, NEG_INF), axis=1)
        log_p = score - finite(logsumexp_p)[:, None]
        log_q = draft_log_prob(
            draft_row, draft_ids, draft_threshold, is_tried & (is_read & from_residual)[:, None], draw, rejected,
            is_point_mass, logsumexp_q, inverse_draft,
        )  # fmt: skip
        u = four_uniforms(seed[:, None], position[:, None], THINNING_KEEP, tl.zeros_like(rejected)[:, None], first)
        is_below = is_below_ratio(tl.reshape(u, [block.shape[0], 4]), log_q, log_p)
        is_kept = is_tried & ~(from_residual[:, None] & is_below)
        # The first that is kept, or else the last that was tried.
        last = tl.minimum(num_attempts, first + 4)[:, None] - 1
        chosen = tl.min(tl.where(is_kept, attempts, last), axis=1)
        is_found = tl.max(is_kept.to(tl.int32), axis=1) > 0
        token = tl.where(is_pending, tl.max(tl.where(attempts == chosen[:, None], draw, -1), axis=1), token)
        first += 4
        is_dropped = is_dropped & ~is_found
        is_pending = is_pending & ~is_found & (first < num_attempts)
    return token, is_dropped


@triton.jit
def residual_of(
    target_row,
    bitmask_ptr,
    bitmask_row,
    threshold,
    draft_row,
    draft_ids,
    draft_threshold,
    mask,
    ids,
    token,
    is_point_mass,
    logsumexp_p,
    logsumexp_q,
    inverse_target,
    inverse_draft,
    vocab_size,
):
    """max(0, p - q) [R, N] at ids [1 or R, N]; 0 where masked."""
    mask = mask[:, None] & (ids < vocab_size)
    scores = load_kept(target_row, ids, mask, inverse_target, bitmask_ptr, bitmask_row, threshold)
    log_p = scores - finite(logsumexp_p)[:, None]
    log_q = draft_log_prob(
        draft_row, draft_ids, draft_threshold, mask, ids, token, is_point_mass, logsumexp_q, inverse_draft
    )
    return tl.maximum(tl.exp(log_p) - tl.exp(log_q), 0.0)


@triton.jit
def store_residual_sums(
    target_row,
    bitmask_ptr,
    bitmask_row,
    threshold,
    draft_row,
    draft_ids,
    draft_threshold,
    is_read,
    is_stored,
    token,
    is_point_mass,
    logsumexp_p,
    logsumexp_q,
    inverse_target,
    inverse_draft,
    tile,
    sums,
    num_blocks,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads one tile of R rows of p and of q and stores each sub-block's sum of max(0, p - q).

    sums: [R] pointers to each row's first sub-block; is_read, is_stored: [R], 0 is stored for what is not read.
    A few sub-blocks at once, each for a warp or two, as in `tile_ids`; flat, since from ids in that shape Triton would
    not make 128-bit loads here.
    """
    NUM_BLOCKS: tl.constexpr = min(TILE, 4)
    WIDTH: tl.constexpr = min(SUB_BLOCK, LOAD_BITS // target_row.dtype.element_ty.primitive_bitwidth)
    i = tl.arange(0, NUM_BLOCKS * SUB_BLOCK)
    offsets = i // WIDTH % NUM_BLOCKS * SUB_BLOCK + i // (WIDTH * NUM_BLOCKS) * WIDTH + i % WIDTH
    for first in range(tile * TILE, (tile + 1) * TILE, NUM_BLOCKS):
        residual = residual_of(
            target_row, bitmask_ptr, bitmask_row, threshold, draft_row, draft_ids, draft_threshold, is_read,
            (first * SUB_BLOCK + offsets)[None, :], token, is_point_mass, logsumexp_p, logsumexp_q, inverse_target,
            inverse_draft, vocab_size,
        )  # fmt: skip
        residual = tl.reshape(residual, [sums.shape[0], SUB_BLOCK // WIDTH, NUM_BLOCKS, WIDTH])
        of_blocks = tl.sum(tl.sum(residual, axis=1), axis=2)
        blocks = first + tl.arange(0, NUM_BLOCKS)[None, :]
        tl.store(sums[:, None] + blocks, of_blocks, mask=is_stored[:, None] & (blocks < num_blocks))


@triton.jit
def draw_from_residual(
    target_row,
    bitmask_ptr,
    bitmask_row,
    threshold,
    draft_row,
    draft_ids,
    draft_threshold,
    is_read,
    token,
    is_point_mass,
    block_sums,
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
    """[R]: a token from max(0, p - q), of whose sub-blocks block_sums [R, PADDED_BLOCKS] are the sums."""
    never_greedy = token < -1
    blocks, places = tl.arange(0, PADDED_BLOCKS)[None, :], tl.arange(0, SUB_BLOCK)[None, :]
    noisy = add_gumbel(tl.log(block_sums), seed, position, RESIDUAL_BLOCK, blocks, 0, never_greedy)
    block = tl.argmax(noisy, axis=1)
    ids = block[:, None] * SUB_BLOCK + places
    residual = residual_of(
        target_row, bitmask_ptr, bitmask_row, threshold, draft_row, draft_ids, draft_threshold, is_read, ids, token,
        is_point_mass, logsumexp_p, logsumexp_q, inverse_target, inverse_draft, vocab_size,
    )  # fmt: skip
    noisy = add_gumbel(tl.log(residual), seed, position, RESIDUAL_TOKEN, places, 0, never_greedy)
    return block * SUB_BLOCK + tl.argmax(noisy, axis=1)
