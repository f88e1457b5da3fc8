"""Assertions on samplers, by the protocol of `vllm_bebop.statistics`."""

from collections.abc import Callable

from numpy.typing import ArrayLike

from vllm_bebop.statistics import (
    HONEST_P_VALUE,
    MIN_EXPECTED_COUNT,
    RERUN_P_VALUE,
    Experiment,
    bonferroni,
    g_test,
    honest_p_value,
    independence_test,
)

__all__ = [
    "HONEST_P_VALUE",
    "MIN_EXPECTED_COUNT",
    "RERUN_P_VALUE",
    "assert_fault_is_caught",
    "assert_law",
    "assert_laws",
    "bonferroni",
    "g_test",
    "independence_test",
]

CountExperiment = Callable[[int, int], ArrayLike]


def assert_laws(experiment: Experiment, num_samples: int) -> None:
    """Asserts that an honest sampler passes: `experiment(num_samples, first_seed)` returns a p-value per named law."""
    passed, p_values = honest_p_value(experiment, num_samples)
    assert passed, f"law violated: {p_values}"


def assert_law(counts: CountExperiment, probs: ArrayLike, num_samples: int) -> None:
    """`assert_laws` for one law: `counts(num_samples, first_seed)` returns the counts of the cells of `probs`."""
    assert_laws(lambda n, first_seed: {"law": g_test(counts(n, first_seed), probs)}, num_samples)


def assert_fault_is_caught(experiment: Experiment, num_samples: int) -> None:
    """Asserts that the same experiment, run on a sampler with a planted fault, rejects it beyond doubt."""
    p_values = experiment(num_samples, 0)
    assert bonferroni(p_values) < RERUN_P_VALUE, f"the planted fault passed unnoticed: {p_values}"
