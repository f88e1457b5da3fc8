"""Gathering a step's drafts in one small launch, a request per program: see `gathering`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_bebop.kernels.arguments import check_contiguous, check_integers, check_tensor
from vllm_bebop.kernels.gathering import DrawnDrafts, GatheredDrafts
from vllm_bebop.kernels.launch import compile_options


def gather_drafts(
    input_ids: Tensor,
    input_positions: Tensor,
    row_offsets: Tensor,
    slots: Tensor,
    max_drafts: int,
    *,
    cut_input_ids: Tensor | None = None,
    drawn: DrawnDrafts | None = None,
) -> GatheredDrafts:
    """Each request's scheduled drafts, and one more where the scheduler dropped the next under a grammar.

    Args:
        input_ids, input_positions: [N] int32 or int64, the token that was fed to each row of target logits, and its
            absolute position: the last token decided, then the drafts, of which -1 is none.
        row_offsets: [B + 1] int32 or int64: request r owns rows row_offsets[r] .. row_offsets[r + 1] - 1, one at least
            and max_drafts + 1 at most.
        slots: [B] int32 or int64, each request's row of `drawn`. Drafts of a slot outside it are taken as they are:
            they are one-hot, so any will do.
        cut_input_ids: [N], dtype of input_ids: the same, with -1 from the first draft that the scheduler has not seen
            to be allowed by the grammar. From there on they count as dropped.
        drawn: what was drafted last; without it all drafts are taken as they are, and none is put back.
    Returns:
        GatheredDrafts.
    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the argument.
    Reference: gathering.gather_drafts_reference
    """
    device, (num_rows,) = input_ids.device, input_ids.shape
    check_integers("input_ids", input_ids, (num_rows,), device)
    check_integers("input_positions", input_positions, (num_rows,), device)
    check_integers("slots", slots, (None,), device)
    batch = len(slots)
    check_integers("row_offsets", row_offsets, (batch + 1,), device)
    if cut_input_ids is not None:
        check_tensor("cut_input_ids", cut_input_ids, (num_rows,), input_ids.dtype, device)
        check_contiguous("cut_input_ids", cut_input_ids)
    num_slots = 0
    if drawn is not None:
        num_slots = len(drawn.has_grammar)
        check_tensor("drawn.has_grammar", drawn.has_grammar, (num_slots,), torch.bool, device)
        for name, tensor in (("drawn.token_ids", drawn.token_ids), ("drawn.positions", drawn.positions)):
            check_tensor(name, tensor, (num_slots, max_drafts), torch.int64, device)
            check_contiguous(name, tensor)

    def integers(*shape: int) -> Tensor:  # allocated one by one: Triton compiles anew for another alignment
        return torch.empty(batch, *shape, dtype=torch.int64, device=device)

    token_ids, num_drafts, num_scheduled, positions = integers(max_drafts), integers(), integers(), integers()
    if batch > 0:
        gather_kernel[(batch,)](
            input_ids,
            cut_input_ids,
            input_positions,
            row_offsets,
            slots,
            None if drawn is None else drawn.token_ids,
            None if drawn is None else drawn.positions,
            None if drawn is None else drawn.has_grammar,
            num_slots,
            token_ids,
            num_drafts,
            num_scheduled,
            positions,
            max_drafts,
            STEPS=triton.next_power_of_2(max(max_drafts, 1)),
            **compile_options(1),
        )
    return GatheredDrafts(token_ids, num_drafts, num_scheduled, positions)


# vLLM may hand over a part of a batch, whose rows begin anywhere: not to be compiled for each alignment.
@triton.jit(
    do_not_specialize=["num_slots"],
    do_not_specialize_on_alignment=["input_ids_ptr", "cut_input_ids_ptr", "input_positions_ptr", "slots_ptr"],
)
def gather_kernel(
    input_ids_ptr,
    cut_input_ids_ptr,
    input_positions_ptr,
    row_offsets_ptr,
    slots_ptr,
    drawn_ids_ptr,
    drawn_positions_ptr,
    has_grammar_ptr,
    num_slots,
    token_ids_ptr,
    num_drafts_ptr,
    num_scheduled_ptr,
    positions_ptr,
    max_drafts,
    STEPS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    first_row = tl.load(row_offsets_ptr + request).to(tl.int64)
    end_row = tl.load(row_offsets_ptr + request + 1).to(tl.int64)
    num_scheduled = end_row - first_row - 1
    position = tl.load(input_positions_ptr + first_row).to(tl.int64) + 1

    steps = tl.arange(0, STEPS)
    row = first_row + 1 + steps
    if cut_input_ids_ptr is not None:
        is_row = steps < num_scheduled
        is_cut = is_row & (tl.load(cut_input_ids_ptr + row, mask=is_row, other=0) < 0)
        num_scheduled = tl.min(tl.where(is_cut, steps, num_scheduled), axis=0)
    token = tl.load(input_ids_ptr + row, mask=steps < num_scheduled, other=-1).to(tl.int64)

    num_drafts = num_scheduled
    if drawn_ids_ptr is not None:
        slot = tl.load(slots_ptr + request).to(tl.int64)
        is_known = (slot >= 0) & (slot < num_slots)
        place, is_place = slot * max_drafts + steps, is_known & (steps < max_drafts)
        drawn = tl.load(drawn_ids_ptr + place, mask=is_place, other=-1)
        drawn_position = tl.load(drawn_positions_ptr + place, mask=is_place, other=-1)
        is_current = is_place & (drawn_position == position + steps)
        has_grammar = tl.load(has_grammar_ptr + slot, mask=is_known, other=0) != 0
        is_dropped = is_current & has_grammar & (steps == num_scheduled)
        is_drawn = (is_current & (drawn == token)) | is_dropped
        token = tl.where(is_known, tl.where(is_drawn, drawn, -1), token)
        num_drafts += tl.sum(is_dropped.to(tl.int64), axis=0)

    tl.store(token_ids_ptr + request * max_drafts + steps, token, mask=steps < max_drafts)
    tl.store(num_drafts_ptr + request, num_drafts)
    tl.store(num_scheduled_ptr + request, num_scheduled)
    tl.store(positions_ptr + request, position)
