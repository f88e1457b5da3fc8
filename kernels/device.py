"""Device functions of the samplers' kernels: scores, noise, statistics of sub-blocks and how a row's are merged.

    L_j = log sum_{v in j} e^z_v         H_j = entropy inside sub-block j       (from sums stored per sub-block)
    L   = log sum_j e^L_j                H   = sum_j P_j (H_j - log P_j),  P_j = e^(L_j - L)

A greedy row (T < 1e-5) is the limit T -> 0 of that: L_j is the sub-block's largest logit, and no noise is added.
In shapes, R is requests per program, NB sub-blocks per row (padded to a power of two).
"""

import math

import torch
import triton
import triton.language as tl

from vllm_bebop.kernels import reference

NUM_STATISTICS = 4  # planes, see `summarize_tiles`

NEG_INF = tl.constexpr(float("-inf"))
MAX_SCORE = tl.constexpr(reference.MAX_SCORE)
GREEDY_TEMPERATURE = tl.constexpr(reference.GREEDY_TEMPERATURE)
ON_AMD = tl.constexpr(torch.version.hip is not None)
LOAD_BITS = tl.constexpr(8192 if ON_AMD else 4096)  # that a warp's lanes load at once, 128 each
MAX_PLAIN = tl.constexpr(2.0**14)  # of |m c|: up to there, the rounding of o takes at most 2**-11 from t_v
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


@triton.jit
def to_scores(logits, inverse_temperature):
    """fp32 logits / T, NaN as -inf, at most MAX_SCORE. A product with 1 / T: a division costs eight instructions."""
    scores = logits.to(tl.float32) * inverse_temperature
    return tl.minimum(tl.where(scores == scores, scores, NEG_INF), MAX_SCORE)


IS_INTERPRETED = tl.constexpr(not isinstance(to_scores, triton.JITFunction))


@triton.jit
def finite(x):
    """0 for -inf, as the number to subtract: -inf - (-inf) would be NaN."""
    return tl.where(x > NEG_INF, x, 0.0)


@triton.jit
def _to_uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23


@triton.jit
def uniform(seed, position, stream, index, attempt):
    """`philox.uniform`: fp32 in (0, 1). seed int64, position, index and attempt int32, broadcastable."""
    word0, word1, word2, word3 = tl.philox(seed, index, position, stream, attempt >> 2)
    even, odd = tl.where((attempt & 2) == 0, word0, word2), tl.where((attempt & 2) == 0, word1, word3)
    return _to_uniform(tl.where((attempt & 1) == 0, even, odd))


@triton.jit
def four_uniforms(seed, position, stream, index, first_attempt):
    """[R, N, 4] of attempts first_attempt, a multiple of 4, and the three after it, for the work of one.

    seed, position: [R, 1]; index: [1 or R, N].
    """
    word0, word1, word2, word3 = tl.philox(seed, index, position, stream, first_attempt >> 2)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    return _to_uniform(tl.reshape(words, [words.shape[0], words.shape[1], 4]))


@triton.jit
def add_gumbel(scores, seed, position, stream, index, attempt, is_greedy):
    """scores [R, N] plus a Gumbel number each, or as they are in greedy rows. index: [1 or R, N] int32."""
    u = uniform(seed[:, None], position[:, None], stream, index, attempt)
    return tl.where(is_greedy[:, None], scores, scores - tl.log(-tl.log(u)))


@triton.jit
def add_four_gumbels(scores, seed, position, stream, index, first_attempt, is_greedy):
    """`add_gumbel` for four attempts: scores [R, N, 1 or 4], result [R, N, 4]."""
    u = four_uniforms(seed[:, None], position[:, None], stream, index, first_attempt)
    return tl.where(is_greedy[:, None, None], scores, scores - tl.log(-tl.log(u)))


@triton.jit
def is_allowed(bitmask_rows, ids, mask):
    """Whether bit id % 32 of word id // 32 is set; pointers to int32 words and ids broadcast. False where masked."""
    words = tl.load(bitmask_rows + (ids >> 5), mask=mask, other=0)
    return ((words >> (ids & 31)) & 1) != 0


@triton.jit
def settle(x):
    """x [R]; if R is 1, made of one number, or it would be loaded and computed again for each layout it is used in."""
    if x.shape[0] == 1:
        return tl.full([1], tl.max(x, axis=0), x.dtype)
    else:
        return x


@triton.jit
def load_policy(temperature_ptr, target_is_processed, one_hot_ptr, request, slot, is_request, num_cached):
    """[R] each: whether the request is greedy, 1 / T for target and for draft rows, whether q is a point mass."""
    temperature = settle(tl.load(temperature_ptr + slot, mask=is_request, other=0.0))
    is_greedy = temperature < GREEDY_TEMPERATURE
    inverse_draft = tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))
    inverse_target = tl.where(target_is_processed != 0, 1.0, inverse_draft)
    # A greedy request accepts iff the token is the argmax, whatever q was: q as a point mass says just that.
    is_point_mass = is_greedy | (slot >= num_cached)
    if one_hot_ptr is not None:
        is_point_mass = is_point_mass | tl.load(one_hot_ptr + request, mask=is_request, other=False)
    return is_greedy, inverse_target, inverse_draft, is_point_mass


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max_or_nan(x, axis: tl.constexpr):
    if IS_INTERPRETED:  # where any reduction but the built-in ones is a loop over elements
        return tl.max(tl.where(x == x, x, float("inf")), axis=axis)
    else:
        return tl.reduce(x, axis, _larger_or_nan)


@triton.jit
def _exp2(x):
    """2^x, 0 where it is below fp32's normal numbers: with those, it takes four instructions instead of one."""
    if IS_INTERPRETED or ON_AMD:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def from_first_lane(x):
    """A scalar int32 that all lanes of a program have, so that the compiler sees it too: they branch together.

    For branches around much code, which Triton 3.8 otherwise makes ready for lanes that part, with 60 registers more.
    """
    if IS_INTERPRETED or ON_AMD:
        return x
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def load_tile(rows, is_read, first_block, vocab_size, SUB_BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Logits of R rows in NUM_BLOCKS sub-blocks from the first_block-th; -inf where masked or past the row's end.

    rows: [R] pointers to each row's first logit. is_read: [R]. Shaped as `tile_ids`.
    """
    ids, in_row = tile_ids(rows, is_read, first_block, vocab_size, SUB_BLOCK, NUM_BLOCKS)
    return tl.load(rows[:, None, None] + ids, mask=in_row, other=NEG_INF, cache_modifier=".cg")


@triton.jit
def tile_ids(rows, is_read, first_block, vocab_size, SUB_BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The ids of what `load_tile` loads, and which of them there are. Of rows [R], only the type of the logits counts.

    Shaped [1 or R, PARTS * NUM_BLOCKS, WIDTH], WIDTH being what the lanes of a warp load at once. The first parts of
    all sub-blocks come first, then the second ones: with these strides all parts of a sub-block fall to the same warp.
    """
    WIDTH: tl.constexpr = min(SUB_BLOCK, LOAD_BITS // rows.dtype.element_ty.primitive_bitwidth)
    part = tl.arange(0, SUB_BLOCK // WIDTH * NUM_BLOCKS)
    first_ids = (first_block + part % NUM_BLOCKS) * SUB_BLOCK + part // NUM_BLOCKS * WIDTH
    ids = (first_ids[:, None] + tl.arange(0, WIDTH)[None, :])[None, :, :]
    return ids, is_read[:, None, None] & (ids < vocab_size)


@triton.jit
def summarize_tiles(
    logits,
    rows,
    bitmask_ptr,
    bitmask_row,
    copies,
    is_copied,
    is_read,
    is_stored,
    inverse_temperature,
    first_tile,
    end_tile,
    statistics,
    plane,
    num_blocks,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Stores what `finish_statistics` reads of each sub-block of the tiles from first_tile to before end_tile,

        sum_v w_v,   sum_v w_v t_v,   the number of NaN,   m = max_v x_v,
        w_v = 2^t_v,   t_v = x_v c - o,   c = log2(e) / T,   o = m c rounded: one multiply-add a logit,

    exact but for what the rounding of o took from all of them; `finish_statistics` gives that back.

    A GPU has time for a dozen instructions per logit here while the next ones arrive; hence a sub-block for a warp, the
    next tile under way while one is summarized, and another pass, which reads the tiles again, for what only a few rows
    have: NaN, and numbers too large for t_v.

    logits: of the first tile, from `load_tile`; rows: [R] pointers to each row's first one. statistics: [R] pointers to
    each row's first sub-block in plane 0. bitmask_ptr, bitmask_row: words of allowed tokens and each row's first one
    [R]; or None. copies: [R] pointers to where logits are copied, of rows that are is_copied [R]; or None. is_stored:
    [R]; a row that is stored but not read counts as empty.
    """
    steepness = inverse_temperature[:, None]
    are_plain = tl.full([rows.shape[0], TILE], 1, tl.int32)
    for tile in range(first_tile, end_tile):
        is_next = is_read & (tile + 1 < end_tile)
        following = load_tile(rows, is_next, (tile + 1) * TILE, vocab_size, SUB_BLOCK, TILE)
        ids, in_row = tile_ids(rows, is_read, tile * TILE, vocab_size, SUB_BLOCK, TILE)
        if copies is not None:
            tl.store(copies[:, None, None] + ids, logits, mask=in_row & is_copied[:, None, None])
        values = _by_sub_block(logits, ids, in_row, bitmask_ptr, bitmask_row, TILE)
        largest = _max_or_nan(_max_or_nan(values, 1), 2)
        are_plain &= _is_plain(largest, steepness).to(tl.int32)
        factor = tl.zeros_like(largest) + steepness * LOG2_E
        _store_sums(
            values, tl.zeros_like(largest), largest, factor, finite(largest) * factor, is_stored, tile * TILE,
            statistics, plane, num_blocks,
        )  # fmt: skip
        logits = following
    if from_first_lane(tl.min(tl.min(are_plain, axis=1), axis=0)) == 0:
        tl.debug_barrier()  # all warps have stored what is overwritten here
        for first in range(first_tile * TILE, end_tile * TILE, min(TILE, 8)):
            _summarize_with_care(
                rows, bitmask_ptr, bitmask_row, is_read, is_stored, steepness, first, statistics, plane, num_blocks,
                vocab_size, SUB_BLOCK, min(TILE, 8),
            )  # fmt: skip


@triton.jit
def _summarize_with_care(
    rows,
    bitmask_ptr,
    bitmask_row,
    is_read,
    is_stored,
    steepness,
    first,
    statistics,
    plane,
    num_blocks,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """The same of NUM_BLOCKS sub-blocks, from the rows themselves. Those that need no care get the same numbers."""
    logits = load_tile(rows, is_read, first, vocab_size, SUB_BLOCK, NUM_BLOCKS)
    ids, in_row = tile_ids(rows, is_read, first, vocab_size, SUB_BLOCK, NUM_BLOCKS)
    values = _by_sub_block(logits, ids, in_row, bitmask_ptr, bitmask_row, NUM_BLOCKS)
    is_plain = _is_plain(_max_or_nan(_max_or_nan(values, 1), 2), steepness)
    num_nan = tl.sum(tl.sum((values != values).to(tl.float32), axis=1), axis=2)
    values = to_scores(values, 1.0)
    largest = tl.max(tl.max(values, axis=1), axis=2)
    top = finite(to_scores(largest, steepness))
    below = to_scores(values, steepness[:, :, None, None]) - top[:, None, :, None]
    values = tl.where(is_plain[:, None, :, None], values, below)
    factor = tl.where(is_plain, steepness * LOG2_E, LOG2_E)
    offset = tl.where(is_plain, finite(largest) * factor, 0.0)
    _store_sums(values, num_nan, largest, factor, offset, is_stored, first, statistics, plane, num_blocks)


@triton.jit
def _by_sub_block(logits, ids, in_row, bitmask_ptr, bitmask_row, NUM_BLOCKS: tl.constexpr):
    """fp32 logits [R, PARTS, NUM_BLOCKS, WIDTH] of what `load_tile` returned, -inf where the bitmask forbids."""
    values = logits.to(tl.float32)
    if bitmask_ptr is not None:
        values = tl.where(is_allowed((bitmask_ptr + bitmask_row)[:, None, None], ids, in_row), values, NEG_INF)
    return tl.reshape(values, [logits.shape[0], logits.shape[1] // NUM_BLOCKS, NUM_BLOCKS, logits.shape[2]])


@triton.jit
def _is_plain(largest, steepness):
    """Whether no logit of a sub-block is NaN, and none so large that t_v or its rounding is."""
    return (tl.abs(largest * (steepness * LOG2_E)) <= MAX_PLAIN) | (largest == NEG_INF)


@triton.jit
def _store_sums(values, num_nan, largest, factor, offset, is_stored, first_block, statistics, plane, num_blocks):
    """See `summarize_tiles`. values: [R, PARTS, NB, WIDTH]; num_nan, largest, factor, offset: [R, NB]."""
    nothing = tl.zeros_like(values)  # `tl.fma` does not broadcast
    exponents = tl.fma(values, nothing + factor[:, None, :, None], nothing - offset[:, None, :, None])
    exponents = tl.maximum(exponents, -1000.0)  # weights of -inf and NaN are 0, and so is their part of the moment
    weights = _exp2(exponents)
    total = tl.sum(tl.sum(weights, axis=1), axis=2)
    moment = tl.sum(tl.sum(weights * exponents, axis=1), axis=2)
    found = tl.join(tl.join(total, num_nan), tl.join(moment, largest))  # the lanes exchange them all at once
    blocks = first_block + tl.arange(0, largest.shape[1])[None, :]
    planes = 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]
    out = (statistics[:, None] + blocks)[:, :, None, None] + (planes * plane)[None, None, :, :]
    tl.store(out, found, mask=(is_stored[:, None] & (blocks < num_blocks))[:, :, None, None])


@triton.jit
def take_ticket(ticket, num_arrivals, amount):
    """Arrivals add `amount` (1 plus any multiple of 2**16). Returns the sum for the last of num_arrivals, else 0.

    The last one sees what the others stored: the barrier orders the stores of all threads before the ticket of one, and
    the ticket releases and acquires on the device. The last one leaves 0 for the next launch.
    """
    if ON_AMD:  # where a barrier waits for no stores to global memory: each wave first waits for its own
        wait: tl.constexpr = "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1"  # an operand goes in and out because one has to
        tl.inline_asm_elementwise(wait, "=v,v,~{memory}", [amount], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    total = tl.atomic_add(ticket, amount, sem="acq_rel", scope="gpu") + amount
    is_last = (total & 0xFFFF) == num_arrivals
    if is_last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return tl.where(is_last, total, 0)


@triton.jit
def load_statistics(statistics, mask, num_blocks, PADDED_BLOCKS: tl.constexpr, other: tl.constexpr):
    """[R, NB]: one plane of each row's statistics. Past the L1 cache, which other programs' stores do not reach."""
    blocks = tl.arange(0, PADDED_BLOCKS)[None, :]
    return tl.load(
        statistics[:, None] + blocks, mask=mask[:, None] & (blocks < num_blocks), other=other, cache_modifier=".cg"
    )


@triton.jit
def finish_statistics(statistics, plane, mask, inverse_temperature, is_greedy, num_blocks, PADDED_BLOCKS: tl.constexpr):
    """L_j and H_j of what `summarize_tiles` stored, the number of NaN and the largest logit: [R, NB] each."""
    total = load_statistics(statistics, mask, num_blocks, PADDED_BLOCKS, 1.0)
    moment = load_statistics(statistics + plane, mask, num_blocks, PADDED_BLOCKS, 0.0)
    num_nan = load_statistics(statistics + 2 * plane, mask, num_blocks, PADDED_BLOCKS, 0.0)
    largest = load_statistics(statistics + 3 * plane, mask, num_blocks, PADDED_BLOCKS, NEG_INF)
    steepness = inverse_temperature[:, None]
    factor = steepness * LOG2_E
    offset = finite(largest) * factor
    lost = tl.where(_is_plain(largest, steepness) & (num_nan == 0), tl.fma(finite(largest), factor, -offset), 0.0)
    total = tl.maximum(total, 0.5)  # about 1 at least, but where nothing is
    log_total = tl.log(total)
    score = tl.where(largest > NEG_INF, to_scores(largest, steepness), NEG_INF)
    logsumexp = tl.where(is_greedy[:, None], score, score + (log_total - lost * LN_2))
    return logsumexp, log_total - moment / total * LN_2, num_nan, largest


@triton.jit
def merge_logsumexp(block_logsumexp, is_greedy):
    """[R]: logsumexp of rows from that of their sub-blocks [R, NB]; -inf for an empty row, the maximum if greedy."""
    largest = tl.max(block_logsumexp, axis=1)
    total = tl.sum(tl.exp(block_logsumexp - finite(largest)[:, None]), axis=1)
    return tl.where(is_greedy, largest, largest + tl.log(tl.maximum(total, 1.0)))


@triton.jit
def merge_entropy(block_logsumexp, block_entropy, logsumexp, is_greedy):
    """[R]: sum_j P_j (H_j - log P_j) in nats (Eq. 4); 0 for greedy and for empty rows."""
    log_prob = tl.maximum(block_logsumexp - finite(logsumexp)[:, None], -1e4)  # probability 0 times -inf would be NaN
    entropy = tl.sum(tl.exp(log_prob) * (block_entropy - log_prob), axis=1)
    return tl.where(is_greedy, 0.0, entropy)


@triton.jit
def pick(values, candidates):
    """[R]: values [R, N] at candidates [R], an index into the second axis."""
    index = tl.arange(0, values.shape[1])[None, :]
    return tl.max(tl.where(index == candidates[:, None], values, NEG_INF), axis=1)
