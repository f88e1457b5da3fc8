"""What model runner V1 does not tell its proposer and samplers about requests, read from the runner; and their drafts.

Upstream symbols: `GPUModelRunner.{input_batch, requests, positions, query_start_loc}`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vllm_bebop.engine.seeding import seed_source


class Q(NamedTuple):
    """What verification must know of the law of drafts: [..., num_speculative_tokens]."""

    logits: torch.Tensor  # [..., vocab_size], before temperature
    threshold: torch.Tensor  # the lowest logit that top-k and top-p left
    logsumexp: torch.Tensor  # of what they left, divided by the temperature
    argmax_ids: torch.Tensor

    def of(self, row: int) -> Q:
        return Q(*(each[row] for each in self))

    def on_its_own(self) -> Q:
        """The same; if its logits are a part of a larger tensor, a copy that does not keep all of that."""
        is_part = self.logits.untyped_storage().nbytes() > self.logits.nbytes
        return Q(*(each.clone() for each in self)) if is_part else self


@dataclass(frozen=True)
class Draft:
    """One request's last proposal."""

    first_position: torch.Tensor  # [] int64, absolute, of the first draft token
    token_ids: torch.Tensor  # [num_speculative_tokens] int64
    q: Q | None  # None for one-hot drafts


class V1Requests:
    """Per-request facts for one engine: noise seed, absolute positions, the last draft."""

    def __init__(self, runner: Any):
        self._runner = runner
        self._seed_source = seed_source(runner)
        self._drafts: dict[str, Draft] = {}

    def ids(self, batch_size: int) -> list[str]:
        """Request ids by batch row; none in vLLM's dummy runs at start-up, whose results nobody reads."""
        ids = list(self._runner.input_batch.req_ids)
        if ids and len(ids) != batch_size:
            raise RuntimeError(f"bebop: {batch_size} rows to sample for {len(ids)} requests")
        return ids

    def seeds(self, batch_size: int) -> torch.Tensor:
        """[batch_size] int64: the request's own seed, or one drawn for it when it was first seen.

        Generators are taken out of the batch: our noise needs none, and on a CPU vLLM fails when it rewinds one after
        a chunk of a prompt ("CPU Generator does not use offset").
        """
        seeds = [0] * batch_size
        for row, request_id in enumerate(self.ids(batch_size)):
            state = self._runner.requests[request_id]
            generator = self._runner.input_batch.generators.pop(row, None)
            if not hasattr(state, "bebop_seed"):
                seed = int(self._seed_source.integers(2**63)) if generator is None else generator.initial_seed()
                state.bebop_seed = seed - 2**64 if seed >= 2**63 else seed  # a negative one comes back as unsigned
            seeds[row] = state.bebop_seed
        return torch.tensor(seeds, dtype=torch.int64, device=self._runner.device)

    def positions(self, row_indices: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """[batch_size] int64: absolute position of the token to be decided, one past each row's input token.

        row_indices: [batch_size] rows of the flattened input; None for the last row of every request.
        """
        if row_indices is None:
            row_indices = self._runner.query_start_loc.gpu[1 : batch_size + 1].long() - 1
        return self._runner.positions[row_indices].long() + 1

    def remember(
        self,
        request_ids: list[str],
        first_positions: torch.Tensor,
        token_ids: torch.Tensor,
        q: Q | None,
    ) -> None:
        """Keep the proposals just made, [batch, num_speculative_tokens, ...] as in `Draft`."""
        waiting = self._runner.requests.keys() - set(request_ids)
        self._drafts = {
            id_: replace(draft, q=draft.q and draft.q.on_its_own())
            for id_, draft in self._drafts.items()
            if id_ in waiting
        }
        token_ids = token_ids.long()
        for row, id_ in enumerate(request_ids):
            self._drafts[id_] = Draft(first_positions[row], token_ids[row], None if q is None else q.of(row))

    def take(self, batch_size: int) -> list[Draft | None]:
        """The drafts of this batch, each handed out once: what a step verified must not be matched to later drafts."""
        return [self._drafts.pop(id_, None) for id_ in self.ids(batch_size)] or [None] * batch_size

    def were_dropped(self, drafts: list[Draft | None], first_positions: torch.Tensor) -> torch.Tensor | None:
        """[batch] bool: whose drafts, as far as they are not scheduled, were dropped by the scheduler under a grammar.

        None where there is no grammar. What is to be done about it: see `kernels.gathering`.

        first_positions: [batch], of the tokens being decided; other drafts are of a prompt's chunk, or from before
            preemption.
        """
        rows = [
            row
            for row, draft in enumerate(drafts)
            if draft is not None and draft.q is not None and self._has_grammar(row)
        ]
        if not rows:
            return None
        index = torch.tensor(rows, device=first_positions.device)
        drawn_for = torch.stack([draft.first_position for draft in (drafts[row] for row in rows) if draft is not None])
        dropped = torch.zeros_like(first_positions, dtype=torch.bool)
        return dropped.index_copy(0, index, drawn_for == first_positions[index])

    def _has_grammar(self, row: int) -> bool:
        request = self._runner.requests[self._runner.input_batch.req_ids[row]]
        return request.sampling_params.structured_outputs is not None

    def mrope_deltas(self, batch_size: int) -> torch.Tensor:
        """[batch_size] int64: M-RoPE's position of a token of text, less its absolute one; an image takes fewer."""
        deltas = [self._runner.requests[id_].mrope_position_delta or 0 for id_ in self.ids(batch_size)]
        return torch.tensor(deltas or [0] * batch_size, device=self._runner.device)
