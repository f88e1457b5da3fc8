"""From an engine's steps to acceptance: which rounds count, what they accepted, and how sure that is.

Round: one verification of one request's drafts; it hands out the accepted drafts and one more token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_bebop.bench.counters import Counters

BOOTSTRAP_RESAMPLES = 2000


class Round(NamedTuple):
    """num_generated: tokens generated before it; num_accepted: of its drafts, 0 .. num_speculative_tokens."""

    num_generated: int
    num_accepted: int


@dataclass(frozen=True)
class Generation:
    """A served request. steps: the tokens handed out by each target step, the first by the prompt's own."""

    prompt_token_ids: list[int]
    steps: list[list[int]]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and continuation."""
        return self.prompt_token_ids + [token for step in self.steps for token in step]

    @property
    def num_generated(self) -> int:
        return sum(map(len, self.steps))

    def rounds(self, num_speculative_tokens: int) -> list[Round]:
        """The rounds that the length limit cannot have cut: num_speculative_tokens + 1 tokens or more were to come.

        Whether a round counts is thus settled before it runs. Leaving out the rounds that were in fact cut would prefer
        the short ones.
        """
        found, num_generated = [], len(self.steps[0])
        for step in self.steps[1:]:
            if num_generated + num_speculative_tokens + 1 <= self.num_generated:
                found.append(Round(num_generated, len(step) - 1))
            num_generated += len(step)
        return found

    def anchor(self, round_: Round) -> int:
        """The slot whose hidden state the round drafts from: the one before the last token known."""
        return len(self.prompt_token_ids) + round_.num_generated - 2


class CounterMismatch(RuntimeError):
    """The engine's own counters contradict what its steps handed out."""


def check_against_counters(generations: Iterable[Generation], counters: Counters, num_speculative_tokens: int) -> None:
    """Compare the steps with vLLM's counters over the same requests.

    Every step but a request's first is a round. Rounds that accepted at least i drafts are as many as counted, except
    that a request's last round may have been cut by the length limit after the engine had counted it.
    Raises:
        CounterMismatch: they disagree.
    """
    rounds = [step for generation in generations for step in generation.steps[1:]]
    last = [generation.steps[-1] for generation in generations if len(generation.steps) > 1]
    problems = []
    if len(rounds) != counters.num_drafts:
        problems.append(f"{len(rounds)} rounds in the outputs, {counters.num_drafts} drafts counted")
    if counters.num_draft_tokens != counters.num_drafts * num_speculative_tokens:
        problems.append(
            f"{counters.num_draft_tokens} tokens counted in {counters.num_drafts} drafts of {num_speculative_tokens}"
        )
    counted_at = [*counters.accepted_per_position] or [0] * num_speculative_tokens
    for position, counted in enumerate(counted_at, start=1):
        seen = sum(len(step) > position for step in rounds)
        cut = sum(len(step) <= position for step in last)
        if not seen <= counted <= seen + cut:
            problems.append(f"position {position}: {seen} to {seen + cut} accepted in the outputs, {counted} counted")
    if problems:
        raise CounterMismatch(
            "; ".join(problems) + ". Preempted requests do this (give the KV cache more memory); else report it"
        )


def accepted_at_least(rounds: Sequence[Round], num_speculative_tokens: int) -> NDArray[np.float64]:
    """[num_speculative_tokens, rounds]: 1 where a round accepted at least i + 1 drafts."""
    accepted = np.array([round_.num_accepted for round_ in rounds])
    return (accepted > np.arange(num_speculative_tokens)[:, None]).astype(float)


def ratio_with_interval(sums: ArrayLike, counts: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """sum(sums) / sum(counts) with its bootstrap 95 % interval over requests, whose rounds are not independent.

    Args:
        sums: [requests] or [requests, k].
        counts: [requests], rounds of each.
    Returns:
        {"mean", "interval_95": [low, high]}: floats, or lists of k; the interval is None for fewer than two requests.
    Raises:
        ValueError: no rounds at all.
    """
    sums, counts = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    if not counts.sum():
        raise ValueError("no rounds to average: generate more tokens per request")
    columns = sums.reshape(len(counts), -1)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), BOOTSTRAP_RESAMPLES).astype(float)
    weights = weights[weights @ counts > 0]
    resampled = (weights @ columns) / (weights @ counts)[:, None]
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    mean = columns.sum(0) / counts.sum()
    interval = np.stack([low, high], axis=-1)
    if sums.ndim == 1:
        mean, interval = mean[0], interval[0]
    return {"mean": _rounded(mean), "interval_95": _rounded(interval) if len(counts) > 1 else None}


def _rounded(values: ArrayLike) -> Any:
    return np.round(np.asarray(values), 5).tolist()
