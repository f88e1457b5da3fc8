"""vLLM's speculative-decoding counters, from a server's /metrics or from an offline engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_DRAFTS = "vllm:spec_decode_num_drafts"
_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
_ACCEPTED_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
_GENERATED = "vllm:generation_tokens"


@dataclass(frozen=True)
class Counters:
    """Totals since the engine started, over all its requests. Subtract two to get what happened in between.

    num_drafts: verification rounds, each of a single request; num_draft_tokens: tokens they verified.
    num_accepted_tokens: of these, accepted; accepted_per_position[i]: rounds that accepted at least i + 1 drafts.
    generation_tokens: tokens handed to users.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    generation_tokens: int = 0

    def __sub__(self, earlier: Counters) -> Counters:
        before = earlier.accepted_per_position or (0,) * len(self.accepted_per_position)
        return Counters(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            tuple(now - then for now, then in zip(self.accepted_per_position, before, strict=True)),
            self.generation_tokens - earlier.generation_tokens,
        )

    @property
    def acceptance_length(self) -> float:
        """Accepted drafts per round plus the token that the target always adds: 1 without speculation."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """[num_speculative_tokens] chance that a round accepts at least i + 1 drafts."""
        return [accepted / self.num_drafts for accepted in self.accepted_per_position] if self.num_drafts else []


def parse_metrics(text: str) -> Counters:
    """Read /metrics in Prometheus' text format; several engines behind one server are added up."""
    totals: dict[str, float] = {}
    per_position: dict[int, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name != f"{family.name}_total":
                continue
            if family.name == _ACCEPTED_PER_POSITION:
                position = int(sample.labels["position"])
                per_position[position] = per_position.get(position, 0) + sample.value
            else:
                totals[family.name] = totals.get(family.name, 0) + sample.value
    return _counters(totals, [per_position[position] for position in sorted(per_position)])


def from_llm(metrics: Iterable[Any]) -> Counters:
    """Read `LLM.get_metrics()` of an engine made with `disable_log_stats=False`."""
    totals: dict[str, float] = {}
    per_position: list[float] = []
    for metric in metrics:
        if metric.name == _ACCEPTED_PER_POSITION:
            per_position = metric.values
        elif metric.name in (_DRAFTS, _DRAFT_TOKENS, _ACCEPTED, _GENERATED):
            totals[metric.name] = totals.get(metric.name, 0) + metric.value
    return _counters(totals, per_position)


def _counters(totals: dict[str, float], per_position: Iterable[float]) -> Counters:
    return Counters(
        int(totals.get(_DRAFTS, 0)),
        int(totals.get(_DRAFT_TOKENS, 0)),
        int(totals.get(_ACCEPTED, 0)),
        tuple(int(value) for value in per_position),
        int(totals.get(_GENERATED, 0)),
    )
