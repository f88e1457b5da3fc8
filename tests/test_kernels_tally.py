"""Running totals over verifications: by hand, and the kernel against its reference.

Runs on the GPU where there is one, otherwise on the CPU: see tests/support/kernels.py.
"""

import pytest
import torch

from tests.support.kernels import DEVICE, RUNS_HERE, assert_bitwise_equal, run_on_the_cpu, runs_kernels
from tests.support.verification import case, in_every_form, verify, with_draft_statistics
from vllm_bebop.kernels.reference import Verification
from vllm_bebop.kernels.tally import TOTALS, new_totals, read_totals, tally_reference

NAN = float("nan")


@pytest.mark.parametrize("how", ["interpreted", "emulated"])
def test_on_the_cpu(how: str) -> None:
    run_on_the_cpu(__file__, how)


test_on_the_cpu.__test__ = not RUNS_HERE


def verification(num_accepted: list[int], entropy: list, overlap: list, argmax_prob: list) -> Verification:
    accepted = torch.tensor(num_accepted, device=DEVICE)
    count = torch.zeros_like(accepted)
    tensors = (torch.tensor(rows, device=DEVICE) for rows in (entropy, overlap, argmax_prob))
    token_ids = torch.zeros(len(num_accepted), len(entropy[0]), dtype=torch.int64, device=DEVICE)
    return Verification(token_ids, accepted, (accepted + 1).int(), *tensors, count, count)


def random_verification(batch: int, max_drafts: int, seed: int) -> Verification:
    """Rounds of any number of drafts; NaN in some of the steps past them, and past the first rejection."""
    generator = torch.Generator().manual_seed(seed)
    num_drafts = torch.randint(0, max_drafts + 1, (batch,), generator=generator)
    num_accepted = (torch.rand(batch, generator=generator) * (num_drafts + 1)).long()
    steps = torch.arange(max_drafts + 1)
    hidden = (steps > num_accepted[:, None]) & (torch.rand(batch, max_drafts + 1, generator=generator) < 0.5)
    hidden |= steps > num_drafts[:, None]
    values = torch.rand(3, batch, max_drafts + 1, generator=generator).masked_fill(hidden, NAN)
    overlap, argmax_prob = (value.masked_fill(steps == num_drafts[:, None], NAN)[:, :-1] for value in values[1:])
    return verification(num_accepted.tolist(), values[0].tolist(), overlap.tolist(), argmax_prob.tolist())


def test_tally_reference_counts_served_steps_only() -> None:
    totals = new_totals(2, DEVICE)
    rounds = verification(
        num_accepted=[2, 0, 0, 1],
        entropy=[[1.0, 2.0, 3.0], [4.0, 50.0, 60.0], [70.0, NAN, NAN], [5.0, 6.0, NAN]],
        overlap=[[0.5, 0.25], [0.125, 0.9], [NAN, NAN], [0.75, NAN]],  # the third has no draft, the fourth one
        argmax_prob=[[0.1, 0.2], [0.3, 0.9], [NAN, NAN], [0.4, NAN]],
    )
    tally_reference(rounds, totals)
    tally_reference(rounds, totals)
    expected = {
        "tokens": [6, 4, 2],
        "entropy_nats": [20.0, 16.0, 6.0],
        "drafts": [6, 2],
        "accepted": [4, 2],
        "overlap": [2.75, 0.5],
        "target_only": [1.6, 0.4],
    }
    assert {name: pytest.approx(row) for name, row in read_totals(totals).items()} == expected


@runs_kernels
@pytest.mark.parametrize(("batch", "max_drafts"), [(0, 3), (1, 1), (5, 0), (7, 3), (300, 16)])
def test_tally_equals_reference(batch: int, max_drafts: int) -> None:
    from vllm_bebop.kernels.tally_kernel import tally

    ours, eager = new_totals(max_drafts, DEVICE), new_totals(max_drafts, DEVICE)
    for seed in range(2):
        rounds = random_verification(max(batch, 1), max_drafts, seed)
        rounds = Verification(*(getattr(rounds, name)[:batch] for name in Verification.__dataclass_fields__))
        tally(rounds, ours)
        tally_reference(rounds, eager)
    torch.testing.assert_close(ours, eager, rtol=1e-6, atol=0)
    assert batch * max_drafts == 0 or (ours[0] > 0).any()


@runs_kernels
@in_every_form
def test_verify_tallies_itself(form: dict) -> None:
    from vllm_bebop.kernels import fallback

    values = with_draft_statistics(case(70, 3, 100))
    num_scheduled = (values["num_draft_tokens"] - torch.arange(70, device=DEVICE) % 2).clamp(min=0)
    ours, eager = new_totals(3, DEVICE), new_totals(3, DEVICE)
    for _ in range(2):
        out = verify(**values, num_scheduled=num_scheduled, **form, totals=ours)
        tally_reference(out, eager)
    torch.testing.assert_close(ours, eager, rtol=1e-6, atol=0)
    assert (eager > 0).sum() >= 20
    assert_bitwise_equal(out, verify(**values, num_scheduled=num_scheduled, **form))

    plain, block = new_totals(3, DEVICE), form.get("block", False)
    slots = torch.arange(70, device=DEVICE)
    fallback.verify(**values, slots=slots, num_scheduled=num_scheduled, block=block, totals=plain)
    accepted = TOTALS.index("accepted")  # unlike the others, whatever the reference knows of drafts that q cannot draw
    assert torch.equal(plain[accepted] * 2, eager[accepted])


@runs_kernels
def test_tally_refuses_totals_of_another_size() -> None:
    from vllm_bebop.kernels.tally_kernel import tally

    with pytest.raises(ValueError, match="totals has shape"):
        tally(random_verification(2, 3, 0), new_totals(2, DEVICE))
