"""The draft sampler: tiles are reduced to sub-block statistics, and the last program of a row draws its token.

Rows with top-k, top-p or min-p are drawn once more by a second launch, one program a row, which returns at once for all
others: the search for a threshold needs registers that the pass over the logits does better without.
"""

import triton
import triton.language as tl

from vllm_bebop.kernels.device import (
    GREEDY_TEMPERATURE,
    NEG_INF,
    add_gumbel,
    finish_statistics,
    finite,
    load_tile,
    merge_entropy,
    merge_logsumexp,
    pick,
    settle,
    summarize_tiles,
    take_ticket,
)
from vllm_bebop.kernels.filtering import find_threshold, has_filter, load_filters, load_kept_block


@triton.jit(do_not_specialize=["position_offset", "num_cached", "plane", "batch", "tiles_per_program"])
def sample_kernel(
    logits_ptr,
    logits_stride,
    ids_ptr,
    ids_stride,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    position_offset,
    rounds_ptr,
    slots_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    cache_ptr,
    cache_slot_stride,
    cache_step_stride,
    cache_logsumexp_ptr,
    cache_logsumexp_stride,
    cache_argmax_ptr,
    cache_argmax_stride,
    cache_threshold_ptr,
    cache_threshold_stride,
    cache_token_ids_ptr,
    cache_token_ids_stride,
    cache_positions_ptr,
    cache_positions_stride,
    step_ptr,
    num_cached,
    statistics_ptr,
    plane,
    tickets_ptr,
    token_ids_ptr,
    argmax_ids_ptr,
    logsumexp_ptr,
    log_prob_ptr,
    entropy_ptr,
    threshold_ptr,
    num_nan_ptr,
    is_empty_ptr,
    batch,
    vocab_size,
    num_blocks,
    tiles_per_program,
    FILTERED: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK_STREAM: tl.constexpr,
    TOKEN_STREAM: tl.constexpr,
):
    """Grid (programs of a row, tiles_per_program tiles each; groups of REQUESTS requests).

    With FILTERED, which is the second launch, a row has one program.
    """
    first_tile = tl.program_id(0) * tiles_per_program
    group = tl.program_id(1)
    request = group * REQUESTS + tl.arange(0, REQUESTS)
    in_batch = request < batch
    slot = request.to(tl.int64)
    is_read = in_batch
    if slots_ptr is not None:
        slot = settle(tl.load(slots_ptr + request, mask=in_batch, other=-1)).to(tl.int64)
        is_read = in_batch & (slot >= 0)
    is_cached = is_read & (slot < num_cached)
    row = logits_ptr + request.to(tl.int64) * logits_stride
    statistics = statistics_ptr + request * num_blocks
    step = 0
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.int64)

    if not FILTERED:  # before anything waits for slot and temperature: padding rows too, which count as empty later
        logits = load_tile(row, in_batch, first_tile * TILE, vocab_size, SUB_BLOCK, TILE)
    temperature = settle(tl.load(temperature_ptr + slot, mask=is_read, other=0.0))
    is_greedy = (temperature < GREEDY_TEMPERATURE) | ~is_cached
    inverse_temperature = tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))

    is_drawn = in_batch
    if FILTERED:
        top_k, top_p, min_p = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, slot, is_read)
        is_drawn = is_read & ~is_greedy & has_filter(top_k, top_p, min_p, vocab_size)
        is_last = tl.max(is_drawn.to(tl.int32), axis=0) > 0
    else:
        cached = None
        if cache_ptr is not None:
            cached = cache_ptr + slot * cache_slot_stride + step * cache_step_stride
        end_tile = tl.minimum(first_tile + tiles_per_program, tl.cdiv(num_blocks, TILE))
        summarize_tiles(
            logits, row, None, None, cached, is_cached, in_batch, in_batch, inverse_temperature, first_tile, end_tile,
            statistics, plane, num_blocks, vocab_size, SUB_BLOCK, TILE,
        )  # fmt: skip
        is_last = take_ticket(tickets_ptr + group, tl.num_programs(0), 1) > 0

    if is_last:
        seed = tl.load(seeds_ptr + slot, mask=is_read, other=0)
        position = tl.load(positions_ptr + request, mask=in_batch, other=0).to(tl.int32) + position_offset
        attempt = 0
        if rounds_ptr is not None:
            attempt = tl.load(rounds_ptr + request, mask=in_batch, other=0).to(tl.int32)[:, None]
        block_logsumexp, block_entropy, num_nan, largest = finish_statistics(
            statistics, plane, is_read, inverse_temperature, is_greedy, num_blocks, PADDED_BLOCKS
        )
        if not FILTERED:
            tl.store(num_nan_ptr + request, tl.sum(num_nan, axis=1).to(tl.int64), mask=in_batch)
        threshold = tl.zeros([REQUESTS], tl.float32) + NEG_INF
        if FILTERED:
            threshold, block_logsumexp, block_entropy = find_threshold(
                row, is_drawn, inverse_temperature, None, None, top_k, top_p, min_p, largest, block_logsumexp,
                block_entropy, vocab_size, SUB_BLOCK,
            )  # fmt: skip
        # Under way while the token's own sub-block is drawn.
        top_block = tl.argmax(largest, axis=1)
        top_scores = load_kept_block(
            row, top_block, is_read, inverse_temperature, None, None, threshold, vocab_size, SUB_BLOCK
        )
        blocks, places = tl.arange(0, PADDED_BLOCKS)[None, :], tl.arange(0, SUB_BLOCK)[None, :]
        noisy = add_gumbel(block_logsumexp, seed, position, BLOCK_STREAM, blocks, attempt, is_greedy)
        block = tl.argmax(noisy, axis=1)
        scores = load_kept_block(row, block, is_read, inverse_temperature, None, None, threshold, vocab_size, SUB_BLOCK)
        inside = tl.argmax(add_gumbel(scores, seed, position, TOKEN_STREAM, places, attempt, is_greedy), axis=1)
        argmax_id = (top_block * SUB_BLOCK + tl.argmax(top_scores, axis=1)).to(tl.int64)
        logsumexp = merge_logsumexp(block_logsumexp, is_greedy)
        entropy = merge_entropy(block_logsumexp, block_entropy, logsumexp, is_greedy)
        log_prob = pick(scores, inside) - finite(logsumexp)

        token = (block * SUB_BLOCK + inside).to(tl.int64)
        if ids_ptr is not None:
            token = tl.load(ids_ptr + request.to(tl.int64) * ids_stride + token, mask=is_read, other=0).to(tl.int64)
            token = tl.maximum(token, 0)  # of an empty row's missing entry
        tl.store(token_ids_ptr + request, token, mask=is_drawn)
        tl.store(argmax_ids_ptr + request, argmax_id, mask=is_drawn)
        tl.store(logsumexp_ptr + request, logsumexp, mask=is_drawn)
        tl.store(log_prob_ptr + request, log_prob, mask=is_drawn)
        tl.store(entropy_ptr + request, entropy, mask=is_drawn)
        tl.store(threshold_ptr + request, threshold, mask=is_drawn)
        tl.store(is_empty_ptr + request, logsumexp == NEG_INF, mask=is_drawn)
        is_kept = is_drawn & is_cached
        if cache_logsumexp_ptr is not None:
            tl.store(cache_logsumexp_ptr + slot * cache_logsumexp_stride + step, logsumexp, mask=is_kept)
        if cache_argmax_ptr is not None:
            tl.store(cache_argmax_ptr + slot * cache_argmax_stride + step, argmax_id, mask=is_kept)
        if cache_threshold_ptr is not None:
            tl.store(cache_threshold_ptr + slot * cache_threshold_stride + step, threshold, mask=is_kept)
        if cache_token_ids_ptr is not None:
            tl.store(cache_token_ids_ptr + slot * cache_token_ids_stride + step, token, mask=is_kept)
        if cache_positions_ptr is not None:
            tl.store(cache_positions_ptr + slot * cache_positions_stride + step, position.to(tl.int64), mask=is_kept)
