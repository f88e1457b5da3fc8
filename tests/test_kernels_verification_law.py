"""What the fused verifier puts out follows p; each planted fault is caught."""

import numpy as np
import pytest
import torch

from tests.support.kernels import (
    DEVICE,
    RUNS_HERE,
    plants_faults,
    run_on_the_cpu,
    runs_kernels,
)
from tests.support.statistics import assert_fault_is_caught, assert_law, assert_laws
from tests.support.verification import laws, verify
from vllm_bebop.kernels import reference
from vllm_bebop.kernels.filters import Filters
from vllm_bebop.selftest import NUM_SAMPLES

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0) in the interpreter


def test_on_the_cpu() -> None:
    run_on_the_cpu(__file__, "interpreted")


test_on_the_cpu.__test__ = not RUNS_HERE


@runs_kernels
@pytest.mark.parametrize("one_hot", [False, True])
def test_verify_estimates_the_overlap(one_hot: bool) -> None:
    """The mean of min(1, p(y) / q(y)) is the chance of acceptance: exact if one-hot, else within 5 standard errors."""
    from vllm_bebop.kernels.backend import fused
    from vllm_bebop.selftest import P, Step

    step = Step(fused(), NUM_SAMPLES, 0, torch.device(DEVICE), one_hot)
    _, out = step.run()
    estimate = out.overlap[:, 0].cpu().double()
    error = (estimate.mean() - torch.minimum(P[0], step.q[0]).sum()).abs().item()
    assert error <= 5 * estimate.std().item() / NUM_SAMPLES**0.5 + 1e-6


@runs_kernels
@pytest.mark.parametrize("single_launch", [False, True])
def test_verify_laws(single_launch: bool) -> None:
    assert_laws(lambda n, first: laws(n, first, single_launch=single_launch), NUM_SAMPLES)


@runs_kernels
def test_verify_laws_one_hot() -> None:
    assert_laws(lambda n, first: laws(n, first, one_hot=True), NUM_SAMPLES)


@runs_kernels
def test_verify_law_with_filters() -> None:
    """Of p = 0.25, 0.14, 0.18, 0.13, 0, 0.3 a grammar forbids the last, and min-p 0.6 then keeps 0.25 and 0.18."""
    from vllm_bebop.kernels.backend import fused
    from vllm_bebop.selftest import P, Q

    def counts(num_samples: int, first_seed: int) -> np.ndarray:
        seeds = torch.arange(first_seed, first_seed + num_samples, device=DEVICE)
        slots, positions = torch.arange(num_samples, device=DEVICE), torch.full_like(seeds, 5)
        temperature, draft_logits = torch.ones(num_samples, device=DEVICE), Q[0].log().to(DEVICE).expand(num_samples, 6)
        drafts = fused().sample(draft_logits, temperature, seeds, positions, slots=slots).token_ids
        out = verify(
            P[0].log().to(DEVICE).expand(2 * num_samples, 6), drafts[:, None], draft_logits[:, None],
            torch.ones_like(seeds), temperature, seeds, positions,
            bitmask=torch.full((2 * num_samples, 1), 0b011111, dtype=torch.int32, device=DEVICE),
            filters=Filters(min_p=torch.full((num_samples,), 0.6, device=DEVICE)),
        )  # fmt: skip
        return out.token_ids[:, 0].bincount(minlength=6).cpu().numpy()

    assert_law(counts, [0.25, 0, 0.18, 0, 0, 0], 20_000)


@runs_kernels
@pytest.mark.parametrize("thinning_rounds", [0, 1])
def test_verify_laws_when_thinning_gives_up(monkeypatch, thinning_rounds: int) -> None:
    monkeypatch.setattr(reference, "NUM_THINNING_ROUNDS", thinning_rounds)
    assert_laws(laws, NUM_SAMPLES)


def plant_residual_from_p(uniform):
    """Thinning keeps every draw, so that the recovered token follows p."""
    return lambda seed, position, stream, index, attempt: (
        uniform(seed, position, stream, index, attempt) + (2.0**60 if int(stream) == 7 else 0.0)
    )


def plant_shared_accept_noise(uniform):
    """Thinning reuses the accept uniform, which is known to be large after a rejection."""

    from vllm_bebop.kernels import device

    def shared(seed, position, stream, index, attempt):
        numbers, same = uniform(seed, position, 2, index, 0), device.uniform(seed, position, 2, index, 0)
        return same if len(numbers.shape) == 1 else numbers * 0 + same[:, :, None]  # for all of four draws

    return shared


def plant_biased_uniform(uniform):
    """The accept uniform is 3 % too small."""
    return lambda seed, position, stream, index, attempt: (
        uniform(seed, position, stream, index, attempt) * (0.97 if int(stream) == 2 else 1.0)
    )


@plants_faults
@pytest.mark.parametrize("plant", [plant_residual_from_p, plant_shared_accept_noise, plant_biased_uniform])
def test_planted_faults_are_caught(monkeypatch, plant) -> None:
    from vllm_bebop.kernels import device, resampling, row_decision

    monkeypatch.setattr(resampling, "four_uniforms", plant(device.four_uniforms))
    monkeypatch.setattr(row_decision, "uniform", plant(device.uniform))
    assert_fault_is_caught(laws, 2 * NUM_SAMPLES)
