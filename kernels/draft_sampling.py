"""Drawing one token per request from raw logits in one pass: the draft step, and target tokens without a draft.

Every logit is read once. Programs reduce tiles of 16 sub-blocks of 512 logits to a few numbers a sub-block; the last
program of a request to arrive merges them and draws the sub-block, then the token inside it, for which it reads that
one sub-block again. Scheme, random streams and counters are those of `reference.sample_reference`, and so the tokens:

    j = argmax_j L_j + G_j             v = argmax_{v in j} z_v + G_v              (G: standard Gumbel numbers)

with L_j as in `device`. The sub-blocks are fixed, and each is summed up in the same order whichever program reads it:
a request's token does not depend on its neighbours. Finding the last program takes each an atomic ticket; nothing
spins.

With filters a second launch draws the rows that have one again, from what their threshold leaves: see `filtering`.
"""

import torch
import triton
from torch import Tensor

from vllm_bebop.kernels.arguments import (
    check_integers,
    check_num_rows,
    check_requests,
    check_rows,
    check_tensor,
    check_unit_stride,
)
from vllm_bebop.kernels.device import NUM_STATISTICS
from vllm_bebop.kernels.draft_kernel import sample_kernel
from vllm_bebop.kernels.filters import NO_FILTERS, Filters
from vllm_bebop.kernels.launch import (
    PASS,
    SAMPLING_AT_ONCE,
    SEARCH,
    TILE,
    partition,
    requests_per_program,
    tiles_per_program,
)
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import DraftSample


class SamplingWorkspace:
    """Scratch and outputs of `sample` for up to max_batch requests, so that a captured CUDA graph allocates nothing.

    The tensors of a result made with a workspace are views of it: the next call overwrites them.
    Memory: 16 bytes per request and sub-block (about 4.8 kB per request at 151,936 tokens).
    """

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device | str) -> None:
        self.max_batch, self.vocab_size = max_batch, vocab_size
        _, num_blocks = partition(vocab_size)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)  # each aligned as the others, whatever max_batch

        self.statistics = empty(NUM_STATISTICS, max_batch, num_blocks)
        self.tickets = torch.zeros(max_batch, dtype=torch.int32, device=device)  # each launch leaves zeros behind
        self.token_ids, self.argmax_ids, self.num_nan = (empty(max_batch, dtype=torch.int64) for _ in range(3))
        self.logsumexp, self.log_prob, self.entropy, self.threshold = (empty(max_batch) for _ in range(4))
        self.is_empty = empty(max_batch, dtype=torch.bool)

    def outputs(self, batch: int) -> DraftSample:
        return DraftSample(
            token_ids=self.token_ids[:batch],
            logsumexp=self.logsumexp[:batch],
            log_prob=self.log_prob[:batch],
            entropy_nats=self.entropy[:batch],
            threshold=self.threshold[:batch],
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
    rounds: Tensor | None = None,
    streams: tuple[Stream, Stream] = (Stream.DRAFT_BLOCK, Stream.DRAFT_TOKEN),
    filters: Filters = NO_FILTERS,
    ids: Tensor | None = None,
    cache: Tensor | None = None,
    cache_logsumexp: Tensor | None = None,
    cache_argmax: Tensor | None = None,
    cache_threshold: Tensor | None = None,
    cache_token_ids: Tensor | None = None,
    cache_positions: Tensor | None = None,
    step: Tensor | None = None,
    position_offset: int = 0,
    workspace: SamplingWorkspace | None = None,
) -> DraftSample:
    """Draws one token per row from softmax(logits / temperature), in one pass (arXiv:2606.12370, G).

    Args:
        logits: [B, V] bf16, fp16 or fp32, before temperature; unit stride inside a row, any stride between rows.
        temperature: [B] fp32, or [num_slots] with `slots`. Below 1e-5 is greedy: argmax, the lowest id on ties.
        seeds: [B] int64, or [num_slots] with `slots`.
        positions: [B] int32 or int64, absolute position of the token being drawn, less position_offset.
        slots: [B] int32 or int64, where each row finds its temperature, its seed and its place in the caches. -1 marks
            a padding row of a captured batch: it counts as empty, its token is 0, its caches stay untouched.
        rounds: [B] int32 or int64, position of the first draft of each token's round, where drafts are verified as a
            block: see `block_reference`.
        streams: random streams for the sub-block and for the token.
        filters: top-k, top-p and min-p of each request, or by slot.
        ids: [B, V] int32, the token that each logit is of, as `find_candidates` returns them: the token ids drawn are
            then these; an argmax is the index. Unit stride inside a row.
        cache: [num_slots, max_drafts, V], dtype of `logits`: row [slot, step] receives a copy of the logits. Not needed
            where the logits already are a view of it.
        cache_logsumexp, cache_argmax, cache_threshold: [num_slots, max_drafts] fp32, int64 and fp32: [slot, step]
            receives the row's logsumexp (of what is kept of logits / T), argmax and threshold, for `verify`. Without
            slots the caches are indexed by row; with slots they may have more rows, or fewer: a slot past the caches is
            drafted greedily and stored nowhere.
        cache_token_ids, cache_positions: [num_slots, max_drafts] int64: likewise the token and its position, for
            `gather_drafts`.
        step: scalar integer tensor on the device, required with any cache.
        workspace: scratch and outputs to reuse; without it they are allocated.
    Returns:
        DraftSample, in fp32.
    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the argument.
    Memory: see SamplingWorkspace.
    Reference: kernels.reference.sample_reference
    """
    check_rows("logits", logits, (None, None), logits.device)
    (batch, vocab_size), device = logits.shape, logits.device
    num_slots = check_requests(batch, device, temperature, seeds, positions, slots)
    if rounds is not None:
        check_integers("rounds", rounds, (batch,), device)
    if ids is not None:
        check_tensor("ids", ids, (batch, vocab_size), torch.int32, device)
        check_unit_stride("ids", ids)
    num_cached = num_slots
    for name, tensor, shape, dtype in (
        ("cache", cache, (None, None, vocab_size), logits.dtype),
        ("cache_logsumexp", cache_logsumexp, (None, None), torch.float32),
        ("cache_argmax", cache_argmax, (None, None), torch.int64),
        ("cache_threshold", cache_threshold, (None, None), torch.float32),
        ("cache_token_ids", cache_token_ids, (None, None), torch.int64),
        ("cache_positions", cache_positions, (None, None), torch.int64),
    ):
        if tensor is None:
            continue
        check_tensor(name, tensor, shape, dtype, device)
        num_cached = min(num_cached, check_num_rows(name, tensor, num_slots, slots))
        if step is None:
            raise ValueError(f"step is needed to write {name}")
        check_unit_stride(name, tensor)
    filters.check(num_slots, device)
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
    num_tiles, groups = triton.cdiv(num_blocks, tile), triton.cdiv(batch, per_program)
    tiles_at_once = tiles_per_program(num_tiles, batch, SAMPLING_AT_ONCE)
    strided: dict[str, Tensor | int | None] = {}
    for name, tensor in (
        ("logits", logits),
        ("ids", ids),
        ("cache_logsumexp", cache_logsumexp),
        ("cache_argmax", cache_argmax),
        ("cache_threshold", cache_threshold),
        ("cache_token_ids", cache_token_ids),
        ("cache_positions", cache_positions),
    ):
        strided |= {f"{name}_ptr": tensor, f"{name}_stride": 0 if tensor is None else tensor.stride(0)}

    def launch(programs_per_row: int, *, filtered: bool) -> None:
        sample_kernel[(programs_per_row, groups)](
            **strided,
            temperature_ptr=temperature,
            seeds_ptr=seeds,
            positions_ptr=positions,
            position_offset=position_offset,
            rounds_ptr=rounds,
            slots_ptr=slots,
            top_k_ptr=filters.top_k,
            top_p_ptr=filters.top_p,
            min_p_ptr=filters.min_p,
            cache_ptr=cache,
            cache_slot_stride=0 if cache is None else cache.stride(0),
            cache_step_stride=0 if cache is None else cache.stride(1),
            step_ptr=step,
            num_cached=num_cached,
            statistics_ptr=workspace.statistics,
            plane=workspace.statistics.stride(0),
            tickets_ptr=workspace.tickets,
            token_ids_ptr=out.token_ids,
            argmax_ids_ptr=out.argmax_ids,
            logsumexp_ptr=out.logsumexp,
            log_prob_ptr=out.log_prob,
            entropy_ptr=out.entropy_nats,
            threshold_ptr=out.threshold,
            num_nan_ptr=out.num_nan,
            is_empty_ptr=out.is_empty,
            batch=batch,
            vocab_size=vocab_size,
            num_blocks=num_blocks,
            tiles_per_program=tiles_at_once,
            FILTERED=filtered,
            SUB_BLOCK=sub_block,
            TILE=tile,
            PADDED_BLOCKS=triton.next_power_of_2(num_blocks),
            REQUESTS=per_program,
            BLOCK_STREAM=int(streams[0]),
            TOKEN_STREAM=int(streams[1]),
            **(SEARCH if filtered else PASS),
        )

    launch(triton.cdiv(num_tiles, tiles_at_once), filtered=False)
    if filters.are_asked_for:
        launch(1, filtered=True)
    return out
