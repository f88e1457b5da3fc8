"""Model runner V1 (`VLLM_USE_V2_MODEL_RUNNER=0`; the CPU build always): drafting, verification and sampling.

V1 hands its proposer and its samplers neither positions nor request ids, and forgets the draft distribution of a
request that sits out a step. `V1Requests` supplies what is missing, read from the runner; the three classes below are
vLLM's own with one method or two replaced. On a GPU they run the fused kernels, on what V1 prepares in Python.

Upstream symbols: `SpecDecodeBaseProposer.{propose, _sample_draft_tokens, take_last_draft_probs}`, `Sampler.sample`,
`RejectionSampler.forward`, `apply_top_k_top_p`, `GPUModelRunner.{input_batch, requests, positions, query_start_loc}`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_bebop.config import BebopConfig
from vllm_bebop.engine.seeding import seed_source
from vllm_bebop.kernels import backend
from vllm_bebop.kernels.backend import Backend
from vllm_bebop.kernels.filters import Filters
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import GREEDY_TEMPERATURE
from vllm_bebop.kernels.tally import new_totals, tally_reference

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
    runner.rejection_sampler.totals = new_totals(runner.drafter.num_speculative_tokens, runner.device)
    return runner.rejection_sampler.totals


@dataclass
class Draft:
    """One request's last proposal: what verification must know of q.

    first_position: absolute position of the first draft token.
    token_ids: [num_speculative_tokens] int64.
    logits: [num_speculative_tokens, vocab_size], pre-temperature; None for one-hot drafts.
    threshold, logsumexp: [num_speculative_tokens], the lowest logit that top-k and top-p left of each row, and the
        logsumexp of what they left, divided by the temperature.
    """

    first_position: int
    token_ids: torch.Tensor
    logits: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    logsumexp: torch.Tensor | None = None


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
                drawn = int(self._seed_source.integers(2**63))
                state.bebop_seed = drawn if generator is None else generator.initial_seed()
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
        q: Sequence[torch.Tensor],
    ) -> None:
        """Keep the proposals just made, [batch, num_speculative_tokens, ...] as in `Draft`; q is empty if one-hot."""
        alive = self._runner.requests
        self._drafts = {id_: draft for id_, draft in self._drafts.items() if id_ in alive}
        for row, (id_, first_position) in enumerate(zip(request_ids, first_positions.tolist(), strict=False)):
            self._drafts[id_] = Draft(first_position, token_ids[row].long(), *(each[row] for each in q))

    def take(self, batch_size: int) -> list[Draft | None]:
        """The drafts of this batch, each handed out once: what a step verified must not be matched to later drafts."""
        return [self._drafts.pop(id_, None) for id_ in self.ids(batch_size)] or [None] * batch_size

    def was_dropped(self, row: int, draft: Draft | None, step: int, first_position: int) -> bool:
        """Whether the scheduler dropped the draft of this step though it was drawn for it, under a grammar.

        It drops a draft that the grammar forbids, and all after it; and drafts for which it has no room. Were only the
        allowed ones verified, the law of structured outputs would be off by what q has outside the grammar. So the
        first that was dropped is verified too, whatever it is; of a forbidden one p has nothing.

        first_position: of the tokens being decided; other drafts are of a prompt's chunk, or from before preemption.
        """
        if draft is None or draft.logits is None or step >= len(draft.token_ids):
            return False
        params = self._runner.requests[self._runner.input_batch.req_ids[row]].sampling_params
        return params.structured_outputs is not None and draft.first_position == first_position


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
        positions = positions[0] if positions.ndim == 2 else positions  # M-RoPE: text positions agree on all axes
        # Slot t is fed x_{t+1} and h_t, and drafts x_{t+2}.
        first_positions = positions[last_rows.long()].long() + 2
        self._next_positions = first_positions
        self._rounds = first_positions if self.in_blocks else None
        self._seeds = self.requests.seeds(batch_size)
        self._rows: list[tuple[torch.Tensor, ...]] = []
        draft_token_ids = super().propose(*args, **kwargs)
        q = [torch.stack(rows, dim=1) for rows in zip(*self._rows, strict=True)]
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
        self._rows.append((logits, sample.threshold, sample.logsumexp))
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
        for row, (draft, first_position) in enumerate(zip(drafts, positions.tolist(), strict=True)):
            if not self.requests.was_dropped(row, draft, 0, first_position):
                continue
            assert draft is not None and draft.logits is not None
            assert draft.threshold is not None and draft.logsumexp is not None
            one = torch.tensor([row], device=logits.device)
            sample.token_ids[row] = self.backend.verify(
                logits[[row, row]],  # the second gives a token that is not used
                draft.token_ids[None, :1],
                draft.logits[None, :1],
                torch.ones_like(one),
                temperature[one],
                seeds[one],
                positions[one],
                slots=torch.zeros_like(one),
                draft_threshold=draft.threshold[None, :1],
                draft_logsumexp=draft.logsumexp[None, :1],
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
    rows: torch.Tensor  # [sum(num_tokens + 1)], the rows of the target's logits
    token_ids: torch.Tensor  # [B, max_drafts]; -1: rejected
    logits: torch.Tensor | None  # [B, max_drafts, vocab_size]; None: every draft is one-hot, and so below
    threshold: torch.Tensor | None  # [B, max_drafts]
    logsumexp: torch.Tensor | None  # [B, max_drafts]
    one_hot: torch.Tensor  # [B] bool


class BebopRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler with bebop's verification."""

    requests: V1Requests
    backend: Backend
    in_blocks: bool
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
        drafts = self._drafts(metadata, positions, logits)
        verification = self.backend.verify(
            processed[drafts.rows],
            drafts.token_ids,
            drafts.logits,
            drafts.num_tokens,
            _temperature(sampling_metadata, batch_size, logits.device),
            self.requests.seeds(batch_size),
            positions,
            slots=torch.arange(batch_size, device=logits.device),
            one_hot=drafts.one_hot,
            draft_threshold=drafts.threshold,
            draft_logsumexp=drafts.logsumexp,
            target_is_processed=True,
            block=self.in_blocks,
        )
        num_accepted = torch.minimum(verification.num_accepted, num_draft_tokens)
        tally_reference(replace(verification, num_accepted=num_accepted), self.totals)
        token_ids = verification.token_ids[:, : metadata.max_spec_len + 1].to(torch.int32)
        is_past = torch.arange(token_ids.shape[1], device=logits.device) > num_draft_tokens[:, None]
        token_ids.masked_fill_(is_past, -1)  # one token for each row of logits, should a dropped draft be accepted
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
        processed[target_rows] = self.apply_logits_processors(logits[target_rows].float(), sampling_metadata, metadata)
        processed[bonus_rows] = self.sampler.apply_logits_processors(
            logits[bonus_rows].float(), sampling_metadata, predict_bonus_token=True
        )
        rows_per_request = torch.tensor(metadata.num_draft_tokens, device=logits.device) + 1
        return _apply_policy(processed, sampling_metadata, rows_per_request)

    def _drafts(
        self, metadata: SpecDecodeMetadata, first_positions: torch.Tensor, target_logits: torch.Tensor
    ) -> Drafts:
        device, vocab_size = target_logits.device, target_logits.shape[-1]
        drafts = self.requests.take(len(metadata.num_draft_tokens))
        width = metadata.max_spec_len + 1  # one more, should it have been dropped
        token_ids = torch.full((len(drafts), width), -1, dtype=torch.int64, device=device)
        threshold = torch.full(token_ids.shape, float("-inf"), device=device)
        logsumexp = torch.zeros(token_ids.shape, device=device)
        logits = None
        num_tokens, rows = list(metadata.num_draft_tokens), list[int]()
        start = 0  # of the request's drafts; its rows of logits start `row` further, as each has one more
        positions = first_positions.tolist()
        for row, (draft, count) in enumerate(zip(drafts, metadata.num_draft_tokens, strict=True)):
            first_row = start + row
            rows += range(first_row, first_row + count + 1)
            if draft is not None:
                scheduled = metadata.draft_token_ids[start : start + count]
                token_ids[row, :count] = scheduled
                step = int((scheduled >= 0).long().cumprod(0).sum())  # with asynchronous scheduling, -1 is dropped
                if self.requests.was_dropped(row, draft, step, positions[row]):
                    token_ids[row, step] = draft.token_ids[step]
                    if step == count:
                        num_tokens[row] += 1
                        rows.append(first_row + count)  # gives a token that is not used
                if draft.logits is not None:
                    assert draft.threshold is not None and draft.logsumexp is not None
                    if logits is None:
                        logits = draft.logits.new_zeros(len(drafts), width, vocab_size)
                    known = min(width, len(draft.logits))
                    logits[row, :known] = draft.logits[:known]
                    threshold[row, :known] = draft.threshold[:known]
                    logsumexp[row, :known] = draft.logsumexp[:known]
            start += count
        return Drafts(
            num_tokens=torch.tensor(num_tokens, device=device),
            rows=torch.tensor(rows, device=device),
            token_ids=token_ids,
            logits=logits,
            threshold=None if logits is None else threshold,
            logsumexp=None if logits is None else logsumexp,
            one_hot=torch.tensor([draft is not None and draft.logits is None for draft in drafts], device=device),
        )


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
