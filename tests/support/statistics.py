"""Statistical tests of a sampler: small chi-squared-like tests of single laws, combined by Bonferroni.

One large joint test spreads a fault over many cells and misses it; a few low-dimensional ones do not. The protocol:

- An honest sampler passes if p >= HONEST_P_VALUE. If not, it runs again on fresh seeds with four times the samples and
  must reach RERUN_P_VALUE: chance hardly fails twice, a fault fails harder.
- A sampler with a planted fault must fall below RERUN_P_VALUE, or the test that guards against it is worthless.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2

HONEST_P_VALUE = 1e-4
RERUN_P_VALUE = 1e-6
MIN_EXPECTED_COUNT = 5.0

# Called with (num_samples, first_seed); a rerun gets seeds that no earlier run used.
Experiment = Callable[[int, int], Mapping[str, float]]
CountExperiment = Callable[[int, int], ArrayLike]


def _g_statistic(observed: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    seen = observed > 0
    return 2.0 * float(np.sum(observed[seen] * np.log(observed[seen] / expected[seen])))


def g_test(counts: ArrayLike, probs: ArrayLike) -> float:
    """P-value of the likelihood-ratio test that `counts` is a sample of the law `probs`.

    Args:
        counts: [cells] observed counts.
        probs: [cells] probabilities of the cells; normalised here. A count in a cell of probability 0 gives p = 0.
    Cells with an expected count below MIN_EXPECTED_COUNT are pooled, the rarest first.
    """
    observed, law = np.asarray(counts, dtype=np.float64).ravel(), np.asarray(probs, dtype=np.float64).ravel()
    if observed.shape != law.shape:
        raise ValueError(f"counts has {observed.size} cells, probs has {law.size}")
    if observed[law == 0].any():
        return 0.0
    observed, law = observed[law > 0], law[law > 0]
    expected = law / law.sum() * observed.sum()
    order = np.argsort(expected)
    observed, expected = observed[order], expected[order]
    # The smallest number of rarest cells that together reach the minimum, if there is a cell below it at all.
    pooled = 1 + int(np.searchsorted(np.cumsum(expected), MIN_EXPECTED_COUNT))
    pooled = min(max(pooled, int(np.sum(expected < MIN_EXPECTED_COUNT))), expected.size)
    observed = np.append(observed[pooled:], observed[:pooled].sum())
    expected = np.append(expected[pooled:], expected[:pooled].sum())
    if expected.size < 2:
        return 1.0
    return float(chi2.sf(_g_statistic(observed, expected), expected.size - 1))


def independence_test(table: ArrayLike) -> float:
    """P-value of the likelihood-ratio test that rows and columns of a table of counts [rows, columns] are independent.

    The rarest rows and columns are left out until every expected count reaches MIN_EXPECTED_COUNT.
    """
    observed = np.asarray(table, dtype=np.float64)
    while True:
        observed = observed[observed.sum(axis=1) > 0][:, observed.sum(axis=0) > 0]
        if min(observed.shape) < 2:
            return 1.0
        rows, columns = observed.sum(axis=1), observed.sum(axis=0)
        expected = np.outer(rows, columns) / observed.sum()
        if expected.min() >= MIN_EXPECTED_COUNT:
            break
        if rows.min() <= columns.min():
            observed = np.delete(observed, rows.argmin(), axis=0)
        else:
            observed = np.delete(observed, columns.argmin(), axis=1)
    degrees_of_freedom = (observed.shape[0] - 1) * (observed.shape[1] - 1)
    return float(chi2.sf(_g_statistic(observed.ravel(), expected.ravel()), degrees_of_freedom))


def bonferroni(p_values: Mapping[str, float]) -> float:
    """P-value of the hypothesis that every single one holds, whatever their dependence."""
    return min(1.0, len(p_values) * min(p_values.values()))


def assert_laws(experiment: Experiment, num_samples: int) -> None:
    """Asserts that an honest sampler passes: `experiment(num_samples, first_seed)` returns a p-value per named law."""
    p_values = experiment(num_samples, 0)
    if bonferroni(p_values) >= HONEST_P_VALUE:
        return
    rerun = experiment(4 * num_samples, num_samples)
    assert bonferroni(rerun) >= RERUN_P_VALUE, f"law violated: first run {p_values}, rerun {rerun}"


def assert_law(counts: CountExperiment, probs: ArrayLike, num_samples: int) -> None:
    """`assert_laws` for one law: `counts(num_samples, first_seed)` returns the counts of the cells of `probs`."""
    assert_laws(lambda n, first_seed: {"law": g_test(counts(n, first_seed), probs)}, num_samples)


def assert_fault_is_caught(experiment: Experiment, num_samples: int) -> None:
    """Asserts that the same experiment, run on a sampler with a planted fault, rejects it beyond doubt."""
    p_values = experiment(num_samples, 0)
    assert bonferroni(p_values) < RERUN_P_VALUE, f"the planted fault passed unnoticed: {p_values}"
