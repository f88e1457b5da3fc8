"""Drawing one token per request from raw logits in one launch: the draft step, and target tokens without a draft.

Every logit is read once. A program reduces a tile of 16 sub-blocks of 512 logits to a few numbers each; the last tile
of a request to arrive merges them and draws the sub-block, then the token inside it, for which it reads that one
sub-block again. Scheme, random streams and counters are those of `reference.sample_reference`, and so are the tokens:

    L_j = log sum_{v in j} e^z_v         H_j = entropy inside sub-block j             (stored per sub-block)
    L   = log sum_j e^L_j                H   = sum_j P_j (H_j - log P_j),  P_j = e^(L_j - L)
    j   = argmax_j L_j + G_j             v   = argmax_{v in j} z_v + G_v              (G: standard Gumbel numbers)

A greedy row (T < 1e-5) is the limit T -> 0 of that: L_j is the sub-block's largest logit, and no noise is added.

The partition is fixed, never tuned by batch size: a request's token does not depend on its neighbours. Finding the last
tile takes one atomic ticket per tile; nothing spins. Several requests may share a program: one on a GPU, thousands in
Triton's interpreter, whose cost is per operation and not per element.

The device functions here serve `verification` too. In their shapes R is requests per program, NB sub-blocks per row
(padded to a power of two).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_bebop.kernels import reference
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import DraftSample

TILE = 16  # sub-blocks that one program reads
NUM_STATISTICS = 4  # planes of the statistics: logsumexp, entropy, number of NaN, maximum
INTERPRETER_ELEMENTS = 2**19  # logits that one interpreted program reads

NEG_INF = tl.constexpr(float("-inf"))
MAX_SCORE = tl.constexpr(reference.MAX_SCORE)
GREEDY_TEMPERATURE = tl.constexpr(reference.GREEDY_TEMPERATURE)


@dataclass(frozen=True)
class FusedDraftSample(DraftSample):
    """`DraftSample` in fp32, and the token that greedy drafting would have proposed."""

    argmax_ids: Tensor  # [B] int64, argmax q, the lowest id on ties (Eq. 1)


class SamplingWorkspace:
    """Scratch and outputs of `sample` for up to max_batch requests, so that a captured CUDA graph allocates nothing.

    The tensors of a result made with a workspace are views of it: the next call overwrites them.
    Memory: 16 bytes per request and sub-block (about 4.8 kB per request at 151,936 tokens).
    """

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device | str) -> None:
        self.max_batch, self.vocab_size = max_batch, vocab_size
        _, num_blocks = partition(vocab_size)
        self.statistics = torch.empty(NUM_STATISTICS, max_batch, num_blocks, dtype=torch.float32, device=device)
        self.tickets = torch.zeros(max_batch, dtype=torch.int32, device=device)  # each launch leaves zeros behind
        self.token_ids, self.argmax_ids, self.num_nan = torch.empty(3, max_batch, dtype=torch.int64, device=device)
        self.logsumexp, self.log_prob, self.entropy = torch.empty(3, max_batch, dtype=torch.float32, device=device)
        self.is_empty = torch.empty(max_batch, dtype=torch.bool, device=device)

    def outputs(self, batch: int) -> FusedDraftSample:
        return FusedDraftSample(
            token_ids=self.token_ids[:batch],
            logsumexp=self.logsumexp[:batch],
            log_prob=self.log_prob[:batch],
            entropy_nats=self.entropy[:batch],
            num_nan=self.num_nan[:batch],
            is_empty=self.is_empty[:batch],
            argmax_ids=self.argmax_ids[:batch],
        )


def sample(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    slots: Tensor | None = None,
    streams: tuple[Stream, Stream] = (Stream.DRAFT_BLOCK, Stream.DRAFT_TOKEN),
    cache: Tensor | None = None,
    cache_logsumexp: Tensor | None = None,
    cache_argmax: Tensor | None = None,
    step: Tensor | None = None,
    workspace: SamplingWorkspace | None = None,
) -> FusedDraftSample:
    """Draws one token per row from softmax(logits / temperature), in one launch and one pass (arXiv:2606.12370, G).

    Args:
        logits: [B, V] bf16, fp16 or fp32, before temperature; unit stride inside a row, any stride between rows.
        temperature: [B] fp32, or [num_slots] with `slots`. Below 1e-5 is greedy: argmax, the lowest id on ties.
        seeds: [B] int64, or [num_slots] with `slots`.
        positions: [B] int32 or int64, absolute position of the token being drawn.
        slots: [B] int32 or int64, where each row finds its temperature, its seed and its place in the caches. -1 marks
            a padding row of a captured batch: its logits are not read, its token is 0, its caches stay untouched.
        streams: random streams for the sub-block and for the token.
        cache: [num_slots, max_drafts, V], dtype of `logits`: row [slot, step] receives a copy of the logits. Not needed
            where the logits already are a view of it.
        cache_logsumexp, cache_argmax: [num_slots, max_drafts] fp32 and int64: [slot, step] receives the row's logsumexp
            (of logits / T) and argmax, for `verification.verify`. Without slots the caches are indexed by row; with
            slots they may have spare rows.
        step: scalar integer tensor on the device, required with any cache.
        workspace: scratch and outputs to reuse; without it they are allocated.
    Returns:
        FusedDraftSample.
    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the argument.
    Memory: see SamplingWorkspace.
    Reference: kernels.reference.sample_reference
    """
    check_rows("logits", logits, (None, None), logits.device)
    (batch, vocab_size), device = logits.shape, logits.device
    num_slots = check_requests(batch, device, temperature, seeds, positions, slots)
    for name, tensor, shape, dtype in (
        ("cache", cache, (None, None, vocab_size), logits.dtype),
        ("cache_logsumexp", cache_logsumexp, (None, None), torch.float32),
        ("cache_argmax", cache_argmax, (None, None), torch.int64),
    ):
        if tensor is None:
            continue
        reference._check(name, tensor, shape, dtype, device)
        check_num_rows(name, tensor, num_slots, slots)
        if step is None:
            raise ValueError(f"step is needed to write {name}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} is not contiguous in its last dimension")
    if step is not None:
        check_integers("step", step, (), device)
    if workspace is None:
        workspace = SamplingWorkspace(batch, vocab_size, device)
    elif workspace.max_batch < batch or workspace.vocab_size != vocab_size or workspace.tickets.device != device:
        raise ValueError(f"workspace does not fit {batch} rows of {vocab_size} logits on {device}")
    out = workspace.outputs(batch)
    if batch == 0:
        return out

    sub_block, num_blocks = partition(vocab_size)
    tile = min(TILE, triton.next_power_of_2(num_blocks))
    per_program = requests_per_program(batch, tile * sub_block)
    cache_strides = (0, 0) if cache is None else cache.stride()[:2]
    _sample_kernel[(triton.cdiv(num_blocks, tile), triton.cdiv(batch, per_program))](
        logits,
        logits.stride(0),
        temperature,
        seeds,
        positions,
        slots,
        cache,
        *cache_strides,
        cache_logsumexp,
        0 if cache_logsumexp is None else cache_logsumexp.stride(0),
        cache_argmax,
        0 if cache_argmax is None else cache_argmax.stride(0),
        step,
        workspace.statistics,
        workspace.statistics.stride(0),
        workspace.tickets,
        out.token_ids,
        out.argmax_ids,
        out.logsumexp,
        out.log_prob,
        out.entropy_nats,
        out.num_nan,
        out.is_empty,
        batch,
        vocab_size,
        num_blocks,
        SUB_BLOCK=sub_block,
        TILE=tile,
        PADDED_BLOCKS=triton.next_power_of_2(num_blocks),
        REQUESTS=per_program,
        BLOCK_STREAM=int(streams[0]),
        TOKEN_STREAM=int(streams[1]),
        num_warps=8,
    )
    return out


def partition(vocab_size: int) -> tuple[int, int]:
    """Width and number of sub-blocks, as in the reference; a single small one is padded to a power of two."""
    width = min(reference.SUB_BLOCK, triton.next_power_of_2(vocab_size))
    return width, triton.cdiv(vocab_size, width)


def requests_per_program(batch: int, tile_size: int) -> int:
    """1 on a GPU. Interpreted, as many as keep a program's tile near INTERPRETER_ELEMENTS."""
    if isinstance(_sample_kernel, triton.JITFunction):
        return 1
    return max(1, min(triton.next_power_of_2(batch), INTERPRETER_ELEMENTS // tile_size))


def check_rows(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Raises ValueError unless `tensor` holds logits that the kernels can read."""
    reference._check_logits(name, tensor, shape, device)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} is not contiguous in its last dimension")


def check_integers(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    reference._check(name, tensor, shape, None, device)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.int32 or torch.int64")
    if tensor.dim() == 1 and tensor.numel() > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{name} is not contiguous")


def check_requests(
    batch: int, device: torch.device, temperature: Tensor, seeds: Tensor, positions: Tensor, slots: Tensor | None
) -> int:
    """Checks the per-request arguments; returns the number of slots (of requests without `slots`)."""
    num_slots = batch
    check_integers("positions", positions, (batch,), device)
    if slots is not None:
        check_integers("slots", slots, (batch,), device)
        num_slots = temperature.shape[0] if temperature.dim() else 0
    reference._check("temperature", temperature, (num_slots,), torch.float32, device)
    reference._check("seeds", seeds, (num_slots,), torch.int64, device)
    for name, tensor in (("temperature", temperature), ("seeds", seeds)):
        if tensor.numel() > 1 and tensor.stride(0) != 1:
            raise ValueError(f"{name} is not contiguous")
    return num_slots


def check_num_rows(name: str, tensor: Tensor, num_slots: int, slots: Tensor | None) -> None:
    """A tensor by slot may have spare rows, a tensor by request may not."""
    if tensor.shape[0] < num_slots or (slots is None and tensor.shape[0] > num_slots):
        raise ValueError(f"{name} has {tensor.shape[0]} rows, expected {num_slots}")


# --- Device functions -----------------------------------------------------------------------------------------------


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
def load_sub_block(rows, mask, inverse_temperature, block, vocab_size, SUB_BLOCK: tl.constexpr):
    """Scores and ids [R, SUB_BLOCK] of sub-block `block` [R] of each row; -inf where masked or past the vocabulary."""
    ids = block[:, None] * SUB_BLOCK + tl.arange(0, SUB_BLOCK)[None, :]
    logits = tl.load(rows[:, None] + ids, mask=mask[:, None] & (ids < vocab_size), other=NEG_INF)
    return to_scores(logits, inverse_temperature[:, None]), ids


@triton.jit
def summarize_tile(
    rows,
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
    is_read, is_stored: [R]; a row that is stored but not read counts as empty.
    """
    blocks = tile * TILE + tl.arange(0, TILE)[None, :]
    ids = (blocks * SUB_BLOCK)[:, :, None] + tl.arange(0, SUB_BLOCK)[None, None, :]
    logits = tl.load(
        rows[:, None, None] + ids, mask=is_read[:, None, None] & (ids < vocab_size), other=NEG_INF, cache_modifier=".cg"
    )
    values = logits.to(tl.float32)
    scores = to_scores(values, inverse_temperature[:, None, None])
    largest = tl.max(scores, axis=2)
    below = scores - finite(largest)[:, :, None]
    weight = tl.exp(below)
    # A sub-block that is not empty has a sum of at least 1, so the clamp only keeps the logarithm of an empty one at 0.
    total = tl.maximum(tl.sum(weight, axis=2), 1.0)
    log_total = tl.log(total)
    mean_below = tl.sum(weight * tl.maximum(below, -1e4), axis=2) / total  # weight 0 times -inf would be NaN

    mask = is_stored[:, None] & (blocks < num_blocks)
    out = statistics[:, None] + blocks
    tl.store(out, tl.where(is_greedy[:, None], largest, largest + log_total), mask=mask)
    tl.store(out + plane, log_total - mean_below, mask=mask)
    tl.store(out + 2 * plane, tl.sum((values != values).to(tl.float32), axis=2), mask=mask)
    tl.store(out + 3 * plane, largest, mask=mask)
    return logits, ids


@triton.jit
def take_ticket(ticket, num_arrivals, amount):
    """Arrivals add `amount` (1 plus any multiple of 2**16). Returns the sum for the last of num_arrivals, else 0.

    The last one sees what the others stored: the barrier orders the stores of all threads before the ticket of one, and
    the ticket releases and acquires on the device. The last one leaves 0 for the next launch.
    """
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


@triton.jit
def _sample_kernel(
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
    is_greedy = temperature < GREEDY_TEMPERATURE
    inverse_temperature = tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))
    row = logits_ptr + request.to(tl.int64) * logits_stride
    statistics = statistics_ptr + request * num_blocks
    step = 0
    if step_ptr is not None:
        step = tl.load(step_ptr)

    logits, ids = summarize_tile(
        row, is_read, in_batch, inverse_temperature, is_greedy, tile, statistics, plane, num_blocks, vocab_size,
        SUB_BLOCK, TILE,
    )  # fmt: skip
    if cache_ptr is not None:
        cached = cache_ptr + slot * cache_slot_stride + step * cache_step_stride
        tl.store(cached[:, None, None] + ids, logits, mask=is_read[:, None, None] & (ids < vocab_size))

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
            tl.store(cache_logsumexp_ptr + slot * cache_logsumexp_stride + step, logsumexp, mask=is_read)
        if cache_argmax_ptr is not None:
            tl.store(cache_argmax_ptr + slot * cache_argmax_stride + step, argmax_id, mask=is_read)
