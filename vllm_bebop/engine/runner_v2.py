"""Model runner V2 (vLLM's default on GPUs): drafting, verification and sampling.

V2 keeps everything by request slot: seeds, temperatures, the cached draft logits. Three methods are replaced, in
subclasses made of whichever speculator and samplers vLLM built: drawing a draft token, verifying, and sampling without
drafts. `sample_draft` runs inside CUDA graphs: no host synchronisation, no branch on data, no lasting allocation.

The argument lists of these methods differ between versions of vLLM, so each replacement takes them by name, in a dict;
engine/versions.py says which names it needs.

Upstream symbols: `DraftModelSpeculator.{sample_draft, draft_logits}`, `Sampler.{sample, apply_sampling_params,
sampling_states}`, `RejectionSampler._verify`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from vllm_bebop.config import BebopConfig
from vllm_bebop.engine.versions import DRAFT_POSITION_ARGUMENTS
from vllm_bebop.kernels.philox import Stream
from vllm_bebop.kernels.reference import GREEDY_TEMPERATURE, sample_reference, verify_reference

# A token drawn straight from the target uses the noise of a bonus token: see runner_v1.
_TARGET_STREAMS = (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN)

Arguments = dict[str, Any]


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


def _subclass(instance: Any, **replacements: Callable[[Any, Arguments], Any]) -> None:
    """Give `instance` a class in which each named method takes its arguments by upstream's names, as one dict."""
    base = type(instance)
    methods = {name: _by_name(getattr(base, name), function) for name, function in replacements.items()}
    instance.__class__ = type(f"Bebop{base.__name__}", (base,), {"__module__": __name__, **methods})


def _by_name(upstream: Callable[..., Any], function: Callable[[Any, Arguments], Any]) -> Callable[..., Any]:
    names = list(inspect.signature(upstream).parameters)[1:]

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, dict(zip(names, args, strict=False)) | kwargs)

    return method


def _sample_draft(speculator: Any, given: Arguments) -> torch.Tensor:
    """Draw one draft token per request and cache its logits: [num_reqs] int64."""
    hidden_states, cache = given["hidden_states"], given["draft_logits"]
    slots = given["idx_mapping"].long()
    if hasattr(speculator, "compute_draft_logits"):
        logits = speculator.compute_draft_logits(hidden_states, given.get("spec_step_idx", 0))
    else:
        logits = speculator.model.compute_logits(hidden_states)
    logits = logits.to(cache.dtype)  # q is what verification reads back: the logits as they were stored
    cache[slots, given["draft_step"].long()] = logits
    ((name, offset),) = ((name, offset) for name, offset in DRAFT_POSITION_ARGUMENTS.items() if name in given)
    return sample_reference(
        logits, given["temperature"][slots], given["seeds"][slots], given[name].long() + offset
    ).token_ids


def _verify(rejection_sampler: Any, given: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Processed logits, output tokens [num_reqs, num_speculative_steps + 1] and their number [num_reqs]."""
    sampler = rejection_sampler.sampler
    processed = _processed_logits(sampler, given | {"input_ids": given["draft_sampled"]})
    # A grammar may have ruled out drafts that only verification must not see (newer versions).
    drafted: torch.Tensor = given["verify_draft_sampled" if "verify_draft_sampled" in given else "draft_sampled"]
    slots, cu_num_logits, draft_logits = given["idx_mapping"].long(), given["cu_num_logits"], given["draft_logits"]
    first_rows = cu_num_logits[:-1].long()
    num_draft_tokens = torch.diff(cu_num_logits).long() - 1
    # Row i of a request holds the input token at that row: its i-th draft stands in row i + 1.
    steps = torch.arange(rejection_sampler.num_speculative_steps, device=processed.device)
    rows = (first_rows[:, None] + 1 + steps).clamp_(max=drafted.shape[0] - 1)
    verification = verify_reference(
        processed,
        drafted[rows].long().masked_fill(steps >= num_draft_tokens[:, None], -1),
        None if draft_logits is None else draft_logits[slots],
        num_draft_tokens,
        sampler.sampling_states.temperature.gpu[slots],
        sampler.sampling_states.seeds.gpu[slots],
        given["pos"][first_rows].long() + 1,
        target_is_processed=True,
    )
    return processed, verification.token_ids, verification.num_accepted.to(torch.int32) + 1


def _sample(sampler: Any, given: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of logits, [num_rows] int64, and the processed logits."""
    processed = _processed_logits(sampler, given)
    slots = given["expanded_idx_mapping"].long()
    temperature = sampler.sampling_states.temperature.gpu[slots]
    sample = sample_reference(
        processed,
        torch.where(temperature < GREEDY_TEMPERATURE, 0.0, 1.0),  # the processed logits carry it already
        sampler.sampling_states.seeds.gpu[slots],
        given["pos"].long() + 1,
        streams=_TARGET_STREAMS,
    )
    return sample.token_ids, processed


def _processed_logits(sampler: Any, given: Arguments) -> torch.Tensor:
    """Logits with processors, temperature, top-k and top-p applied by upstream: what a token is drawn from."""
    wanted = inspect.signature(sampler.apply_sampling_params).parameters
    return sampler.apply_sampling_params(**{name: given[name] for name in wanted if name in given})
