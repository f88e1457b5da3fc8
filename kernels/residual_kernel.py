"""The rare tokens that thinning gave up on, drawn from max(0, p - q) itself: two rows are read once more. And totals.

A good draft is seldom rejected, but where it is, p and q are so alike that of a hundred requests a few come here. Most
launches find one, or none; so there are no more programs than a GPU runs at once, each with a share of the requests,
whose flags it looks at together for the next one that waits.
"""

import triton
import triton.language as tl

from vllm_bebop.kernels.device import NEG_INF, from_first_lane, load_policy, load_statistics, settle, take_ticket
from vllm_bebop.kernels.resampling import draw_from_residual, load_draft_threshold, store_residual_sums
from vllm_bebop.kernels.tally_kernel import add_to_totals
from vllm_bebop.kernels.verification_rows import LSE_P, LSE_Q, THRESHOLD

FLAGS_AT_ONCE = tl.constexpr(128)  # that a program looks at
NO_GROUP = tl.constexpr(2**30)


@triton.jit(
    do_not_specialize=["num_target_rows", "num_cached", "target_is_processed", "row_plane", "batch"],
    do_not_specialize_on_alignment=["slots_ptr"],  # vLLM may hand over a part of a batch
)
def residual_kernel(
    target_ptr,
    target_stride,
    num_target_rows,
    target_is_processed,
    bitmask_ptr,
    bitmask_stride,
    draft_ptr,
    draft_slot_stride,
    draft_step_stride,
    draft_threshold_ptr,
    draft_ids_ptr,
    num_candidates,
    num_cached,
    tokens_ptr,
    tokens_stride,
    first_rows_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    slots_ptr,
    one_hot_ptr,
    rows_ptr,
    row_plane,
    request_tickets_ptr,
    unresolved_ptr,
    residual_sums_ptr,
    token_ids_ptr,
    num_accepted_ptr,
    num_tokens_ptr,
    entropy_ptr,
    overlap_ptr,
    argmax_prob_ptr,
    totals_ptr,
    batch,
    max_drafts,
    vocab_size,
    num_blocks,
    FILTERED: tl.constexpr,
    SUB_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_STEPS: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Grid (tiles, any number of programs), over which the groups of REQUESTS requests are dealt out in turn.

    The last program also adds the verification, of which all but these tokens is known by now, to the totals: any one
    would do, and the last is the likeliest to have no request.
    """
    GROUPS: tl.constexpr = max(1, FLAGS_AT_ONCE // REQUESTS)
    tile = tl.program_id(0)
    num_groups = tl.cdiv(batch, REQUESTS)
    for first_group in range(tl.program_id(1), num_groups, tl.num_programs(1) * GROUPS):
        groups = first_group + tl.arange(0, GROUPS) * tl.num_programs(1)
        group = first_waiting(unresolved_ptr, groups, -1, batch, REQUESTS)
        while group < NO_GROUP:
            request = group * REQUESTS + tl.arange(0, REQUESTS)
            in_batch = request < batch
            is_request = in_batch & (tl.load(unresolved_ptr + request, mask=in_batch, other=0) != 0)
            slot = request.to(tl.int64)
            if slots_ptr is not None:
                slot = settle(tl.load(slots_ptr + request, mask=is_request, other=0)).to(tl.int64)
            first_row = settle(tl.load(first_rows_ptr + request, mask=is_request, other=0)).to(tl.int64)
            step = settle(tl.load(num_accepted_ptr + request, mask=is_request, other=0)).to(tl.int32)
            token = tl.load(tokens_ptr + request * tokens_stride + step, mask=is_request, other=-1).to(tl.int32)
            _, inverse_target, inverse_draft, is_point_mass = load_policy(
                temperature_ptr, target_is_processed, one_hot_ptr, request, slot, is_request, num_cached
            )
            row = first_row + step
            is_read = is_request & (row >= 0) & (row < num_target_rows)
            target_row, bitmask_row = target_ptr + row * target_stride, row * bitmask_stride
            draft_row, draft_ids = None, None
            if draft_ptr is not None:
                draft_row = draft_ptr + slot * draft_slot_stride + step.to(tl.int64) * draft_step_stride
            if draft_ids_ptr is not None:
                draft_ids = draft_ids_ptr + (slot * max_drafts + step) * num_candidates
            row_index = request * (max_drafts + 1) + step
            rows = rows_ptr + row_index
            threshold = tl.zeros([REQUESTS], tl.float32) + NEG_INF
            if FILTERED:
                threshold = tl.load(rows + THRESHOLD * row_plane, mask=is_request, other=NEG_INF)
            draft_threshold = load_draft_threshold(
                draft_threshold_ptr, slot, step, max_drafts, is_request & ~is_point_mass
            )
            logsumexp_p = tl.load(rows + LSE_P * row_plane, mask=is_request, other=0.0)
            logsumexp_q = tl.load(rows + LSE_Q * row_plane, mask=is_request, other=0.0)
            residual_sums = residual_sums_ptr + request * num_blocks
            store_residual_sums(
                target_row, bitmask_ptr, bitmask_row, threshold, draft_row, draft_ids, draft_threshold, is_read,
                is_request, token, is_point_mass, logsumexp_p, logsumexp_q, inverse_target, inverse_draft, tile,
                residual_sums, num_blocks, vocab_size, SUB_BLOCK, TILE,
            )  # fmt: skip
            if take_ticket(request_tickets_ptr + group, tl.num_programs(0), 1) > 0:
                seed = tl.load(seeds_ptr + slot, mask=is_request, other=0)
                position = tl.load(positions_ptr + request, mask=is_request, other=0).to(tl.int32) + step
                block_sums = load_statistics(residual_sums, is_request, num_blocks, PADDED_BLOCKS, 0.0)
                draw = draw_from_residual(
                    target_row, bitmask_ptr, bitmask_row, threshold, draft_row, draft_ids, draft_threshold, is_read,
                    token, is_point_mass, block_sums, logsumexp_p, logsumexp_q, inverse_target, inverse_draft, seed,
                    position, vocab_size, SUB_BLOCK, PADDED_BLOCKS,
                )  # fmt: skip
                # An all-zero residual (p equal to q up to rounding) keeps the last draw from p.
                is_replaced = is_request & (tl.sum(block_sums, axis=1) > 0)
                tl.store(token_ids_ptr + row_index, draw.to(tl.int64), mask=is_replaced)
            group = first_waiting(unresolved_ptr, groups, group, batch, REQUESTS)

    if totals_ptr is not None:  # noqa: SIM102 (known to the compiler, unlike the inner condition)
        if (tl.program_id(0) == tl.num_programs(0) - 1) & (tl.program_id(1) == tl.num_programs(1) - 1):
            add_to_totals(
                entropy_ptr, overlap_ptr, argmax_prob_ptr, num_tokens_ptr, totals_ptr, batch, max_drafts, PADDED_STEPS
            )


@triton.jit
def first_waiting(unresolved_ptr, groups, last, batch, REQUESTS: tl.constexpr):
    """The first of the groups [N] after the last one, a scalar, that has a request to draw for; or NO_GROUP."""
    members = groups[:, None] * REQUESTS + tl.arange(0, REQUESTS)[None, :]
    flags = tl.load(unresolved_ptr + members, mask=members < batch, other=0)
    is_waiting = (tl.max(flags, axis=1) != 0) & (groups > last)
    return from_first_lane(tl.min(tl.where(is_waiting, groups, NO_GROUP), axis=0))
