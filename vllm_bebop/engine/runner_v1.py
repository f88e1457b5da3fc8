"""Model runner V1 (`VLLM_USE_V2_MODEL_RUNNER=0`; the default on a CPU, and for most families on a GPU until 0.28):
drafting, verification and sampling.

V1 hands its proposer and its samplers neither positions nor request ids, and forgets the draft distribution of a
request that sits out a step. `V1Requests` supplies what is missing; the three classes below are vLLM's own with one
method or two replaced. On a GPU they run the fused kernels, on what V1 prepares in Python.

Upstream symbols: `SpecDecodeBaseProposer.{propose, _sample_draft_tokens, take_last_draft_probs}`, `Sampler.sample`,
`RejectionSampler.forward`, `apply_top_k_top_p`.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_bebop.config import BebopConfig
from vllm_bebop.engine.v1_requests import Q, V1Requests
from vllm_bebop.kernels import backend
from vllm_bebop.kernels.backend import Backend
from vllm_bebop.kernels.filters import Filters
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import GREEDY_TEMPERATURE
from vllm_bebop.kernels.tally import new_totals

logger = logging.getLogger("vllm.bebop")

# A token drawn straight from the target uses the noise of a bonus token, so a seeded request is served the same text
# whether or not its neighbours in the batch happen to speculate.
_TARGET_STREAMS = (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)


def upgrade_drafting(runner: Any, config: BebopConfig) -> None:
    """Exchange the proposer; called once the runner exists, before weights are loaded."""
    if not hasattr(runner, "drafter"):  # not the last pipeline rank
        return
    if type(runner.drafter) is not EagleProposer:
        raise TypeError(f"bebop cannot draft with {type(runner.drafter).__name__}; see `bebop doctor --model ...`")
    if config.draft_cache != "full" or config.draft_cache_gib is not None:
        logger.warning("bebop: model runner V1 keeps all drafts' logits: no effect of 'draft_cache', 'draft_cache_gib'")
    runner.drafter.__class__ = BebopProposer
    runner.drafter.requests = V1Requests(runner)
    runner.drafter.backend = backend.pick(runner.device)
    runner.drafter.one_hot = config.acceptance == "target_only"
    runner.drafter.in_blocks = config.acceptance == "block"


def upgrade_sampling(runner: Any, config: BebopConfig) -> torch.Tensor | None:
    """Exchange both samplers: seeded noise has to be the same whichever a step uses. Returns totals to be tallied."""
    if not hasattr(runner, "drafter"):
        return None
    drafter = runner.drafter
    for sampler, ours in ((runner.sampler, BebopSampler), (runner.rejection_sampler, BebopRejectionSampler)):
        sampler.__class__ = ours
        sampler.requests, sampler.backend, sampler.in_blocks = drafter.requests, drafter.backend, drafter.in_blocks
    runner.rejection_sampler.num_steps = drafter.num_speculative_tokens
    runner.rejection_sampler.totals = new_totals(runner.drafter.num_speculative_tokens, runner.device)
    return runner.rejection_sampler.totals


class BebopProposer(EagleProposer):
    """vLLM's MTP proposer, drawing every draft token from q at the request's temperature, by its own seed."""

    requests: V1Requests
    backend: Backend
    one_hot: bool
    in_blocks: bool  # drafts are verified as a block, so their noise must be this round's own

    def propose(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        metadata = kwargs["common_attn_metadata"]
        batch_size = metadata.batch_size()
        last_rows = kwargs["token_indices_to_sample"]
        if last_rows is None:
            last_rows = metadata.query_start_loc[1:] - 1
        positions = kwargs["target_positions"]
        # Slot t is fed x_{t+1} and h_t, and drafts x_{t+2}.
        if positions.ndim == 2:  # M-RoPE: text positions agree on all axes
            first_positions = positions[0, last_rows.long()].long() + 2 - self.requests.mrope_deltas(batch_size)
        else:
            first_positions = positions[last_rows.long()].long() + 2
        self._next_positions = first_positions
        self._rounds = first_positions if self.in_blocks else None
        self._seeds = self.requests.seeds(batch_size)
        self._rows: list[Q] = []
        draft_token_ids = super().propose(*args, **kwargs)
        q = Q(*(torch.stack(rows, dim=1) for rows in zip(*self._rows, strict=True))) if self._rows else None
        self.requests.remember(self.requests.ids(batch_size), first_positions, draft_token_ids, q)
        self._rows = []
        return draft_token_ids

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, None]:
        if self.one_hot or sampling_metadata.all_greedy:
            return self._greedy_sample(hidden_states), None
        logits = self.model.compute_logits(hidden_states)
        sample = self.backend.sample(
            logits,
            sampling_metadata.temperature,
            self._seeds,
            self._next_positions,
            slots=torch.arange(len(logits), device=logits.device),
            rounds=self._rounds,
            # As the target is filtered (upstream's drafts are not): what it cannot say would only be rejected.
            filters=Filters(sampling_metadata.top_k, sampling_metadata.top_p),
        )
        self._rows.append(Q(logits, sample.threshold, sample.logsumexp, sample.argmax_ids))
        self._next_positions = self._next_positions + 1
        return sample.token_ids, None


class BebopSampler(Sampler):
    """vLLM's sampler with the last step, the draw itself, made by the request's own seed and position."""

    requests: V1Requests
    backend: Backend
    in_blocks: bool

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size = logits.shape[0]
        logits = _apply_policy(logits, sampling_metadata)
        temperature = _temperature(sampling_metadata, batch_size, logits.device)
        seeds, positions = self.requests.seeds(batch_size), self.requests.positions(None, batch_size)
        sample = self.backend.sample(
            logits,
            torch.where(temperature < GREEDY_TEMPERATURE, 0.0, 1.0),  # the logits carry it already
            seeds,
            positions,
            slots=torch.arange(batch_size, device=logits.device),
            streams=_TARGET_STREAMS,
        )
        drafts = self.requests.take(batch_size)
        dropped = self.requests.were_dropped(drafts, positions)
        for row in [] if dropped is None else dropped.nonzero().flatten().tolist():
            draft = drafts[row]
            assert draft is not None and draft.q is not None
            one = torch.tensor([row], device=logits.device)
            sample.token_ids[row] = self.backend.verify(
                logits[[row, row]],  # the second gives a token that is not used
                draft.token_ids[None, :1],
                draft.q.logits[None, :1],
                torch.ones_like(one),
                temperature[one],
                seeds[one],
                positions[one],
                slots=torch.zeros_like(one),
                draft_threshold=draft.q.threshold[None, :1],
                draft_logsumexp=draft.q.logsumexp[None, :1],
                target_is_processed=True,
                block=self.in_blocks,
            ).token_ids[0, 0]
        mode = logprobs_mode_override or self.logprobs_mode
        processed = None
        if sampling_metadata.max_num_logprobs is not None or sampling_metadata.logprob_token_ids:
            if mode == "processed_logits":
                processed = logits
            elif mode == "processed_logprobs":
                processed = self.compute_logprobs(logits)
        return sample.token_ids, processed


class Drafts(NamedTuple):
    """The drafts of a batch, for verification."""

    num_tokens: torch.Tensor  # [B], with those that the scheduler dropped
    num_scheduled: torch.Tensor  # [B], without: as many may be accepted with a token of the target's behind them
    token_ids: torch.Tensor  # [B, num_speculative_tokens] int64; -1: rejected
    q: Q | None  # [B, num_speculative_tokens]; None: every draft is one-hot
    one_hot: torch.Tensor  # [B] bool


class BebopRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler with bebop's verification."""

    requests: V1Requests
    backend: Backend
    in_blocks: bool
    num_steps: int
    totals: torch.Tensor

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """As upstream; `draft_probs` is not used, the proposer keeps q itself (see `V1Requests`)."""
        del draft_probs
        batch_size = len(metadata.num_draft_tokens)
        num_draft_tokens = torch.tensor(metadata.num_draft_tokens, device=logits.device)
        first_rows = metadata.cu_num_sampled_tokens.long() - num_draft_tokens - 1
        positions = self.requests.positions(metadata.logits_indices[first_rows], batch_size)
        processed = self._process(metadata, logits, sampling_metadata)
        drafts = self._drafts(metadata, num_draft_tokens, positions)
        q = {}
        if drafts.q is not None:
            _, threshold, logsumexp, argmax_ids = drafts.q
            q = {"draft_threshold": threshold, "draft_logsumexp": logsumexp, "draft_argmax": argmax_ids}
        verification = self.backend.verify(
            processed,
            drafts.token_ids,
            None if drafts.q is None else drafts.q.logits,
            drafts.num_tokens,
            _temperature(sampling_metadata, batch_size, logits.device),
            self.requests.seeds(batch_size),
            positions,
            slots=torch.arange(batch_size, device=logits.device),
            first_rows=first_rows,
            one_hot=drafts.one_hot,
            target_is_processed=True,
            num_scheduled=drafts.num_scheduled,
            block=self.in_blocks,
            totals=self.totals,
            **q,
        )
        token_ids = verification.token_ids[:, : metadata.max_spec_len + 1].to(torch.int32)
        is_past = torch.arange(token_ids.shape[1], device=logits.device) >= verification.num_tokens[:, None]
        token_ids.masked_fill_(is_past, -1)  # should a dropped draft be accepted: behind it no row counts
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            final = processed if self.is_processed_logprobs_mode else logits.float()
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                final[metadata.target_logits_indices.long()],
                final[metadata.bonus_logits_indices.long()],
                token_ids,
            )
        return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=logprobs)

    def _process(
        self, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> torch.Tensor:
        """What each row is sampled from: [num_rows, vocab_size] fp32, temperature and all masks applied."""
        target_rows = metadata.target_logits_indices.long()
        bonus_rows = metadata.bonus_logits_indices.long()
        processed = torch.empty_like(logits, dtype=torch.float32)
        # First the bonus rows, as upstream: what tracks a thinking budget moves on with them.
        processed[bonus_rows] = self.sampler.apply_logits_processors(
            logits[bonus_rows].float(), sampling_metadata, predict_bonus_token=True
        )
        processed[target_rows] = self.apply_logits_processors(logits[target_rows].float(), sampling_metadata, metadata)
        rows_per_request = torch.tensor(metadata.num_draft_tokens, device=logits.device) + 1
        return _apply_policy(processed, sampling_metadata, rows_per_request)

    def _drafts(
        self, metadata: SpecDecodeMetadata, num_scheduled: torch.Tensor, first_positions: torch.Tensor
    ) -> Drafts:
        drafts = self.requests.take(len(num_scheduled))

        def flags(values: list[bool]) -> torch.Tensor:
            return torch.tensor(values, device=num_scheduled.device)

        # Only what was drawn for these positions is a draft, since it is verified against the q of that draw. With
        # asynchronous scheduling, -1 is a draft that was dropped, and 0 was fed in its place.
        steps = torch.arange(self.num_steps, device=num_scheduled.device)
        nothing = torch.full_like(steps, -1)
        drawn = torch.stack([nothing if draft is None else draft.token_ids for draft in drafts])
        drawn_for = torch.stack([nothing[0] if draft is None else draft.first_position for draft in drafts])
        is_scheduled = (steps < num_scheduled[:, None]) & (drawn_for == first_positions)[:, None]
        scheduled = F.pad(metadata.draft_token_ids.long(), (0, self.num_steps), value=-1)
        first = metadata.cu_num_draft_tokens.long() - num_scheduled
        token_ids = drawn.where(is_scheduled & (scheduled[first[:, None] + steps] == drawn), -1)

        num_tokens = num_scheduled
        dropped = self.requests.were_dropped(drafts, first_positions)
        if dropped is not None:
            step = (token_ids >= 0).long().cumprod(1).sum(1)
            token_ids = drawn.where((steps == step[:, None]) & dropped[:, None], token_ids)
            num_tokens = num_scheduled + (dropped & (step == num_scheduled) & (step < self.num_steps))
            num_scheduled = step.where(dropped, num_scheduled)

        known = [draft.q for draft in drafts if draft is not None and draft.q is not None]
        q = None
        if known:
            unknown = Q(*(torch.zeros_like(each) for each in known[0]))
            rows = [unknown if draft is None or draft.q is None else draft.q for draft in drafts]
            q = Q(*(torch.stack(each) for each in zip(*rows, strict=True)))
        one_hot = flags([draft is not None and draft.q is None for draft in drafts])
        return Drafts(num_tokens, num_scheduled, token_ids, q, one_hot)


def _apply_policy(
    logits: torch.Tensor, sampling_metadata: SamplingMetadata, rows_per_request: torch.Tensor | None = None
) -> torch.Tensor:
    """Each request's temperature, top-k and top-p on its rows (None: one each): [num_rows, vocab_size] fp32, in place.

    vLLM loads no other processor that only concerns sampling (min_p, custom ones) where it speculates.
    """
    if sampling_metadata.all_greedy:
        return logits

    def of_rows(values: torch.Tensor | None) -> torch.Tensor | None:
        return values if values is None or rows_per_request is None else values.repeat_interleave(rows_per_request)

    temperature = of_rows(sampling_metadata.temperature)
    logits = Sampler.apply_temperature(logits, temperature, sampling_metadata.all_random)
    return apply_top_k_top_p(logits, of_rows(sampling_metadata.top_k), of_rows(sampling_metadata.top_p))


def _temperature(sampling_metadata: SamplingMetadata, batch_size: int, device: torch.device) -> torch.Tensor:
    """[batch_size] fp32; 0 for greedy requests (vLLM keeps none at all where every request is greedy)."""
    if sampling_metadata.temperature is None:
        return torch.zeros(batch_size, device=device)
    return sampling_metadata.temperature[:batch_size]
