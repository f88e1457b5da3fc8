"""Device functions of the samplers' kernels: scores, noise, statistics of sub-blocks and how a row's are merged.

    L_j = log sum_{v in j} e^z_v         H_j = entropy inside sub-block j             (stored per sub-block)
    L   = log sum_j e^L_j                H   = sum_j P_j (H_j - log P_j),  P_j = e^(L_j - L)

A greedy row (T < 1e-5) is the limit T -> 0 of that: L_j is the sub-block's largest logit, and no noise is added.
In shapes, R is requests per program, NB sub-blocks per row (padded to a power of two).
"""

import torch
import triton
import triton.language as tl

from vllm_bebop.kernels import reference

NUM_STATISTICS = 4  # planes of the statistics: logsumexp, entropy, number of NaN, largest logit before temperature

NEG_INF = tl.constexpr(float("-inf"))
MAX_SCORE = tl.constexpr(reference.MAX_SCORE)
GREEDY_TEMPERATURE = tl.constexpr(reference.GREEDY_TEMPERATURE)
ON_AMD = tl.constexpr(torch.version.hip is not None)


@triton.jit
def to_scores(logits, inverse_temperature):
    """fp32 logits / T, NaN as -inf, at most MAX_SCORE. A product with 1 / T: a division costs eight instructions."""
    scores = logits.to(tl.float32) * inverse_temperature
    return tl.minimum(tl.where(scores == scores, scores, NEG_INF), MAX_SCORE)


@triton.jit
def finite(x):
    """0 for -inf, as the number to subtract: -inf - (-inf) would be NaN."""
    return tl.where(x > NEG_INF, x, 0.0)


@triton.jit
def uniform(seed, position, stream, index, attempt):
    """`philox.uniform`: fp32 in (0, 1). seed int64, position and index int32, broadcastable."""
    word, _, _, _ = tl.philox(seed, index, position, stream, attempt)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23


@triton.jit
def add_gumbel(scores, seed, position, stream, index, attempt, is_greedy):
    """scores [R, N] plus a Gumbel number each, or as they are in greedy rows. index: [1 or R, N] int32."""
    u = uniform(seed[:, None], position[:, None], stream, index, attempt)
    return tl.where(is_greedy[:, None], scores, scores - tl.log(-tl.log(u)))


@triton.jit
def is_allowed(bitmask_rows, ids, mask):
    """Whether bit id % 32 of word id // 32 is set; pointers to int32 words and ids broadcast. False where masked."""
    words = tl.load(bitmask_rows + (ids >> 5), mask=mask, other=0)
    return ((words >> (ids & 31)) & 1) != 0


@triton.jit
def summarize(scores, largest, axis: tl.constexpr):
    """log sum exp(score - largest) and entropy in nats along `axis`; 0 and 0 where all are -inf."""
    below = scores - tl.expand_dims(finite(largest), axis)
    weight = tl.exp(below)
    # A sub-block that is not empty has a sum of at least 1, so the clamp only keeps the logarithm of an empty one at 0.
    total = tl.maximum(tl.sum(weight, axis=axis), 1.0)
    log_total = tl.log(total)
    mean_below = tl.sum(weight * tl.maximum(below, -1e4), axis=axis) / total  # weight 0 times -inf would be NaN
    return log_total, log_total - mean_below


@triton.jit
def summarize_tile(
    rows,
    bitmask_ptr,
    bitmask_row,
    is_read,
    is_stored,
    inverse_temperature,
    is_greedy,
    tile,
    statistics,
    plane,
    num_blocks,
    vocab_size,
    SUB_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads one tile of R rows and stores its statistics; returns the raw logits and their ids [.., TILE, SUB_BLOCK].

    rows: [R] pointers to each row's first logit; statistics: [R] pointers to each row's first sub-block in plane 0.
    bitmask_ptr, bitmask_row: words of allowed tokens and each row's first one [R]; or None.
    is_read, is_stored: [R]; a row that is stored but not read counts as empty.
    """
    blocks = tile * TILE + tl.arange(0, TILE)[None, :]
    ids = (blocks * SUB_BLOCK)[:, :, None] + tl.arange(0, SUB_BLOCK)[None, None, :]
    in_row = is_read[:, None, None] & (ids < vocab_size)
    logits = tl.load(rows[:, None, None] + ids, mask=in_row, other=NEG_INF, cache_modifier=".cg")
    values = logits.to(tl.float32)
    if bitmask_ptr is not None:
        values = tl.where(is_allowed(bitmask_ptr + bitmask_row[:, None, None], ids, in_row), values, NEG_INF)
    is_nan = (values != values).to(tl.int32)
    values = to_scores(values, 1.0)
    largest_logit = tl.max(values, axis=2)
    largest = to_scores(largest_logit, inverse_temperature[:, None])
    scores = to_scores(values, inverse_temperature[:, None, None])
    num_nan = tl.sum(is_nan, axis=2)
    log_total, entropy = summarize(scores, largest, 2)

    mask = is_stored[:, None] & (blocks < num_blocks)
    out = statistics[:, None] + blocks
    tl.store(out, tl.where(is_greedy[:, None], largest, largest + log_total), mask=mask)
    tl.store(out + plane, entropy, mask=mask)
    tl.store(out + 2 * plane, num_nan.to(tl.float32), mask=mask)
    tl.store(out + 3 * plane, largest_logit, mask=mask)
    return logits, ids


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
