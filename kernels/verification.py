"""Accepting and rejecting draft tokens on raw logits: each row of target logits is read once, draft rows hardly at all.

Two launches, then one that returns at once where it has nothing to do:

1. Statistics. Tiles of target rows are reduced to sub-block statistics; the last program of a row to arrive merges them
   and decides the row: accept the draft token, reject it, or no draft.
2. Resolution, one program per request: the first rejected row, the output tokens, and the recovered or bonus token out
   of the sub-block statistics, by thinning where it must come from max(0, p - q).
3. Residual: only requests whose thinning dropped every draw read their row, and q's, once more. Totals are kept there.

With `single_launch` the last row of a request to arrive resolves it (1 and 2 in one launch), and a program that starts
past a rejection found so far returns without reading. That only saves work: what a row decides never depends on it, and
resolution looks at no row past the first rejection. Both forms give the same tokens.

With `block` the second launch also sums max(0, w p - q) over rows, and there is no third: see `block_kernel`.

Rows with top-k, top-p or min-p are decided once more, by a launch of their own: the search for a threshold needs
registers that the pass over the logits does better without, and other rows are decided as if nobody had asked for it.
Only sub-blocks that may hold kept tokens are read again: see `filtering`.

q costs no pass over the draft's logits where its logsumexp is kept from drafting: log q is then a look-up. In vLLM it
always is, these three launches verify, and the grammar's mask is in the logits already.

Scheme, random streams and counters are those of `reference.verify_reference`.
"""

import torch
import triton
from torch import Tensor

from vllm_bebop.kernels import reference
from vllm_bebop.kernels.arguments import (
    check_contiguous,
    check_integers,
    check_num_rows,
    check_requests,
    check_rows,
    check_tensor,
    check_unit_stride,
)
from vllm_bebop.kernels.candidates import num_candidates
from vllm_bebop.kernels.device import NUM_STATISTICS
from vllm_bebop.kernels.filters import NO_FILTERS, Filters
from vllm_bebop.kernels.launch import (
    BLOCK,
    PASS,
    PASS_AND_MORE,
    RESIDUAL,
    RESIDUAL_PROGRAMS,
    RESIDUAL_TILE,
    RESOLUTION,
    SEARCH,
    TILE,
    VERIFYING_AT_ONCE,
    VERIFYING_MORE_AT_ONCE,
    partition,
    requests_per_program,
    tiles_per_program,
)
from vllm_bebop.kernels.reference import Verification
from vllm_bebop.kernels.residual_kernel import residual_kernel
from vllm_bebop.kernels.tally import TOTALS
from vllm_bebop.kernels.tally_kernel import tally
from vllm_bebop.kernels.verification_kernel import NO_REJECTION, verify_kernel
from vllm_bebop.kernels.verification_rows import NUM_ROW_PLANES


class VerificationWorkspace:
    """Scratch of `verify` for up to max_batch requests of up to max_drafts tokens; reused by any number of calls.

    Memory: 20 bytes per target row and sub-block (about 6 kB per row at 151,936 tokens); 16 more where the draft's
    logsumexp is not given. Every launch leaves the counters as it found them. Calls that share one run on one stream.
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
        _, num_blocks = partition(vocab_size)
        num_rows = max_batch * (max_drafts + 1)

        def scratch(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        self.target_statistics = scratch(NUM_STATISTICS, num_rows, num_blocks)
        self.draft_statistics = scratch(NUM_STATISTICS, num_rows, num_blocks) if with_draft_statistics else None
        self.rows = scratch(NUM_ROW_PLANES, num_rows)
        self.residual_sums = scratch(max_batch * max(max_drafts, 1), num_blocks)
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
    bitmask: Tensor | None = None,
    filters: Filters = NO_FILTERS,
    slots: Tensor | None = None,
    first_rows: Tensor | None = None,
    draft_logsumexp: Tensor | None = None,
    draft_argmax: Tensor | None = None,
    draft_threshold: Tensor | None = None,
    draft_ids: Tensor | None = None,
    num_scheduled: Tensor | None = None,
    block: bool = False,
    single_launch: bool = False,
    totals: Tensor | None = None,
    workspace: VerificationWorkspace | None = None,
) -> Verification:
    """Accepts or rejects draft tokens so that the output follows the target exactly (arXiv:2606.12370, Eq. 1 and 2).

    Args:
        target_logits: [N, V] bf16, fp16 or fp32; unit stride inside a row. Request r owns num_draft_tokens[r] + 1
            consecutive rows from first_rows[r]; row i decides position positions[r] + i.
        draft_token_ids: [B, max_drafts] int32 or int64; -1 (or any id outside the vocabulary) is no draft.
        draft_logits: [B, max_drafts, V] bf16, fp16 or fp32, before temperature. None: every draft is one-hot.
        num_draft_tokens: [B] int32 or int64, 0 .. max_drafts. The values cannot be checked without waiting for the
            device; they are clamped to that range, and rows outside the N read as empty.
        temperature: [B] fp32; below 1e-5 is greedy.
        seeds: [B] int64. positions: [B] int32 or int64.
        one_hot: [B] bool, requests whose draft is a point mass on its token.
        target_is_processed: the target rows already carry temperature and masks.
        bitmask: [N, ceil(V / 32)] int32, a grammar's: token v is allowed in a row if bit v % 32 of word v // 32 is set.
            Compiled by Triton 3.6, rows may round otherwise with one than without.
        filters: top-k, top-p and min-p of each request, applied to p (after the bitmask).
        slots: [B] int32 or int64. Where given, temperature, filters, seeds and the draft_* tensors but draft_token_ids
            have num_slots rows instead of B and are indexed by it; -1 marks a padding row, whose output is token 0. The
            draft_* tensors may have more rows, or fewer: the draft of a slot past them is one-hot.
        first_rows: [B] int32 or int64, first target row of each request; computed from num_draft_tokens if absent.
        draft_logsumexp: [B, max_drafts] fp32 as stored by `sample`, of draft_logits / T. Without it each draft row is
            read once more to compute it.
        draft_argmax: [B, max_drafts] int64 as stored by `sample`; only for `draft_argmax_prob`.
        draft_threshold: [B, max_drafts] fp32 as stored by `sample`, the lowest of each row's draft_logits that counts;
            with it draft_logsumexp is required.
        draft_ids: [B, max_drafts, C] int32 as stored by `find_candidates`: draft_logits is then [B, max_drafts, C], of
            these tokens alone, draft_argmax an index into them, and draft_logsumexp required.
        num_scheduled: [B] int32 or int64, as `gather_drafts` returns it: of num_draft_tokens, those with a row of
            logits behind them that may be served. Where one more is accepted, it is the output's last token
            (num_tokens).
        block: accept drafts together instead of one by one (arXiv:2403.10444). They must have been drawn with `rounds`
            equal to `positions`. A step without a draft token and an empty target row end the block: see
            `block_reference`.
        single_launch: statistics, decision and resolution in one launch with early exit; not with a bitmask, filters or
            `block`, which have more launches whatever it says.
        totals: [len(TOTALS), max_drafts + 1] fp64, contiguous: this verification is added, see `tally`. Without
            draft_argmax, its last row is NaN from then on.
        workspace: scratch to reuse; without it, it is allocated.
    Returns:
        Verification in fp32. Statistics of rows past num_accepted (past the first rejection) are NaN, and NaN or empty
        rows there are not counted: those rows decide nothing and may not even be read. With `block` every row decides,
        and counts. target_entropy_nats is exact.
        overlap is min(1, p(y) / q(y)) of the drawn y, whose mean over y ~ q is sum_v min(p, q): exact for one-hot and
        greedy requests, elsewhere an unbiased estimate that costs no pass. draft_argmax_prob is exact; NaN where a
        draft row has no draft_argmax.
    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the argument.
    Memory: see VerificationWorkspace.
    Reference: kernels.reference.verify_reference; kernels.block_reference.verify_block_reference
    """
    num_cached = _check_arguments(
        target_logits, draft_token_ids, draft_logits, num_draft_tokens, temperature, seeds, positions, one_hot, bitmask,
        filters, slots, draft_logsumexp, draft_argmax, draft_threshold, draft_ids,
    )  # fmt: skip
    device, vocab_size = target_logits.device, target_logits.shape[1]
    batch, max_drafts = draft_token_ids.shape
    if first_rows is None:
        first_rows = num_draft_tokens.cumsum(0) - num_draft_tokens + torch.arange(batch, device=device)
    check_integers("first_rows", first_rows, (batch,), device)
    if num_scheduled is not None:
        check_integers("num_scheduled", num_scheduled, (batch,), device)
    if totals is not None:
        check_tensor("totals", totals, (len(TOTALS), max_drafts + 1), torch.float64, device)
        check_contiguous("totals", totals)
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
        num_tokens=torch.empty(batch, dtype=torch.int32, device=device),
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
    num_tiles, groups = triton.cdiv(num_blocks, tile), triton.cdiv(batch, per_program)
    is_block = block and max_drafts > 0  # without drafts there is no difference
    single_launch = single_launch and not is_block and not filters.are_asked_for and bitmask is None
    does_more = streams_draft_rows or bitmask is not None or single_launch
    at_once = VERIFYING_MORE_AT_ONCE if does_more else VERIFYING_AT_ONCE
    tiles_at_once = tiles_per_program(num_tiles, batch * (max_drafts + 1), at_once)

    shared = {  # what both kernels take
        "target_ptr": target_logits,
        "target_stride": target_logits.stride(0),
        "num_target_rows": target_logits.shape[0],
        "target_is_processed": int(target_is_processed),
        "bitmask_ptr": bitmask,
        "bitmask_stride": 0 if bitmask is None else bitmask.stride(0),
        "draft_ptr": draft_logits,
        "draft_slot_stride": 0 if draft_logits is None else draft_logits.stride(0),
        "draft_step_stride": 0 if draft_logits is None else draft_logits.stride(1),
        "draft_threshold_ptr": draft_threshold,
        "draft_ids_ptr": draft_ids,
        "num_candidates": 0 if draft_ids is None else draft_ids.shape[2],
        "num_cached": num_cached,
        "tokens_ptr": draft_token_ids,
        "tokens_stride": draft_token_ids.stride(0),
        "first_rows_ptr": first_rows,
        "temperature_ptr": temperature,
        "seeds_ptr": seeds,
        "positions_ptr": positions,
        "slots_ptr": slots,
        "one_hot_ptr": one_hot,
        "rows_ptr": workspace.rows,
        "row_plane": workspace.rows.stride(0),
        "request_tickets_ptr": workspace.request_tickets,
        "unresolved_ptr": workspace.unresolved,
        "residual_sums_ptr": workspace.residual_sums,
        "token_ids_ptr": out.token_ids,
        "num_accepted_ptr": out.num_accepted,
        "num_tokens_ptr": out.num_tokens,
        "entropy_ptr": out.target_entropy_nats,
        "overlap_ptr": out.overlap,
        "argmax_prob_ptr": out.draft_argmax_prob,
        "batch": batch,
        "max_drafts": max_drafts,
        "vocab_size": vocab_size,
        "num_blocks": num_blocks,
        "SUB_BLOCK": sub_block,
        "PADDED_BLOCKS": triton.next_power_of_2(num_blocks),
        "PADDED_STEPS": triton.next_power_of_2(max_drafts + 1),
        "REQUESTS": per_program,
    }

    def launch(
        programs_per_row: int,
        num_steps: int,
        compiled_with: dict[str, int | bool],
        *,
        statistics: bool = False,
        decision: bool = False,
        resolution: bool = False,
        block: bool = False,
        filters: Filters = filters,
    ) -> None:
        verify_kernel[(programs_per_row, groups, num_steps)](
            **shared,
            top_k_ptr=filters.top_k,
            top_p_ptr=filters.top_p,
            min_p_ptr=filters.min_p,
            draft_logsumexp_ptr=draft_logsumexp,
            draft_argmax_ptr=draft_argmax,
            num_drafts_ptr=num_draft_tokens,
            num_scheduled_ptr=num_scheduled,
            target_statistics_ptr=workspace.target_statistics,
            draft_statistics_ptr=workspace.draft_statistics,
            plane=workspace.target_statistics.stride(0),
            verdicts_ptr=workspace.verdicts,
            row_tickets_ptr=workspace.row_tickets,
            first_rejected_ptr=workspace.first_rejected,
            num_nan_ptr=out.num_nan,
            num_empty_ptr=out.num_empty_rows,
            tiles_per_program=tiles_at_once,
            num_thinning_rounds=reference.NUM_THINNING_ROUNDS,
            STATISTICS=statistics,
            DECISION=decision,
            RESOLUTION=resolution,
            BLOCK=block,
            FILTERED=filters.are_asked_for,
            TILE=tile,
            **compiled_with,
        )

    launch(
        triton.cdiv(num_tiles, tiles_at_once),
        max_drafts + 1,
        PASS_AND_MORE if does_more else PASS,
        statistics=True,
        decision=True,
        resolution=single_launch,
        filters=NO_FILTERS,
    )
    if filters.are_asked_for:
        launch(1, max_drafts + 1, SEARCH, decision=True)
    if is_block:
        launch(num_tiles, max_drafts, BLOCK, block=True, resolution=True)
        if totals is not None:
            tally(out, totals)
        return out
    if not single_launch:
        launch(1, 1, RESOLUTION, resolution=True)
    if max_drafts > 0:
        residual_tile = min(RESIDUAL_TILE, tile)
        residual_tiles = triton.cdiv(num_blocks, residual_tile)
        residual_kernel[(residual_tiles, min(groups, max(1, RESIDUAL_PROGRAMS // residual_tiles)))](
            **shared, totals_ptr=totals, FILTERED=filters.are_asked_for, TILE=residual_tile, **RESIDUAL
        )
    return out


def _check_arguments(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_logits: Tensor | None,
    num_draft_tokens: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    one_hot: Tensor | None,
    bitmask: Tensor | None,
    filters: Filters,
    slots: Tensor | None,
    draft_logsumexp: Tensor | None,
    draft_argmax: Tensor | None,
    draft_threshold: Tensor | None,
    draft_ids: Tensor | None,
) -> int:
    """Of `verify`; returns how many slots, from the first, have draft logits: the drafts of all others are one-hot."""
    device = target_logits.device
    check_rows("target_logits", target_logits, (None, None), device)
    vocab_size = target_logits.shape[1]
    check_integers("draft_token_ids", draft_token_ids, (None, None), device)
    check_unit_stride("draft_token_ids", draft_token_ids)
    batch, max_drafts = draft_token_ids.shape
    num_slots = check_requests(batch, device, temperature, seeds, positions, slots)
    check_integers("num_draft_tokens", num_draft_tokens, (batch,), device)
    num_cached = 0
    if draft_logits is not None:
        width = vocab_size if draft_ids is None else num_candidates(vocab_size)
        check_rows("draft_logits", draft_logits, (None, max_drafts, width), device)
        num_cached = check_num_rows("draft_logits", draft_logits, num_slots, slots)
    for name, tensor, dtype in (
        ("draft_logsumexp", draft_logsumexp, torch.float32),
        ("draft_argmax", draft_argmax, torch.int64),
        ("draft_threshold", draft_threshold, torch.float32),
    ):
        if tensor is not None:
            check_tensor(name, tensor, (num_cached, max_drafts), dtype, device)
            check_contiguous(name, tensor)
    if bitmask is not None:
        check_tensor("bitmask", bitmask, (target_logits.shape[0], (vocab_size + 31) // 32), torch.int32, device)
        check_unit_stride("bitmask", bitmask)
    filters.check(num_slots, device)
    if draft_threshold is not None and draft_logsumexp is None:
        raise ValueError("draft_threshold is given without draft_logsumexp, of what it keeps")
    if draft_ids is not None:
        check_tensor("draft_ids", draft_ids, (num_cached, max_drafts, num_candidates(vocab_size)), torch.int32, device)
        check_contiguous("draft_ids", draft_ids)
        if draft_logits is None or draft_logsumexp is None:
            raise ValueError("draft_ids is given without draft_logits and draft_logsumexp, of the same candidates")
    if one_hot is not None:
        check_tensor("one_hot", one_hot, (batch,), torch.bool, device)
    return num_cached
