"""The verifier's kernel: statistics of a row, its verdict, and resolution of a request."""

import triton
import triton.language as tl

from vllm_bebop.kernels.block_kernel import count_accepted, draw_after_block, weigh_block
from vllm_bebop.kernels.device import (
    NEG_INF,
    load_policy,
    load_statistics,
    load_tile,
    pick,
    settle,
    summarize_tiles,
    take_ticket,
)
from vllm_bebop.kernels.filtering import has_filter, load_filters
from vllm_bebop.kernels.resampling import draw_last_token, load_draft_threshold, store_residual_sums
from vllm_bebop.kernels.row_decision import decide_row
from vllm_bebop.kernels.verification_rows import ACCEPTED, LSE_P, LSE_Q, REJECTED, THRESHOLD, store_output

NO_REJECTION = tl.constexpr(2**30)
SKIPPED = tl.constexpr(2**16)  # added to a row's ticket by each program that did not read


@triton.jit(
    do_not_specialize=["num_target_rows", "num_cached", "target_is_processed", "plane", "row_plane", "batch"]
    + ["tiles_per_program", "num_thinning_rounds"],
    do_not_specialize_on_alignment=["slots_ptr"],  # vLLM may hand over a part of a batch
)
def verify_kernel(
    target_ptr,
    target_stride,
    num_target_rows,
    target_is_processed,
    bitmask_ptr,
    bitmask_stride,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    draft_ptr,
    draft_slot_stride,
    draft_step_stride,
    draft_logsumexp_ptr,
    draft_argmax_ptr,
    draft_threshold_ptr,
    draft_ids_ptr,
    num_candidates,
    num_cached,
    tokens_ptr,
    tokens_stride,
    num_drafts_ptr,
    num_scheduled_ptr,
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
    num_tokens_ptr,
    entropy_ptr,
    overlap_ptr,
    argmax_prob_ptr,
    num_nan_ptr,
    num_empty_ptr,
    batch,
    max_drafts,
    vocab_size,
    num_blocks,
    tiles_per_program,
    num_thinning_rounds,
    STATISTICS: tl.constexpr,
    DECISION: tl.constexpr,
    RESOLUTION: tl.constexpr,
    BLOCK: tl.constexpr,
    FILTERED: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_STEPS: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Any of the four parts; the caller launches statistics, decision and resolution separately or together, and BLOCK
    together with the resolution.

    Grid (programs of a row, tiles_per_program tiles each; groups of REQUESTS requests; steps), steps slowest. The
    decision alone, then FILTERED, has one program a row, the resolution alone one a request; BLOCK reads a tile a
    program, and has none for the bonus row.
    """
    group = tl.program_id(1)
    num_steps = max_drafts + 1

    # The requests of this program, [R] each.
    request = group * REQUESTS + tl.arange(0, REQUESTS)
    in_batch = request < batch
    slot = request.to(tl.int64)
    is_request = in_batch
    if slots_ptr is not None:
        slot = settle(tl.load(slots_ptr + request, mask=in_batch, other=-1)).to(tl.int64)
        is_request = in_batch & (slot >= 0)
    num_drafts = settle(tl.load(num_drafts_ptr + request, mask=in_batch, other=0)).to(tl.int32)
    num_drafts = tl.where(is_request, tl.minimum(tl.maximum(num_drafts, 0), max_drafts), 0)
    first_row = settle(tl.load(first_rows_ptr + request, mask=in_batch, other=0)).to(tl.int64)

    # The row that this program is about: a step's row, or the request's last one.
    step = tl.zeros([REQUESTS], tl.int32) + tl.program_id(2)
    row = first_row + step
    row_index = request * num_steps + step
    is_row = in_batch & (step <= num_drafts)
    is_read = is_row & is_request & (row >= 0) & (row < num_target_rows)
    target_row = target_ptr + row * target_stride
    bitmask_row = row * bitmask_stride
    threshold = tl.zeros([REQUESTS], tl.float32) + NEG_INF
    draft_row, draft_ids = None, None
    if draft_ptr is not None:
        draft_row = draft_ptr + slot * draft_slot_stride + step.to(tl.int64) * draft_step_stride
    if draft_ids_ptr is not None:
        draft_ids = draft_ids_ptr + (slot * max_drafts + step) * num_candidates
    has_draft = is_request & (step < num_drafts)
    target_statistics = target_statistics_ptr + row_index * num_blocks
    rows = rows_ptr + row_index

    # --- Statistics of one row.
    is_resolver = tl.program_id(0) == 0
    arrived = 1
    if STATISTICS or DECISION:
        num_rows = tl.max(num_drafts, axis=0) + 1
        if tl.program_id(2) >= num_rows:
            return
        is_resolver = num_rows == 0
    if STATISTICS:  # before anything waits for the temperature
        is_wanted = is_row
        if RESOLUTION:
            # Each thread would load for itself, while other programs write: from an atomic all of them get one number.
            nothing = tl.zeros([REQUESTS], tl.int32)
            first_rejected = tl.atomic_add(first_rejected_ptr + request, nothing, mask=in_batch, sem="relaxed")
            is_wanted = is_row & (step <= first_rejected)
        first_tile = tl.program_id(0) * tiles_per_program
        end_tile = tl.minimum(first_tile + tiles_per_program, tl.cdiv(num_blocks, TILE))
        logits = load_tile(target_row, is_read & is_wanted, first_tile * TILE, vocab_size, SUB_BLOCK, TILE)

    is_greedy, inverse_target, inverse_draft, is_point_mass = load_policy(
        temperature_ptr, target_is_processed, one_hot_ptr, request, slot, is_request, num_cached
    )
    if STATISTICS:
        arrival = 1 + SKIPPED
        if tl.max(is_wanted.to(tl.int32), axis=0) > 0:
            arrival = 1
            summarize_tiles(
                logits, target_row, bitmask_ptr, bitmask_row, None, None, is_read & is_wanted, is_row, inverse_target,
                first_tile, end_tile, target_statistics, plane, num_blocks, vocab_size, SUB_BLOCK, TILE,
            )  # fmt: skip
            if draft_ptr is not None and draft_logsumexp_ptr is None:
                is_read_draft = has_draft & ~is_point_mass
                logits = load_tile(draft_row, is_read_draft, first_tile * TILE, vocab_size, SUB_BLOCK, TILE)
                summarize_tiles(
                    logits, draft_row, None, None, None, None, is_read_draft, is_row, inverse_draft, first_tile,
                    end_tile, draft_statistics_ptr + row_index * num_blocks, plane, num_blocks, vocab_size, SUB_BLOCK,
                    TILE,
                )  # fmt: skip
        if DECISION:
            arrived = take_ticket(row_tickets_ptr + group * num_steps + tl.program_id(2), tl.num_programs(0), arrival)
            if arrived == 0:
                return

    # What is read from here on, most programs of the statistics have no need of.
    seed = tl.load(seeds_ptr + slot, mask=is_request, other=0)
    first_position = tl.load(positions_ptr + request, mask=is_request, other=0).to(tl.int32)
    token = tl.load(tokens_ptr + request * tokens_stride + step, mask=has_draft, other=-1)
    token = tl.where((token >= 0) & (token < vocab_size), token, -1).to(tl.int32)

    # --- Decision of one row, by the last of its programs to arrive.
    if DECISION:
        top_k, top_p, min_p = None, None, None
        if FILTERED:  # all rows have been decided without; here only those that have a filter
            top_k, top_p, min_p = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, slot, is_request)
            is_row = is_row & is_request & ~is_greedy & has_filter(top_k, top_p, min_p, vocab_size)
            is_read = is_read & is_row
            arrived = tl.max(is_row.to(tl.int32), axis=0)
        if (arrived > 0) & (arrived < SKIPPED):
            draft_statistics = None
            if draft_statistics_ptr is not None:
                draft_statistics = draft_statistics_ptr + row_index * num_blocks
            accepts = decide_row(
                target_row, bitmask_ptr, bitmask_row, top_k, top_p, min_p, draft_row, draft_ids,
                draft_logsumexp_ptr, draft_argmax_ptr, draft_threshold_ptr, slot, step, max_drafts, token, is_row,
                is_read, has_draft, is_point_mass, is_greedy, seed, first_position + step, inverse_target,
                inverse_draft, target_statistics, draft_statistics, plane, rows, row_plane, verdicts_ptr + row_index,
                num_blocks, vocab_size, FILTERED, SUB_BLOCK, PADDED_BLOCKS,
            )  # fmt: skip
            if RESOLUTION:
                is_rejection = is_row & (step < num_drafts) & ~accepts
                tl.atomic_min(first_rejected_ptr + request, step, mask=is_rejection)
        if RESOLUTION:  # noqa: SIM102
            if arrived > 0:
                is_resolver = take_ticket(request_tickets_ptr + group, num_rows, 1) > 0

    # --- Block verification: sums of max(0, w p - q) over one row; the last program of a request resolves it.
    if BLOCK:
        end, log_weight, eta, needs_sum = weigh_block(
            request, in_batch, num_drafts, is_greedy, seed, first_position, rows_ptr, row_plane, verdicts_ptr,
            max_drafts, PADDED_STEPS,
        )  # fmt: skip
        is_summed = pick(needs_sum.to(tl.float32), step) > 0
        if tl.max(is_summed.to(tl.int32), axis=0) > 0:
            if FILTERED:
                threshold = tl.load(rows + THRESHOLD * row_plane, mask=is_summed, other=NEG_INF)
            draft_threshold = load_draft_threshold(
                draft_threshold_ptr, slot, step, max_drafts, is_summed & ~is_point_mass
            )
            log_weight_here = tl.where(is_summed, pick(log_weight, step), 0.0)
            logsumexp_p = tl.load(rows + LSE_P * row_plane, mask=is_summed, other=0.0) - log_weight_here
            logsumexp_q = tl.load(rows + LSE_Q * row_plane, mask=is_summed, other=0.0)
            store_residual_sums(
                target_row, bitmask_ptr, bitmask_row, threshold, draft_row, draft_ids, draft_threshold,
                is_read & is_summed, is_summed, token, is_point_mass, logsumexp_p, logsumexp_q, inverse_target,
                inverse_draft, tl.program_id(0), residual_sums_ptr + (request * max_drafts + step) * num_blocks,
                num_blocks, vocab_size, SUB_BLOCK, TILE,
            )  # fmt: skip
        num_tiles = tl.num_programs(0) * tl.num_programs(2)
        is_resolver = take_ticket(request_tickets_ptr + group, num_tiles, 1) > 0

    # --- Resolution of a request: the accepted tokens and one more.
    if RESOLUTION:  # noqa: SIM102 (known to the compiler, unlike the inner condition)
        if is_resolver:
            if BLOCK:
                num_accepted, residual_sum = count_accepted(
                    request, end, log_weight, eta, needs_sum, residual_sums_ptr, max_drafts, num_blocks, PADDED_BLOCKS
                )
                last_used = num_drafts
                # A residual of 0 is p equal to q up to rounding, or greedy.
                from_residual = (num_accepted < end) & (residual_sum > 0)
            else:
                steps = tl.arange(0, PADDED_STEPS)[None, :]
                index = request[:, None] * num_steps + steps
                is_draft = in_batch[:, None] & (steps < num_drafts[:, None])
                is_step = in_batch[:, None] & (steps < max_drafts)  # known sooner than which steps have a draft
                verdict = tl.load(verdicts_ptr + index, mask=is_step, other=ACCEPTED, cache_modifier=".cg")
                num_accepted = tl.min(tl.where(is_draft & (verdict != ACCEPTED), steps, num_drafts[:, None]), axis=1)
                last_used = num_accepted
                is_last = steps == num_accepted[:, None]
                last_verdict = tl.max(tl.where(is_draft & is_last, verdict, ACCEPTED), axis=1)
                # A rejected greedy draft is not the argmax, so that max(0, p - q) is p.
                from_residual = (last_verdict == REJECTED) & ~is_greedy

            row = first_row + num_accepted
            row_index = request * num_steps + num_accepted
            is_read = is_request & (row >= 0) & (row < num_target_rows)
            target_row = target_ptr + row * target_stride
            bitmask_row = row * bitmask_stride
            if FILTERED:
                threshold = tl.load(
                    rows_ptr + THRESHOLD * row_plane + row_index, mask=in_batch, other=NEG_INF, cache_modifier=".cg"
                )
            if draft_ptr is not None:
                draft_row = draft_ptr + slot * draft_slot_stride + num_accepted.to(tl.int64) * draft_step_stride
            if draft_ids_ptr is not None:
                draft_ids = draft_ids_ptr + (slot * max_drafts + num_accepted) * num_candidates
            draft_threshold = load_draft_threshold(
                draft_threshold_ptr, slot, num_accepted, max_drafts, from_residual & ~is_point_mass
            )
            rejected = tl.load(tokens_ptr + request * tokens_stride + num_accepted, mask=from_residual, other=-1)
            rejected = rejected.to(tl.int32)
            position = first_position + num_accepted
            logsumexp_p = tl.load(rows_ptr + LSE_P * row_plane + row_index, mask=in_batch, cache_modifier=".cg")
            logsumexp_q = tl.load(rows_ptr + LSE_Q * row_plane + row_index, mask=in_batch, cache_modifier=".cg")
            block_logsumexp = load_statistics(
                target_statistics_ptr + row_index * num_blocks, in_batch, num_blocks, PADDED_BLOCKS, NEG_INF
            )
            store_output(
                request, in_batch, num_accepted, last_used, num_drafts, num_scheduled_ptr, max_drafts, tokens_ptr,
                tokens_stride, rows_ptr, row_plane, token_ids_ptr, num_accepted_ptr, num_tokens_ptr, entropy_ptr,
                overlap_ptr, argmax_prob_ptr, num_nan_ptr, num_empty_ptr, PADDED_STEPS,
            )  # fmt: skip
            if BLOCK:
                sums = load_statistics(
                    residual_sums_ptr + (request * max_drafts + num_accepted) * num_blocks, from_residual, num_blocks,
                    PADDED_BLOCKS, 0.0,
                )  # fmt: skip
                token = draw_after_block(
                    target_row, bitmask_ptr, bitmask_row, threshold, draft_row, draft_ids, draft_threshold, is_read,
                    from_residual, rejected, is_point_mass, is_greedy,
                    tl.where(from_residual[:, None], tl.log(sums), block_logsumexp),
                    logsumexp_p - tl.where(from_residual, pick(log_weight, num_accepted), 0.0), logsumexp_q,
                    inverse_target, inverse_draft, seed, position, vocab_size, SUB_BLOCK, PADDED_BLOCKS,
                )  # fmt: skip
            else:
                token, is_dropped = draw_last_token(
                    target_row, bitmask_ptr, bitmask_row, threshold, draft_row, draft_ids, draft_threshold, in_batch,
                    is_read, from_residual, rejected, is_point_mass, is_greedy, block_logsumexp, logsumexp_p,
                    logsumexp_q, inverse_target, inverse_draft, seed, position, num_thinning_rounds, vocab_size,
                    SUB_BLOCK, PADDED_BLOCKS,
                )  # fmt: skip
                tl.store(unresolved_ptr + request, is_dropped.to(tl.int32), mask=in_batch)
            tl.store(token_ids_ptr + row_index, token.to(tl.int64), mask=in_batch)
            if STATISTICS:
                tl.store(first_rejected_ptr + request, tl.zeros([REQUESTS], tl.int32) + NO_REJECTION, mask=in_batch)
