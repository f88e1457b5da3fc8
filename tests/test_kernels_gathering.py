"""What a step verifies: by hand, and the kernel against its reference.

Runs on the GPU where there is one, otherwise on the CPU: see tests/support/kernels.py.
"""

import pytest
import torch

from tests.support.kernels import DEVICE, RUNS_HERE, run_on_the_cpu, runs_kernels
from vllm_bebop.kernels.gathering import DrawnDrafts, gather_drafts_reference


@pytest.mark.parametrize("how", ["interpreted", "emulated"])
def test_on_the_cpu(how: str) -> None:
    run_on_the_cpu(__file__, how)


test_on_the_cpu.__test__ = not RUNS_HERE


def drawn_drafts(token_ids: list[list[int]], first_positions: list[int], has_grammar: list[bool]) -> DrawnDrafts:
    steps = torch.arange(len(token_ids[0]), device=DEVICE)
    return DrawnDrafts(
        token_ids=torch.tensor(token_ids, device=DEVICE),
        positions=torch.tensor(first_positions, device=DEVICE)[:, None] + steps,
        has_grammar=torch.tensor(has_grammar, device=DEVICE),
    )


def test_reference_puts_back_the_first_that_was_dropped_under_a_grammar_and_nothing_else() -> None:
    drawn = drawn_drafts(
        [[2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7], [1, 2, 3]],
        first_positions=[20, 7, 20, 20, 20],  # of slot 1, from before
        has_grammar=[True, True, False, True, True],
    )
    # Scheduled: all drafts; one; one, of other drafts; one, without a grammar; none, of another round; one, no slot.
    input_ids = torch.tensor([9, 1, 2, 3, 9, 2, 9, 3, 9, 4, 9, 9, 8], device=DEVICE)
    row_offsets = torch.tensor([0, 4, 6, 8, 10, 11, 13], device=DEVICE)
    slots = torch.tensor([4, 0, 1, 2, 3, 7], device=DEVICE)
    input_positions = torch.full((13,), 19, device=DEVICE)
    input_positions[10] = 20
    found = gather_drafts_reference(input_ids, input_positions, row_offsets, slots, 3, drawn=drawn)
    assert found.num_scheduled.tolist() == [3, 1, 1, 1, 0, 1]
    assert found.num_drafts.tolist() == [3, 2, 1, 1, 0, 1]
    assert found.positions.tolist() == [20, 20, 20, 20, 21, 20]
    expected = [[1, 2, 3], [2, 3, -1], [-1, -1, -1], [4, -1, -1], [-1, -1, -1], [8, -1, -1]]
    assert found.token_ids.tolist() == expected
    input_positions[10] = 19
    found = gather_drafts_reference(input_ids, input_positions, row_offsets, slots, 3, drawn=drawn)
    assert found.num_drafts.tolist() == [3, 2, 1, 1, 1, 1]
    assert found.token_ids[4].tolist() == [5, -1, -1]


def test_reference_lets_nothing_follow_the_first_draft_that_is_cut() -> None:
    """The grammar may allow it: then it is accepted, but the row behind it has no mask to draw another token by."""
    input_ids = torch.tensor([9, 1, 2, 3, 9, 4, 5, 6], device=DEVICE)
    cut = torch.tensor([9, 1, -1, -1, 9, -1, -1, -1], device=DEVICE)
    row_offsets, slots = torch.tensor([0, 4, 8], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    positions = torch.full((8,), 19, device=DEVICE)
    drawn = drawn_drafts([[1, 2, 3], [4, 5, 6]], first_positions=[20, 20], has_grammar=[True, True])
    found = gather_drafts_reference(input_ids, positions, row_offsets, slots, 3, cut_input_ids=cut, drawn=drawn)
    assert found.token_ids.tolist() == [[1, 2, -1], [4, -1, -1]]
    assert found.num_drafts.tolist() == [2, 1] and found.num_scheduled.tolist() == [1, 0]
    one_hot = gather_drafts_reference(input_ids, positions, row_offsets, slots, 3, cut_input_ids=cut)
    assert one_hot.token_ids.tolist() == [[1, -1, -1], [-1, -1, -1]]
    assert one_hot.num_drafts.tolist() == one_hot.num_scheduled.tolist() == [1, 0]


def test_reference_takes_no_draft_that_was_not_drawn() -> None:
    """Such as a scheduler's placeholders for a new request: the slot still holds the q of the one before."""
    input_ids = torch.tensor([9, 0, 0, 9, 1, 7, 9, 3, 4], device=DEVICE)
    row_offsets, slots = torch.tensor([0, 3, 6, 9], device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    drawn = drawn_drafts([[0, 0], [1, 2], [3, 4]], first_positions=[-1, 20, 20], has_grammar=[False, False, False])
    found = gather_drafts_reference(input_ids, torch.full_like(input_ids, 19), row_offsets, slots, 2, drawn=drawn)
    assert found.token_ids.tolist() == [[-1, -1], [1, -1], [3, 4]]
    assert found.num_drafts.tolist() == found.num_scheduled.tolist() == [2, 2, 2]


@runs_kernels
@pytest.mark.parametrize("max_drafts", [0, 1, 3, 16])
@pytest.mark.parametrize("batch", [0, 1, 200])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_gather_drafts_equals_reference(batch: int, max_drafts: int, integers: torch.dtype) -> None:
    from vllm_bebop.kernels.gathering_kernel import gather_drafts

    generator = torch.Generator().manual_seed(max_drafts)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    num_scheduled = random(0, max_drafts + 1, batch)
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (num_scheduled + 1).cumsum(0)])
    num_rows, num_slots = int(row_offsets[-1]), 150
    input_ids, input_positions = random(0, 1000, num_rows), random(5, 8, num_rows)
    first_row = torch.zeros(num_rows, dtype=torch.bool).index_fill(0, row_offsets[:-1], True)
    is_cut = ~first_row & (torch.rand(num_rows, generator=generator) < 0.3)
    for row in range(1, num_rows):  # all after the first, too
        is_cut[row] |= is_cut[row - 1] & ~first_row[row]
    cut = input_ids.masked_fill(is_cut, -1)
    drawn = DrawnDrafts(
        random(0, 1000, num_slots, max_drafts).to(DEVICE),
        (random(5, 9, num_slots, 1) + torch.arange(max_drafts)).to(DEVICE),
        (random(0, 2, num_slots) == 1).to(DEVICE),
    )
    slots = torch.randperm(max(batch, 1), generator=generator)[:batch] - 1  # outside `drawn` on both sides
    for request in range(0, batch, 2):  # every second has its own drafts
        row, slot, count = int(row_offsets[request]), int(slots[request]), int(num_scheduled[request])
        if 0 <= slot < num_slots:
            input_ids[row + 1 : row + 1 + count] = drawn.token_ids[slot, :count].cpu()
    given = [tensor.to(DEVICE, integers) for tensor in (input_ids, input_positions, row_offsets, slots)]
    slots, num_put_back, num_taken = slots.to(DEVICE), 0, 0
    for options in ({}, {"drawn": drawn}, {"cut_input_ids": cut.to(DEVICE, integers), "drawn": drawn}):
        ours, eager = (gather(*given, max_drafts, **options) for gather in (gather_drafts, gather_drafts_reference))
        for name in ("token_ids", "num_drafts", "num_scheduled", "positions"):
            assert torch.equal(getattr(ours, name), getattr(eager, name)), name
        num_put_back += int((ours.num_drafts > ours.num_scheduled).sum())
        if options:
            num_taken += int((ours.token_ids[(slots >= 0) & (slots < num_slots)] >= 0).sum())
    assert num_taken > num_put_back > 0 or batch < 200 or max_drafts == 0


@runs_kernels
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("input_ids", torch.zeros(4)),
        ("input_positions", torch.zeros(3, dtype=torch.int64)),
        ("row_offsets", torch.zeros(2, dtype=torch.int64)),
        ("slots", torch.zeros(2)),
        ("cut_input_ids", torch.zeros(4, dtype=torch.int32)),
        ("cut_input_ids", torch.zeros(8, dtype=torch.int64)[::2]),
        ("drawn.positions", DrawnDrafts(*torch.zeros(2, 2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))),
    ],
)
def test_gather_drafts_names_the_wrong_argument(name: str, wrong) -> None:
    from vllm_bebop.kernels.gathering_kernel import gather_drafts

    values = {
        "input_ids": torch.zeros(4, dtype=torch.int64, device=DEVICE),
        "input_positions": torch.zeros(4, dtype=torch.int64, device=DEVICE),
        "row_offsets": torch.tensor([0, 2, 4], device=DEVICE),
        "slots": torch.zeros(2, dtype=torch.int64, device=DEVICE),
        "max_drafts": 1,
    }
    gather_drafts(**values)
    if isinstance(wrong, DrawnDrafts):
        wrong = DrawnDrafts(*(tensor.to(DEVICE) for tensor in vars(wrong).values()))
        wrong = {"drawn": DrawnDrafts(wrong.token_ids[:, :1].contiguous(), wrong.positions, wrong.has_grammar)}
    else:
        wrong = {name: wrong.to(DEVICE)}
    with pytest.raises(ValueError, match=f"^{name} "):
        gather_drafts(**values | wrong)
