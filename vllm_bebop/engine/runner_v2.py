"""Model runner V2 (vLLM's default on GPUs): drafting, verification and sampling.

V2 keeps everything by request slot: seeds, temperatures, the cached draft logits. Three methods are replaced, in
subclasses made of whichever speculator and samplers vLLM built: drawing a draft token, verifying, and sampling without
drafts. `sample_draft` runs inside CUDA graphs: no host synchronisation, no branch on data, no lasting allocation.

Upstream symbols: `DraftModelSpeculator.{sample_draft, draft_logits, compute_draft_logits}`, `Sampler.{sample,
apply_sampling_params, sampling_states}`, `RejectionSampler._verify`.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_bebop.config import BebopConfig
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import GREEDY_TEMPERATURE, sample_reference, verify_reference

# A token drawn straight from the target uses the noise of a bonus token: see runner_v1.
_TARGET_STREAMS = (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)


def upgrade_drafting(runner: Any, config: BebopConfig) -> None:
    """Exchange the speculator's draw; called once the runner exists, before weights are loaded."""
    speculator = runner.speculator
    if speculator is None or config.acceptance == "target_only":  # argmax drafts without a cache are upstream's own
        return
    _subclass(speculator, sample_draft=_sample_draft)
    # One spare row for the padding of captured batches, whose slot index is -1.
    cache = speculator.draft_logits
    speculator.draft_logits = cache.new_zeros(cache.shape[0] + 1, *cache.shape[1:])


def upgrade_sampling(runner: Any, config: BebopConfig) -> None:
    """Exchange both samplers; called after weights are loaded, when V2 has built them."""
    if runner.rejection_sampler is None:  # not the last pipeline rank
        return
    _subclass(runner.sampler, sample=_sample)
    _subclass(runner.rejection_sampler, _verify=_verify)


def _subclass(instance: Any, **methods: Any) -> None:
    base = type(instance)
    instance.__class__ = type(f"Bebop{base.__name__}", (base,), {"__module__": __name__, **methods})


def _sample_draft(
    self: Any,
    hidden_states: torch.Tensor,
    sample_src_positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    draft_step: torch.Tensor,
    draft_logits: torch.Tensor,
    spec_step_idx: int = 0,
) -> torch.Tensor:
    """Draw one draft token per request and cache its logits. `sample_src_positions` precedes the token drawn by one."""
    logits = self.compute_draft_logits(hidden_states, spec_step_idx)
    slots = idx_mapping.long()
    draft_logits[slots, draft_step.long()] = logits.to(draft_logits.dtype)
    # q is what verification will read back: the cached logits, rounded as they were stored.
    sample = sample_reference(
        logits.to(draft_logits.dtype), temperature[slots], seeds[slots], sample_src_positions.long() + 1
    )
    return sample.token_ids


def _verify(
    self: Any,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    draft_sampled: torch.Tensor,
    pos: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    idx_mapping_np: Any,
    expanded_idx_mapping: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    seq_lens_upper_bound_np: Any,
    verify_draft_sampled: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Processed logits, accepted and recovered or bonus tokens [B, num_speculative_tokens + 1], and their count [B]."""
    processed = self.sampler.apply_sampling_params(
        logits,
        expanded_idx_mapping,
        idx_mapping,
        idx_mapping_np,
        pos,
        draft_sampled,
        expanded_local_pos,
        seq_lens_upper_bound_np,
    )
    drafted = draft_sampled if verify_draft_sampled is None else verify_draft_sampled
    states = self.sampler.sampling_states
    slots = idx_mapping.long()
    first_rows = cu_num_logits[:-1].long()
    num_draft_tokens = torch.diff(cu_num_logits).long() - 1
    # Row i of a request holds the input token at that row: its i-th draft stands in row i + 1.
    steps = torch.arange(self.num_speculative_steps, device=logits.device)
    rows = (first_rows[:, None] + 1 + steps).clamp_(max=drafted.shape[0] - 1)
    draft_token_ids = drafted[rows].long().masked_fill(steps >= num_draft_tokens[:, None], -1)
    verification = verify_reference(
        processed,
        draft_token_ids,
        None if draft_logits is None else draft_logits[slots],
        num_draft_tokens,
        states.temperature.gpu[slots],
        states.seeds.gpu[slots],
        pos[first_rows].long() + 1,
        target_is_processed=True,
    )
    return processed, verification.token_ids, verification.num_accepted.to(torch.int32) + 1


def _sample(
    self: Any,
    logits: torch.Tensor,
    expanded_idx_mapping: torch.Tensor,
    idx_mapping: torch.Tensor,
    idx_mapping_np: Any,
    pos: torch.Tensor,
    input_ids: torch.Tensor,
    expanded_local_pos: torch.Tensor,
    seq_lens_upper_bound_np: Any,
    return_logprobs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As upstream, the draw excepted: sampled tokens [num_rows] and processed logits."""
    processed = self.apply_sampling_params(
        logits,
        expanded_idx_mapping,
        idx_mapping,
        idx_mapping_np,
        pos,
        input_ids,
        expanded_local_pos,
        seq_lens_upper_bound_np,
    )
    slots = expanded_idx_mapping.long()
    temperature = self.sampling_states.temperature.gpu[slots]
    sample = sample_reference(
        processed,
        torch.where(temperature < GREEDY_TEMPERATURE, 0.0, 1.0),  # the processed logits carry it already
        self.sampling_states.seeds.gpu[slots],
        pos.long() + 1,
        streams=_TARGET_STREAMS,
    )
    return sample.token_ids, processed
