"""Small chi-squared-like tests of single laws, and how several of them are read together.

One large joint test spreads a fault over many cells and misses it; a few low-dimensional ones do not. The protocol:

- An honest sampler passes if p >= HONEST_P_VALUE. If not, it runs again on fresh seeds with four times the samples and
  must reach RERUN_P_VALUE: chance hardly fails twice, a fault fails harder.
- A sampler with a planted fault must fall below RERUN_P_VALUE, or the test that guards against it is worthless.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

HONEST_P_VALUE = 1e-4
RERUN_P_VALUE = 1e-6
MIN_EXPECTED_COUNT = 5.0

# Called with (num_samples, first_seed); a rerun gets seeds that no earlier run used. Returns a p-value per named law.
Experiment = Callable[[int, int], Mapping[str, float]]


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
    return _chi_squared_tail(_g_statistic(observed, expected), expected.size - 1)


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
    return _chi_squared_tail(_g_statistic(observed.ravel(), expected.ravel()), degrees_of_freedom)


def bonferroni(p_values: Mapping[str, float]) -> float:
    """P-value of the hypothesis that every single one holds, whatever their dependence."""
    return min(1.0, len(p_values) * min(p_values.values()))


def honest_p_value(experiment: Experiment, num_samples: int) -> tuple[bool, Mapping[str, float]]:
    """Whether a sampler passes by the protocol above, and the p-values that decided it."""
    p_values = experiment(num_samples, 0)
    if bonferroni(p_values) >= HONEST_P_VALUE:
        return True, p_values
    rerun = experiment(4 * num_samples, num_samples)
    return bonferroni(rerun) >= RERUN_P_VALUE, rerun


def _g_statistic(observed: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    seen = observed > 0
    return 2.0 * float(np.sum(observed[seen] * np.log(observed[seen] / expected[seen])))


def _chi_squared_tail(statistic: float, degrees_of_freedom: int) -> float:
    """P(X >= statistic) for X chi-squared: the regularised upper incomplete gamma function."""
    half = torch.tensor([degrees_of_freedom, max(statistic, 0.0)], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(half[0], half[1]))
