"""The draft sampler's one launch: tiles are reduced to sub-block statistics, the last tile of a row draws its token."""

import triton
import triton.language as tl

from vllm_bebop.kernels.device import (
    GREEDY_TEMPERATURE,
    NEG_INF,
    add_gumbel,
    finite,
    load_statistics,
    load_sub_block,
    merge_entropy,
    merge_logsumexp,
    pick,
    summarize_tile,
    take_ticket,
)


@triton.jit(do_not_specialize=["num_cached", "batch"])
def sample_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    cache_slot_stride,
    cache_step_stride,
    cache_logsumexp_ptr,
    cache_logsumexp_stride,
    cache_argmax_ptr,
    cache_argmax_stride,
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
    num_nan_ptr,
    is_empty_ptr,
    batch,
    vocab_size,
    num_blocks,
    SUB_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK_STREAM: tl.constexpr,
    TOKEN_STREAM: tl.constexpr,
):
    """Grid (tiles, groups of REQUESTS requests)."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    request = group * REQUESTS + tl.arange(0, REQUESTS)
    in_batch = request < batch
    slot = request.to(tl.int64)
    is_read = in_batch
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + request, mask=in_batch, other=-1).to(tl.int64)
        is_read = in_batch & (slot >= 0)
    temperature = tl.load(temperature_ptr + slot, mask=is_read, other=0.0)
    is_cached = is_read & (slot < num_cached)
    is_greedy = (temperature < GREEDY_TEMPERATURE) | ~is_cached
    inverse_temperature = tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))
    row = logits_ptr + request.to(tl.int64) * logits_stride
    statistics = statistics_ptr + request * num_blocks
    step = 0
    if step_ptr is not None:
        step = tl.load(step_ptr)

    logits, ids = summarize_tile(
        row, None, None, is_read, in_batch, inverse_temperature, is_greedy, tile, statistics, plane, num_blocks,
        vocab_size, SUB_BLOCK, TILE,
    )  # fmt: skip
    if cache_ptr is not None:
        cached = cache_ptr + slot * cache_slot_stride + step * cache_step_stride
        tl.store(cached[:, None, None] + ids, logits, mask=is_cached[:, None, None] & (ids < vocab_size))

    if take_ticket(tickets_ptr + group, tl.num_programs(0), 1) > 0:
        seed = tl.load(seeds_ptr + slot, mask=is_read, other=0)
        position = tl.load(positions_ptr + request, mask=in_batch, other=0).to(tl.int32)
        block_logsumexp = load_statistics(statistics, in_batch, num_blocks, PADDED_BLOCKS, NEG_INF)
        block_entropy = load_statistics(statistics + plane, in_batch, num_blocks, PADDED_BLOCKS, 0.0)
        num_nan = tl.sum(load_statistics(statistics + 2 * plane, in_batch, num_blocks, PADDED_BLOCKS, 0.0), axis=1)
        logsumexp = merge_logsumexp(block_logsumexp, is_greedy)
        entropy = merge_entropy(block_logsumexp, block_entropy, logsumexp, is_greedy)

        blocks = tl.arange(0, PADDED_BLOCKS)[None, :]
        noisy = add_gumbel(block_logsumexp, seed, position, BLOCK_STREAM, blocks, 0, is_greedy)
        block = tl.argmax(noisy, axis=1)
        scores, token_ids = load_sub_block(row, is_read, inverse_temperature, block, vocab_size, SUB_BLOCK)
        inside = tl.argmax(add_gumbel(scores, seed, position, TOKEN_STREAM, token_ids, 0, is_greedy), axis=1)
        log_prob = pick(scores, inside) - finite(logsumexp)

        largest = load_statistics(statistics + 3 * plane, in_batch, num_blocks, PADDED_BLOCKS, NEG_INF)
        top_block = tl.argmax(largest, axis=1)
        scores, _ = load_sub_block(row, is_read, inverse_temperature, top_block, vocab_size, SUB_BLOCK)
        argmax_id = (top_block * SUB_BLOCK + tl.argmax(scores, axis=1)).to(tl.int64)

        tl.store(token_ids_ptr + request, (block * SUB_BLOCK + inside).to(tl.int64), mask=in_batch)
        tl.store(argmax_ids_ptr + request, argmax_id, mask=in_batch)
        tl.store(logsumexp_ptr + request, logsumexp, mask=in_batch)
        tl.store(log_prob_ptr + request, log_prob, mask=in_batch)
        tl.store(entropy_ptr + request, entropy, mask=in_batch)
        tl.store(num_nan_ptr + request, num_nan.to(tl.int64), mask=in_batch)
        tl.store(is_empty_ptr + request, logsumexp == NEG_INF, mask=in_batch)
        if cache_logsumexp_ptr is not None:
            tl.store(cache_logsumexp_ptr + slot * cache_logsumexp_stride + step, logsumexp, mask=is_cached)
        if cache_argmax_ptr is not None:
            tl.store(cache_argmax_ptr + slot * cache_argmax_stride + step, argmax_id, mask=is_cached)
