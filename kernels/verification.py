"""Accepting and rejecting draft tokens on raw logits: each row of target logits is read once, draft rows hardly at all.

Two launches, then a third that returns at once where it has nothing to do:

1. Statistics. Tiles of target rows are reduced to sub-block statistics; the last tile of a row to arrive merges them
   and decides the row: accept the draft token, reject it, or no draft.
2. Resolution, one program per request: the first rejected row, the output tokens, and the recovered or bonus token out
   of the sub-block statistics, by thinning where it must come from max(0, p - q).
3. Residual: only requests whose thinning dropped every draw read their row, and q's, once more.

With `single_launch` the last row of a request to arrive resolves it (1 and 2 in one launch), and a tile that starts
past a rejection found so far returns without reading. That only saves work: what a row decides never depends on it, and
resolution looks at no row past the first rejection. Both forms give the same tokens.

q costs no pass over the draft's logits where its logsumexp is kept from drafting: log q is then a look-up.
Scheme, random streams and counters are those of `reference.verify_reference`. Device functions: `draft_sampling`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_bebop.kernels import reference
from vllm_bebop.kernels.draft_sampling import (
    GREEDY_TEMPERATURE,
    NEG_INF,
    NUM_STATISTICS,
    TILE,
    add_gumbel,
    check_integers,
    check_num_rows,
    check_requests,
    check_rows,
    finite,
    load_statistics,
    load_sub_block,
    merge_entropy,
    merge_logsumexp,
    partition,
    pick,
    requests_per_program,
    summarize_tile,
    take_ticket,
    to_scores,
    uniform,
)
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import Verification

ACCEPT_STREAM = tl.constexpr(int(Stream.ACCEPT))
TARGET_BLOCK, TARGET_TOKEN = tl.constexpr(int(Stream.TARGET_BLOCK)), tl.constexpr(int(Stream.TARGET_TOKEN))
THINNING_BLOCK, THINNING_TOKEN = tl.constexpr(int(Stream.THINNING_BLOCK)), tl.constexpr(int(Stream.THINNING_TOKEN))
THINNING_KEEP = tl.constexpr(int(Stream.THINNING_KEEP))
RESIDUAL_BLOCK, RESIDUAL_TOKEN = tl.constexpr(int(Stream.RESIDUAL_BLOCK)), tl.constexpr(int(Stream.RESIDUAL_TOKEN))

# What a row decided.
ACCEPTED, REJECTED, NO_DRAFT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Planes of a row's merged numbers, fp32.
LSE_P, LSE_Q, ENTROPY, NUM_NAN, OVERLAP, ARGMAX_PROB = (tl.constexpr(i) for i in range(6))
NUM_ROW_PLANES = 6
NO_REJECTION = tl.constexpr(2**30)
NAN = tl.constexpr(float("nan"))
SKIPPED = tl.constexpr(2**16)  # added to a row's ticket by each tile that did not read


class VerificationWorkspace:
    """Scratch of `verify` for up to max_batch requests of up to max_drafts tokens; reused by any number of calls.

    Memory: 16 bytes per target row and sub-block (about 4.8 kB per row at 151,936 tokens); twice that where the draft's
    logsumexp is not given. Every launch leaves the counters as it found them.
    """

    def __init__(
        self,
        max_batch: int,
        max_drafts: int,
        vocab_size: int,
        device: torch.device | str,
        *,
        with_draft_statistics: bool = True,
    ) -> None:
        self.size = (max_batch, max_drafts, vocab_size)
        self.device = torch.device(device)
        _, num_blocks = partition(vocab_size)
        num_rows = max_batch * (max_drafts + 1)

        def scratch(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        self.target_statistics = scratch(NUM_STATISTICS, num_rows, num_blocks)
        self.draft_statistics = scratch(NUM_STATISTICS, num_rows, num_blocks) if with_draft_statistics else None
        self.rows = scratch(NUM_ROW_PLANES, num_rows)
        self.residual_sums = scratch(max_batch, num_blocks)
        self.verdicts = torch.empty(num_rows, dtype=torch.int32, device=device)
        self.unresolved = torch.empty(max_batch, dtype=torch.int32, device=device)
        self.row_tickets = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.request_tickets = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.first_rejected = torch.full((max_batch,), NO_REJECTION.value, dtype=torch.int32, device=device)

    def fits(self, batch: int, max_drafts: int, vocab_size: int, device: torch.device) -> bool:
        most, widest, vocabulary = self.size
        fits = batch <= most and max_drafts <= widest and vocab_size == vocabulary
        return fits and self.residual_sums.device == device


def verify(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_logits: Tensor | None,
    num_draft_tokens: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    one_hot: Tensor | None = None,
    target_is_processed: bool = False,
    slots: Tensor | None = None,
    first_rows: Tensor | None = None,
    draft_logsumexp: Tensor | None = None,
    draft_argmax: Tensor | None = None,
    single_launch: bool = False,
    workspace: VerificationWorkspace | None = None,
) -> Verification:
    """Accepts or rejects draft tokens so that the output follows the target exactly (arXiv:2606.12370, Eq. 1 and 2).

    Args:
        target_logits: [N, V] bf16, fp16 or fp32; unit stride inside a row. Request r owns num_draft_tokens[r] + 1
            consecutive rows from first_rows[r]; row i decides position positions[r] + i.
        draft_token_ids: [B, max_drafts] int32 or int64; -1 (or any id outside the vocabulary) is no draft.
        draft_logits: [B, max_drafts, V] bf16, fp16 or fp32, before temperature. None: every draft is one-hot.
        num_draft_tokens: [B] int32 or int64, 0 .. max_drafts. The values cannot be checked without waiting for the
            device; they are clamped to that range, and rows past N read as empty.
        temperature: [B] fp32; below 1e-5 is greedy.
        seeds: [B] int64. positions: [B] int32 or int64.
        one_hot: [B] bool, requests whose draft is a point mass on its token.
        target_is_processed: the target rows already carry temperature and masks.
        slots: [B] int32 or int64. Where given, temperature, seeds and the draft_* tensors but draft_token_ids have
            num_slots rows instead of B (the draft_* tensors also more) and are indexed by it; -1 marks a padding row,
            whose output is token 0.
        first_rows: [B] int32 or int64, first target row of each request; computed from num_draft_tokens if absent.
        draft_logsumexp: [B, max_drafts] fp32 as stored by `sample`, of draft_logits / T. Without it each draft row is
            read once more to compute it.
        draft_argmax: [B, max_drafts] int64 as stored by `sample`; only for `draft_argmax_prob`.
        single_launch: statistics and resolution in one launch with early exit.
        workspace: scratch to reuse; without it, it is allocated.
    Returns:
        Verification in fp32. Statistics of rows past num_accepted (past the first rejection) are NaN, and NaN or empty
        rows there are not counted: those rows decide nothing and may not even be read. target_entropy_nats is exact.
        overlap is min(1, p(y) / q(y)) of the drawn y, whose mean over y ~ q is sum_v min(p, q): exact for one-hot and
        greedy requests, elsewhere an unbiased estimate that costs no pass. draft_argmax_prob is exact; NaN where a
        draft row has no draft_argmax.
    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the argument.
    Memory: see VerificationWorkspace.
    Reference: kernels.reference.verify_reference
    """
    device = target_logits.device
    check_rows("target_logits", target_logits, (None, None), device)
    vocab_size = target_logits.shape[1]
    check_integers("draft_token_ids", draft_token_ids, (None, None), device)
    batch, max_drafts = draft_token_ids.shape
    if max_drafts > 1 and draft_token_ids.stride(1) != 1:
        raise ValueError("draft_token_ids is not contiguous in its last dimension")
    num_slots = check_requests(batch, device, temperature, seeds, positions, slots)
    check_integers("num_draft_tokens", num_draft_tokens, (batch,), device)
    if draft_logits is not None:
        check_rows("draft_logits", draft_logits, (None, max_drafts, vocab_size), device)
        check_num_rows("draft_logits", draft_logits, num_slots, slots)
    for name, tensor, dtype in (
        ("draft_logsumexp", draft_logsumexp, torch.float32),
        ("draft_argmax", draft_argmax, torch.int64),
    ):
        if tensor is not None:
            reference._check(name, tensor, (None, max_drafts), dtype, device)
            check_num_rows(name, tensor, num_slots, slots)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
    if one_hot is not None:
        reference._check("one_hot", one_hot, (batch,), torch.bool, device)
    if first_rows is None:
        first_rows = num_draft_tokens.cumsum(0) - num_draft_tokens + torch.arange(batch, device=device)
    check_integers("first_rows", first_rows, (batch,), device)
    streams_draft_rows = draft_logits is not None and draft_logsumexp is None
    if workspace is None:
        workspace = VerificationWorkspace(
            batch, max_drafts, vocab_size, device, with_draft_statistics=streams_draft_rows
        )
    elif not workspace.fits(batch, max_drafts, vocab_size, device):
        raise ValueError(f"workspace does not fit {batch} requests, {max_drafts} drafts, {vocab_size} logits, {device}")
    elif streams_draft_rows and workspace.draft_statistics is None:
        raise ValueError("workspace has no draft statistics, and draft_logsumexp is not given")

    def floats(width: int) -> Tensor:
        return torch.empty(batch, width, dtype=torch.float32, device=device)

    def integers(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=torch.int64, device=device)

    out = Verification(
        token_ids=integers(max_drafts + 1),
        num_accepted=integers(),
        target_entropy_nats=floats(max_drafts + 1),
        overlap=floats(max_drafts),
        draft_argmax_prob=floats(max_drafts),
        num_nan=integers(),
        num_empty_rows=integers(),
    )
    if batch == 0:
        return out

    sub_block, num_blocks = partition(vocab_size)
    tile = min(TILE, triton.next_power_of_2(num_blocks))
    per_program = requests_per_program(batch, tile * sub_block)
    tiles, groups = triton.cdiv(num_blocks, tile), triton.cdiv(batch, per_program)

    def launch(num_tiles: int, num_steps: int, num_warps: int, **parts: bool) -> None:
        _verify_kernel[(num_tiles, groups, num_steps)](
            target_logits,
            target_logits.stride(0),
            target_logits.shape[0],
            draft_logits,
            *((0, 0) if draft_logits is None else draft_logits.stride()[:2]),
            draft_logsumexp,
            draft_argmax,
            draft_token_ids,
            draft_token_ids.stride(0),
            num_draft_tokens,
            first_rows,
            temperature,
            seeds,
            positions,
            slots,
            one_hot,
            workspace.target_statistics,
            workspace.draft_statistics,
            workspace.target_statistics.stride(0),
            workspace.rows,
            workspace.rows.stride(0),
            workspace.verdicts,
            workspace.row_tickets,
            workspace.request_tickets,
            workspace.first_rejected,
            workspace.unresolved,
            workspace.residual_sums,
            out.token_ids,
            out.num_accepted,
            out.target_entropy_nats,
            out.overlap,
            out.draft_argmax_prob,
            out.num_nan,
            out.num_empty_rows,
            batch,
            max_drafts,
            vocab_size,
            num_blocks,
            STATISTICS=parts.get("statistics", False),
            RESOLUTION=parts.get("resolution", False),
            RESIDUAL=parts.get("residual", False),
            TARGET_IS_PROCESSED=target_is_processed,
            NUM_THINNING_ROUNDS=reference.NUM_THINNING_ROUNDS,
            SUB_BLOCK=sub_block,
            TILE=tile,
            PADDED_BLOCKS=triton.next_power_of_2(num_blocks),
            PADDED_STEPS=triton.next_power_of_2(max_drafts + 1),
            REQUESTS=per_program,
            num_warps=num_warps,
        )

    if single_launch:
        launch(tiles, max_drafts + 1, num_warps=8, statistics=True, resolution=True)
    else:
        launch(tiles, max_drafts + 1, num_warps=8, statistics=True)
        launch(1, 1, num_warps=4, resolution=True)
    if max_drafts > 0:
        launch(tiles, 1, num_warps=8, residual=True)
    return out


# --- Device functions -----------------------------------------------------------------------------------------------


@triton.jit
def _draft_log_prob(draft_row, mask, ids, token, is_point_mass, logsumexp, inverse_temperature):
    """log q [R, N] at ids [R, N]: of the draft row, or of the point mass on `token` [R]; -inf where masked."""
    log_prob = tl.where(mask & (ids == token[:, None]), 0.0, NEG_INF)
    if draft_row is not None:
        from_row = mask & ~is_point_mass[:, None]
        logits = tl.load(draft_row[:, None] + ids, mask=from_row, other=NEG_INF)
        of_row = to_scores(logits, inverse_temperature[:, None]) - finite(logsumexp)[:, None]
        log_prob = tl.where(is_point_mass[:, None], log_prob, of_row)
    return log_prob


@triton.jit
def _is_below_ratio(u, log_a, log_b):
    """u < a / b, in the form that gives True for equal a and b: see `reference._is_below_ratio`."""
    return (log_a > NEG_INF) & (tl.log(u) < log_a - finite(log_b))


@triton.jit
def _draw_last_token(
    target_row,
    draft_row,
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
    vocab_size,
    NUM_THINNING_ROUNDS: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    """The token after the accepted ones [R], and whether thinning gave up on it.

    Every request draws from p. Where the token must come from max(0, p - q), a draw x is dropped with probability
    min(1, q(x) / p(x)) and drawn anew, NUM_THINNING_ROUNDS times at most: see `reference._sample_residual`.
    """
    blocks = tl.arange(0, PADDED_BLOCKS)[None, :]
    block_stream = tl.where(from_residual, THINNING_BLOCK, TARGET_BLOCK)[:, None]
    token_stream = tl.where(from_residual, THINNING_TOKEN, TARGET_TOKEN)[:, None]
    token = tl.zeros_like(rejected)
    is_pending = in_batch
    is_dropped = from_residual
    num_attempts = NUM_THINNING_ROUNDS
    if NUM_THINNING_ROUNDS == 0:
        num_attempts = 1
        is_pending = in_batch & ~from_residual
    attempt = 0
    while (attempt < num_attempts) & (tl.max(is_pending.to(tl.int32), axis=0) > 0):
        noisy = add_gumbel(block_logsumexp, seed, position, block_stream, blocks, attempt, is_greedy)
        block = tl.argmax(noisy, axis=1)
        mask = is_read & is_pending
        scores, ids = load_sub_block(target_row, mask, inverse_target, block, vocab_size, SUB_BLOCK)
        inside = tl.argmax(add_gumbel(scores, seed, position, token_stream, ids, attempt, is_greedy), axis=1)
        draw = block * SUB_BLOCK + inside
        log_p = pick(scores, inside) - finite(logsumexp_p)
        of_q = (mask & from_residual)[:, None]
        log_q = _draft_log_prob(draft_row, of_q, draw[:, None], rejected, is_point_mass, logsumexp_q, inverse_draft)
        u = uniform(seed, position, THINNING_KEEP, tl.zeros_like(rejected), attempt)
        is_below = _is_below_ratio(u, tl.max(log_q, axis=1), log_p)
        token = tl.where(is_pending, draw, token)
        is_dropped = tl.where(is_pending, from_residual & is_below, is_dropped)
        is_pending = is_pending & is_dropped
        attempt += 1
    return token, is_dropped


@triton.jit
def _residual(
    target_row,
    draft_row,
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
    logits = tl.load(target_row[:, None] + ids, mask=mask, other=NEG_INF)
    log_p = to_scores(logits, inverse_target[:, None]) - finite(logsumexp_p)[:, None]
    log_q = _draft_log_prob(draft_row, mask, ids, token, is_point_mass, logsumexp_q, inverse_draft)
    return tl.maximum(tl.exp(log_p) - tl.exp(log_q), 0.0)


@triton.jit
def _verify_kernel(
    target_ptr,
    target_stride,
    num_target_rows,
    draft_ptr,
    draft_slot_stride,
    draft_step_stride,
    draft_logsumexp_ptr,
    draft_argmax_ptr,
    tokens_ptr,
    tokens_stride,
    num_drafts_ptr,
    first_rows_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    slots_ptr,
    one_hot_ptr,
    target_statistics_ptr,
    draft_statistics_ptr,
    plane,
    rows_ptr,
    row_plane,
    verdicts_ptr,
    row_tickets_ptr,
    request_tickets_ptr,
    first_rejected_ptr,
    unresolved_ptr,
    residual_sums_ptr,
    token_ids_ptr,
    num_accepted_ptr,
    entropy_ptr,
    overlap_ptr,
    argmax_prob_ptr,
    num_nan_ptr,
    num_empty_ptr,
    batch,
    max_drafts,
    vocab_size,
    num_blocks,
    STATISTICS: tl.constexpr,
    RESOLUTION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TARGET_IS_PROCESSED: tl.constexpr,
    NUM_THINNING_ROUNDS: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_STEPS: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Any of the three parts; the caller launches statistics and resolution separately or together.

    Grid (tiles, groups of REQUESTS requests, steps), steps slowest. The resolution alone has one tile and one step, the
    residual one step.
    """
    tile = tl.program_id(0)
    group = tl.program_id(1)
    num_steps = max_drafts + 1

    # The requests of this program, [R] each.
    request = group * REQUESTS + tl.arange(0, REQUESTS)
    in_batch = request < batch
    slot = request.to(tl.int64)
    is_request = in_batch
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + request, mask=in_batch, other=-1).to(tl.int64)
        is_request = in_batch & (slot >= 0)
    num_drafts = tl.load(num_drafts_ptr + request, mask=is_request, other=0).to(tl.int32)
    num_drafts = tl.minimum(tl.maximum(num_drafts, 0), max_drafts)
    first_row = tl.load(first_rows_ptr + request, mask=is_request, other=0).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot, mask=is_request, other=0.0)
    seed = tl.load(seeds_ptr + slot, mask=is_request, other=0)
    first_position = tl.load(positions_ptr + request, mask=is_request, other=0).to(tl.int32)
    is_greedy = temperature < GREEDY_TEMPERATURE
    inverse_draft = tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))
    inverse_target = inverse_draft
    if TARGET_IS_PROCESSED:
        inverse_target = tl.where(is_greedy, 1.0, 1.0)
    # A greedy request accepts iff the token is the argmax, whatever q was: q as a point mass says just that.
    is_point_mass = is_greedy
    if one_hot_ptr is not None:
        is_point_mass = is_greedy | tl.load(one_hot_ptr + request, mask=in_batch, other=False)

    # The row that this program is about: a step's row, or the request's last one.
    step = tl.zeros([REQUESTS], tl.int32) + tl.program_id(2)
    if RESIDUAL:
        is_request = is_request & (tl.load(unresolved_ptr + request, mask=in_batch, other=0) != 0)
        if tl.max(is_request.to(tl.int32), axis=0) == 0:
            return
        step = tl.load(num_accepted_ptr + request, mask=is_request, other=0).to(tl.int32)
    row = first_row + step
    row_index = request * num_steps + step
    is_row = in_batch & (step <= num_drafts)
    is_read = is_row & is_request & (row < num_target_rows)
    target_row = target_ptr + row * target_stride
    draft_row = None
    if draft_ptr is not None:
        draft_row = draft_ptr + slot * draft_slot_stride + step * draft_step_stride
    has_draft = is_request & (step < num_drafts)
    token = tl.load(tokens_ptr + request * tokens_stride + step, mask=has_draft, other=-1)
    token = tl.where((token >= 0) & (token < vocab_size), token, -1).to(tl.int32)
    target_statistics = target_statistics_ptr + row_index * num_blocks
    rows = rows_ptr + row_index

    # --- Statistics of one row; its last tile decides it.
    is_resolver = tl.program_id(0) == 0
    if STATISTICS:
        num_rows = tl.max(num_drafts, axis=0) + 1
        if tl.program_id(2) >= num_rows:
            return
        is_resolver = num_rows == 0
        is_wanted = is_row
        if RESOLUTION:
            is_wanted = is_row & (step <= tl.load(first_rejected_ptr + request, mask=in_batch, other=0, volatile=True))
        arrival = 1 + SKIPPED
        if tl.max(is_wanted.to(tl.int32), axis=0) > 0:
            arrival = 1
            summarize_tile(
                target_row, is_read, is_row, inverse_target, is_greedy, tile, target_statistics, plane, num_blocks,
                vocab_size, SUB_BLOCK, TILE,
            )  # fmt: skip
            if draft_ptr is not None and draft_logsumexp_ptr is None:
                is_read_draft = has_draft & ~is_point_mass
                summarize_tile(
                    draft_row, is_read_draft, is_row, inverse_draft, is_greedy, tile,
                    draft_statistics_ptr + row_index * num_blocks, plane, num_blocks, vocab_size, SUB_BLOCK, TILE,
                )  # fmt: skip
        arrived = take_ticket(row_tickets_ptr + group * num_steps + tl.program_id(2), tl.num_programs(0), arrival)
        if (arrived > 0) & (arrived < SKIPPED):
            block_logsumexp = load_statistics(target_statistics, is_row, num_blocks, PADDED_BLOCKS, NEG_INF)
            block_entropy = load_statistics(target_statistics + plane, is_row, num_blocks, PADDED_BLOCKS, 0.0)
            num_nan = tl.sum(load_statistics(target_statistics + 2 * plane, is_row, num_blocks, PADDED_BLOCKS, 0.0), 1)
            logsumexp_p = merge_logsumexp(block_logsumexp, is_greedy)
            entropy = merge_entropy(block_logsumexp, block_entropy, logsumexp_p, is_greedy)
            logsumexp_q = tl.zeros([REQUESTS], tl.float32)
            if draft_logsumexp_ptr is not None:
                logsumexp_q = tl.load(draft_logsumexp_ptr + slot * max_drafts + step, mask=has_draft, other=NEG_INF)
            elif draft_ptr is not None:
                draft_statistics = draft_statistics_ptr + row_index * num_blocks
                of_blocks = load_statistics(draft_statistics, is_row, num_blocks, PADDED_BLOCKS, NEG_INF)
                logsumexp_q = merge_logsumexp(of_blocks, is_greedy)

            is_token = is_read & (token >= 0)
            score = to_scores(tl.load(target_row + token, mask=is_token, other=NEG_INF), inverse_target)
            log_p = score - finite(logsumexp_p)
            if tl.max(is_greedy.to(tl.int32), axis=0) > 0:
                top_block = tl.argmax(block_logsumexp, axis=1)
                scores, _ = load_sub_block(target_row, is_read, inverse_target, top_block, vocab_size, SUB_BLOCK)
                is_argmax = (score > NEG_INF) & (token == top_block * SUB_BLOCK + tl.argmax(scores, axis=1))
                log_p = tl.where(is_greedy, tl.where(is_argmax, 0.0, NEG_INF), log_p)
            log_q = tl.max(
                _draft_log_prob(
                    draft_row, is_token[:, None], token[:, None], token, is_point_mass, logsumexp_q, inverse_draft
                ),
                axis=1,
            )
            is_drawn = log_q > NEG_INF
            u = uniform(seed, first_position + step, ACCEPT_STREAM, tl.zeros([REQUESTS], tl.int32), 0)
            accepts = is_drawn & _is_below_ratio(u, log_p, log_q)
            overlap = tl.exp(tl.minimum(log_p - finite(log_q), 0.0))
            argmax_prob = tl.where(is_point_mass, overlap, NAN)
            if draft_argmax_ptr is not None:
                at_argmax = is_read & is_drawn & ~is_point_mass
                argmax_q = tl.load(draft_argmax_ptr + slot * max_drafts + step, mask=at_argmax, other=0)
                score = to_scores(tl.load(target_row + argmax_q, mask=at_argmax, other=NEG_INF), inverse_target)
                argmax_prob = tl.where(is_point_mass, overlap, tl.exp(score - finite(logsumexp_p)))
            verdict = tl.where(accepts, ACCEPTED, tl.where(is_drawn, REJECTED, NO_DRAFT))

            tl.store(rows + LSE_P * row_plane, logsumexp_p, mask=is_row)
            tl.store(rows + LSE_Q * row_plane, logsumexp_q, mask=is_row)
            tl.store(rows + ENTROPY * row_plane, entropy, mask=is_row)
            tl.store(rows + NUM_NAN * row_plane, num_nan, mask=is_row)
            tl.store(rows + OVERLAP * row_plane, tl.where(is_drawn, overlap, NAN), mask=is_row)
            tl.store(rows + ARGMAX_PROB * row_plane, tl.where(is_drawn, argmax_prob, NAN), mask=is_row)
            tl.store(verdicts_ptr + row_index, verdict, mask=is_row)
            if RESOLUTION:
                is_rejection = is_row & (step < num_drafts) & ~accepts
                tl.atomic_min(first_rejected_ptr + request, step, mask=is_rejection)
        if RESOLUTION:  # noqa: SIM102
            if arrived > 0:
                is_resolver = take_ticket(request_tickets_ptr + group, num_rows, 1) > 0

    # --- Resolution of a request: the accepted tokens and one more.
    if RESOLUTION:  # noqa: SIM102 (known to the compiler, unlike the inner condition)
        if is_resolver:
            steps = tl.arange(0, PADDED_STEPS)[None, :]
            index = request[:, None] * num_steps + steps
            is_draft = in_batch[:, None] & (steps < num_drafts[:, None])
            verdict = tl.load(verdicts_ptr + index, mask=is_draft, other=ACCEPTED, cache_modifier=".cg")
            num_accepted = tl.min(tl.where(is_draft & (verdict != ACCEPTED), steps, num_drafts[:, None]), axis=1)
            is_last = steps == num_accepted[:, None]
            last_verdict = tl.max(tl.where(is_draft & is_last, verdict, ACCEPTED), axis=1)
            # A rejected greedy draft is not the argmax, so that max(0, p - q) is p.
            from_residual = (last_verdict == REJECTED) & ~is_greedy

            row = first_row + num_accepted
            row_index = request * num_steps + num_accepted
            is_read = is_request & (row < num_target_rows)
            target_row = target_ptr + row * target_stride
            if draft_ptr is not None:
                draft_row = draft_ptr + slot * draft_slot_stride + num_accepted * draft_step_stride
            rejected = tl.load(tokens_ptr + request * tokens_stride + num_accepted, mask=from_residual, other=-1)
            rejected = rejected.to(tl.int32)
            position = first_position + num_accepted
            logsumexp_p = tl.load(rows_ptr + LSE_P * row_plane + row_index, mask=in_batch, cache_modifier=".cg")
            logsumexp_q = tl.load(rows_ptr + LSE_Q * row_plane + row_index, mask=in_batch, cache_modifier=".cg")
            block_logsumexp = load_statistics(
                target_statistics_ptr + row_index * num_blocks, in_batch, num_blocks, PADDED_BLOCKS, NEG_INF
            )
            token, is_dropped = _draw_last_token(
                target_row, draft_row, in_batch, is_read, from_residual, rejected, is_point_mass, is_greedy,
                block_logsumexp, logsumexp_p, logsumexp_q, inverse_target, inverse_draft, seed, position, vocab_size,
                NUM_THINNING_ROUNDS, SUB_BLOCK, PADDED_BLOCKS,
            )  # fmt: skip
            tl.store(unresolved_ptr + request, is_dropped.to(tl.int32), mask=in_batch)

            is_accepted = in_batch[:, None] & (steps < num_accepted[:, None])
            accepted = tl.load(tokens_ptr + request[:, None] * tokens_stride + steps, mask=is_accepted, other=-1)
            tokens = tl.where(is_last, token[:, None].to(tl.int64), accepted.to(tl.int64))
            is_step = in_batch[:, None] & (steps < num_steps)
            tl.store(token_ids_ptr + index, tokens, mask=is_step)
            tl.store(num_accepted_ptr + request, num_accepted.to(tl.int64), mask=in_batch)

            is_used = in_batch[:, None] & (steps <= num_accepted[:, None])
            is_used_draft = is_used & is_draft
            used_row = rows_ptr + index
            entropy = tl.load(used_row + ENTROPY * row_plane, mask=is_used, other=NAN, cache_modifier=".cg")
            tl.store(entropy_ptr + index, entropy, mask=is_step)
            overlap = tl.load(used_row + OVERLAP * row_plane, mask=is_used_draft, other=NAN, cache_modifier=".cg")
            prob = tl.load(used_row + ARGMAX_PROB * row_plane, mask=is_used_draft, other=NAN, cache_modifier=".cg")
            draft_index = request[:, None] * max_drafts + steps
            tl.store(overlap_ptr + draft_index, overlap, mask=is_step & (steps < max_drafts))
            tl.store(argmax_prob_ptr + draft_index, prob, mask=is_step & (steps < max_drafts))
            num_nan = tl.load(used_row + NUM_NAN * row_plane, mask=is_used, other=0.0, cache_modifier=".cg")
            tl.store(num_nan_ptr + request, tl.sum(num_nan, axis=1).to(tl.int64), mask=in_batch)
            logsumexps = tl.load(used_row + LSE_P * row_plane, mask=is_used, other=0.0, cache_modifier=".cg")
            num_empty = tl.sum((logsumexps == NEG_INF).to(tl.int32), axis=1)
            tl.store(num_empty_ptr + request, num_empty.to(tl.int64), mask=in_batch)
            if STATISTICS:
                tl.store(first_rejected_ptr + request, tl.zeros([REQUESTS], tl.int32) + NO_REJECTION, mask=in_batch)

    # --- Residual of the requests whose thinning gave up.
    if RESIDUAL:
        logsumexp_p = tl.load(rows + LSE_P * row_plane, mask=is_request, other=0.0)
        logsumexp_q = tl.load(rows + LSE_Q * row_plane, mask=is_request, other=0.0)
        ids = tile * TILE * SUB_BLOCK + tl.arange(0, TILE * SUB_BLOCK)[None, :]
        residual = _residual(
            target_row, draft_row, is_read, ids, token, is_point_mass, logsumexp_p, logsumexp_q, inverse_target,
            inverse_draft, vocab_size,
        )  # fmt: skip
        sums = tl.sum(tl.reshape(residual, [REQUESTS, TILE, SUB_BLOCK]), axis=2)
        blocks = tile * TILE + tl.arange(0, TILE)[None, :]
        residual_sums = residual_sums_ptr + request * num_blocks
        tl.store(residual_sums[:, None] + blocks, sums, mask=is_request[:, None] & (blocks < num_blocks))
        if take_ticket(request_tickets_ptr + group, tl.num_programs(0), 1) > 0:
            position = first_position + step
            never_greedy = token < -1
            block_sums = load_statistics(residual_sums, is_request, num_blocks, PADDED_BLOCKS, 0.0)
            all_blocks = tl.arange(0, PADDED_BLOCKS)[None, :]
            noisy = add_gumbel(tl.log(block_sums), seed, position, RESIDUAL_BLOCK, all_blocks, 0, never_greedy)
            block = tl.argmax(noisy, axis=1)
            inside_ids = block[:, None] * SUB_BLOCK + tl.arange(0, SUB_BLOCK)[None, :]
            inside = _residual(
                target_row, draft_row, is_read, inside_ids, token, is_point_mass, logsumexp_p, logsumexp_q,
                inverse_target, inverse_draft, vocab_size,
            )  # fmt: skip
            noisy = add_gumbel(tl.log(inside), seed, position, RESIDUAL_TOKEN, inside_ids, 0, never_greedy)
            draw = block * SUB_BLOCK + tl.argmax(noisy, axis=1)
            # An all-zero residual (p equal to q up to rounding) keeps the last draw from p.
            is_replaced = is_request & (tl.sum(block_sums, axis=1) > 0)
            tl.store(token_ids_ptr + row_index, draw.to(tl.int64), mask=is_replaced)
