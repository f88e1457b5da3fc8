"""Hidden states kept on disk: read back as they were, or computed again."""

from pathlib import Path

import pytest
import torch

from vllm_bebop.train.data import Row
from vllm_bebop.train.hidden_states import HiddenStates

ROW = Row(torch.tensor([[5, 6, 7, 8, 0, 0]]), torch.tensor([[0, 0, 1, 1, -1, -1]]), torch.ones(1, 6, dtype=torch.bool))


def states(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    result = torch.randn(1, 6, 8, generator=generator).to(dtype)
    result[:, 4:] = 0  # padding
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_read_back_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = HiddenStates(tmp_path / "new", "target", dtype)
    assert kept.read(ROW) is None
    teacher = states(dtype)
    for fed in (teacher.clone(), 2 * teacher):
        kept.write(ROW, fed, teacher)
        found = kept.read(ROW)
        assert found is not None
        for ours, theirs in zip(found, (fed, teacher), strict=True):
            assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_hidden_states_are_of_one_target_dtype_and_row(tmp_path: Path) -> None:
    HiddenStates(tmp_path, "target", torch.bfloat16).write(ROW, states(), states())
    assert HiddenStates(tmp_path, "another", torch.bfloat16).read(ROW) is None
    assert HiddenStates(tmp_path, "target", torch.float32).read(ROW) is None
    kept = HiddenStates(tmp_path, "target", torch.bfloat16)
    assert kept.read(ROW._replace(token_ids=ROW.token_ids + 1)) is None
    assert kept.read(ROW._replace(documents=torch.tensor([[0, 0, 0, 1, -1, -1]]))) is None
    assert kept.read(ROW._replace(loss_mask=~ROW.loss_mask)) is not None  # which chains count is nothing to the target


def test_hidden_states_that_cannot_be_read_are_computed_again(tmp_path: Path) -> None:
    kept = HiddenStates(tmp_path, "target", torch.bfloat16)
    kept.write(ROW, states(), states())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert kept.read(ROW) is None
