"""Model runner V2 (the default on GPUs of newer versions of vLLM): drafting, verification and sampling.

V2 keeps everything by request slot: seeds, temperatures, the cached draft logits. Three methods are replaced, in
subclasses made of whichever speculator and samplers vLLM built: drawing a draft token, verifying, and sampling without
drafts, which is verification of none. They run the fused kernels (`kernels.backend`). `sample_draft` runs inside CUDA
graphs: no host synchronisation, no branch on data, no lasting allocation. Its kernel stores the logits in the cache as
it reads them: vLLM's lm_head cannot write them there, having no `out=`, a padded vocabulary, and rows in batch order.

Verification reads the target's logits as they are wherever the requests of a batch ask for nothing but a temperature,
top-k and top-p (a grammar's mask is already in them). Penalties and all else are vLLM's own to apply, as are top-k and
top-p for a request that wants logprobs, which upstream computes from what it masked itself: then the whole batch is
verified on its processed logits. vLLM decides which it is on the host, by a flag per slot that `_add_request` sets.

Drafts are filtered like the target (upstream's are not): what the target cannot say would only be rejected.

Around the kernels there are next to no operations on small tensors, each of which is a launch: `gather_drafts` prepares
a verification in one, and drafting needs none (two a step where drafts are verified as a block).

The argument lists of these methods differ between versions of vLLM, so each replacement takes them by name, in a dict;
engine/versions.py says which names it needs.

Upstream symbols: `DraftModelSpeculator.{sample_draft, draft_logits}`, `Sampler.{sample, apply_sampling_params,
sampling_states, logprobs_mode}`, `SamplingStates.{add_request, apply_staged_writes, apply_temperature,
max_num_logprobs, temperature, seeds, top_k, top_p, min_p}`, `RejectionSampler._verify`, `RequestState.free_indices`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from vllm_bebop.config import BebopConfig, BebopConfigError
from vllm_bebop.engine import draft_cache
from vllm_bebop.engine.draft_cache import DraftCache
from vllm_bebop.engine.seeding import seed_source
from vllm_bebop.engine.versions import DRAFT_POSITION_ARGUMENTS, dummy_batches_spare_drafts, slots_are_int32
from vllm_bebop.kernels import backend
from vllm_bebop.kernels.backend import Backend
from vllm_bebop.kernels.candidates import Candidates
from vllm_bebop.kernels.filters import NO_FILTERS, Filters
from vllm_bebop.kernels.reference import Verification
from vllm_bebop.kernels.tally import new_totals

_PROCESSED_MODES = ("processed_logprobs", "processed_logits")

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Policies:
    """What requests ask for, by slot, in the device's memory.

    vLLM keeps it in the host's, where each program of a kernel would wait for it, and at changing addresses, which a
    captured graph cannot follow.
    """

    temperature: torch.Tensor  # fp32
    seeds: torch.Tensor  # int64
    top_k: torch.Tensor  # int32
    top_p: torch.Tensor  # fp32

    @staticmethod
    def allocate(num_slots: int, device: torch.device) -> Policies:
        dtypes = torch.float32, torch.int64, torch.int32, torch.float32
        return Policies(*(torch.zeros(num_slots, dtype=dtype, device=device) for dtype in dtypes))

    @property
    def filters(self) -> Filters:
        return Filters(self.top_k, self.top_p)

    def follow(self, states: Any) -> None:
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(states, field.name).gpu)


@dataclass(frozen=True)
class Tools:
    """What a replaced method needs of ours; the attribute `bebop` of the object it belongs to."""

    backend: Backend
    workspace: Any
    policies: Policies
    cache: DraftCache | None = None  # None for one-hot drafts
    candidates: Candidates | None = None  # scratch of drafting, where the cache holds no more
    in_blocks: bool = False  # drafts are verified as a block
    num_steps: int = 0  # of verification
    totals: torch.Tensor | None = None  # of verification


def upgrade_drafting(runner: Any, config: BebopConfig) -> None:
    """Exchange the speculator's draw; called once the runner exists, before weights are loaded."""
    speculator = runner.speculator
    if speculator is not None:
        runner.drafter = speculator  # V1's name, by which RL stacks find the head that they push weights to
    if speculator is None or config.acceptance == "target_only":  # argmax drafts without a cache are upstream's own
        return
    if runner.parallel_config.data_parallel_size > 1 and not dummy_batches_spare_drafts(speculator):
        raise BebopConfigError(
            "on this vLLM, model runner V2 writes over the drafts of waiting requests while a data-parallel replica "
            "idles: use vLLM 0.32 or later, or model runner V1 (VLLM_USE_V2_MODEL_RUNNER=0)"
        )
    _subclass(speculator, sample_draft=_sample_draft)
    (num_requests, num_steps, vocab_size), dtype = speculator.draft_logits.shape, speculator.draft_logits.dtype
    device = speculator.draft_logits.device
    speculator.draft_logits = None  # upstream's own goes before ours comes
    if device.type == "cuda":
        torch.cuda.empty_cache()  # or a smaller one would keep all its memory reserved
    candidates = None
    if config.draft_cache == "candidates":
        candidates = Candidates.allocate(num_requests, vocab_size, dtype, device)
    cache = draft_cache.allocate(
        num_requests, num_steps, vocab_size, dtype, device, config.draft_cache_gib,
        candidates_only=candidates is not None,
    )  # fmt: skip
    if cache.logits.shape[0] < num_requests:
        runner.req_states.free_indices = draft_cache.LowestFirst(runner.req_states.free_indices)
    speculator.draft_logits = cache.logits
    chosen = backend.pick(device)
    policies = Policies.allocate(num_requests, device)
    workspace = chosen.sampling_workspace(num_requests, cache.logits.shape[2], device)
    speculator.bebop = Tools(chosen, workspace, policies, cache, candidates, in_blocks=config.acceptance == "block")


def upgrade_sampling(runner: Any, config: BebopConfig) -> torch.Tensor | None:
    """Exchange both samplers; called after weights are loaded, when V2 has built them. Returns totals to be tallied."""
    sampler, rejection_sampler = runner.sampler, runner.rejection_sampler
    if rejection_sampler is None:  # not the last pipeline rank
        return None
    if getattr(rejection_sampler, "watermark_key", None) is not None:
        raise BebopConfigError("bebop's sampler puts no watermark into the text: serve without 'watermark_config'")
    states, device = sampler.sampling_states, runner.device
    _subclass(sampler, sample=_sample)
    _subclass(states, add_request=_add_request, apply_staged_writes=_apply_staged_writes)
    _subclass(rejection_sampler, _verify=_verify)
    size = states.max_num_reqs, states.vocab_size
    drafting: Tools | None = getattr(runner.speculator, "bebop", None)
    if drafting is None:
        cache, policies = None, Policies.allocate(size[0], device)
    else:
        cache, policies = drafting.cache, drafting.policies
    chosen = backend.pick(device)
    num_steps = rejection_sampler.num_speculative_steps
    workspace = chosen.verification_workspace(size[0], num_steps, size[1], device, with_draft_statistics=False)
    in_blocks = config.acceptance == "block"
    totals = new_totals(num_steps, device)
    tools = Tools(chosen, workspace, policies, cache, None, in_blocks, num_steps, totals)
    states.bebop = sampler.bebop = rejection_sampler.bebop = tools
    states.bebop_seeds, states.bebop_is_new = seed_source(runner), False
    states.bebop_returns_mask = getattr(sampler, "return_sampling_mask", False)  # of top-k and top-p, since 0.29
    _compile_ahead(runner)
    totals.zero_()  # without a draft cache, made-up drafts count
    return totals


def _compile_ahead(runner: Any) -> None:
    """Have Triton compile for raw logits: vLLM's warm-up requests ask for everything, hence for processed ones only."""
    sampler, device = runner.sampler, runner.device
    num_rows = runner.rejection_sampler.num_speculative_steps + 1
    rows = torch.zeros(num_rows, dtype=torch.int64, device=device)
    slots = rows.int() if slots_are_int32() else rows
    padded, dtype = -(-runner.vocab_size // 64) * 64, runner.model_config.head_dtype  # as vLLM's lm_head gives them
    given: Arguments = {
        "logits": torch.zeros(num_rows, padded, dtype=dtype, device=device)[:, : runner.vocab_size],
        "idx_mapping": slots[:1],
        "idx_mapping_np": np.zeros(1, dtype=np.int64),
        "expanded_idx_mapping": slots,
        "expanded_local_pos": rows,
        "pos": rows,
        "input_ids": rows.int(),
        "draft_sampled": rows.int(),
        "verify_draft_sampled": rows.int(),
        "seq_lens_upper_bound_np": np.zeros(1, dtype=np.int64),
    }
    cu_num_logits = torch.tensor([0, num_rows], dtype=torch.int32, device=device)
    upstream: Any = type(runner.rejection_sampler).__mro__[1]
    wanted = _parameters(upstream._verify)
    states = sampler.sampling_states
    for top_k in (1, states.vocab_size):  # with filters and, as slots begin, without
        states.top_k.np[0] = top_k
        _sample(sampler, {name: value[:1] for name, value in given.items()})
        to_verify = given | {"cu_num_logits": cu_num_logits}
        _verify(runner.rejection_sampler, {name: value for name, value in to_verify.items() if name in wanted})


def _subclass(instance: Any, **replacements: Callable[[Any, Arguments], Any]) -> None:
    """Give `instance` a class in which each named method takes its arguments by upstream's names, as one dict."""
    base = type(instance)
    methods = {name: _by_name(getattr(base, name), function) for name, function in replacements.items()}
    instance.__class__ = type(f"Bebop{base.__name__}", (base,), {"__module__": __name__, **methods})


def _by_name(upstream: Callable[..., Any], function: Callable[[Any, Arguments], Any]) -> Callable[..., Any]:
    names = _parameters(upstream)[1:]

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, dict(zip(names, args, strict=False)) | kwargs)

    return method


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _sample_draft(speculator: Any, given: Arguments) -> torch.Tensor:
    """Draw one draft token per request and cache its logits: [num_reqs] int64, valid until the next call."""
    ours: Tools = speculator.bebop
    assert ours.cache is not None
    hidden_states = given["hidden_states"]
    if hasattr(speculator, "compute_draft_logits"):
        logits = speculator.compute_draft_logits(hidden_states, given.get("spec_step_idx", 0))
    else:
        logits = speculator.model.compute_logits(hidden_states)
    ((name, offset),) = ((name, offset) for name, offset in DRAFT_POSITION_ARGUMENTS.items() if name in given)
    positions, slots, step = given[name], given["idx_mapping"], given["draft_step"]
    logits = logits.to(ours.cache.logits.dtype)  # q is what verification reads back: the logits as they are stored
    ids = None
    if ours.candidates is not None:
        found = ours.backend.find_candidates(
            logits, slots=slots, cache_ids=ours.cache.ids, step=step, out=ours.candidates
        )
        logits, ids = found.logits, found.ids
    return ours.backend.sample(
        logits,
        given["temperature"],
        given["seeds"],
        positions,
        slots=slots,
        position_offset=offset,
        rounds=positions + offset - step if ours.in_blocks else None,
        filters=ours.policies.filters,
        ids=ids,
        cache=ours.cache.logits,
        cache_logsumexp=ours.cache.logsumexp,
        cache_argmax=ours.cache.argmax,
        cache_threshold=ours.cache.threshold,
        cache_token_ids=ours.cache.drawn.token_ids,
        cache_positions=ours.cache.drawn.positions,
        step=step,
        workspace=ours.workspace,
    ).token_ids


def _verify(rejection_sampler: Any, given: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Processed logits, output tokens [num_reqs, num_speculative_steps + 1] and their number [num_reqs]."""
    ours: Tools = rejection_sampler.bebop
    sampler = rejection_sampler.sampler
    logits = _logits_to_sample(sampler, given | {"input_ids": given["draft_sampled"]})
    # Row i of a request holds the input token at that row: its i-th draft stands in row i + 1. With asynchronous
    # scheduling, -1 in `verify_draft_sampled` from the first draft that the scheduler has not seen to be allowed by a
    # grammar: the rows behind it carry no mask.
    verification = _verified(
        ours, sampler, given, logits, given["idx_mapping"], given["cu_num_logits"], given.get("verify_draft_sampled"),
        ours.totals,
    )  # fmt: skip
    wants_logprobs = sampler.sampling_states.max_num_logprobs(given["idx_mapping_np"]) >= 0
    processed = _processed_logits(sampler, given, logits) if wants_logprobs else logits
    return processed, verification.token_ids, verification.num_tokens


def _sample(sampler: Any, given: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of logits, [num_rows] int64, and the processed logits."""
    ours: Tools = sampler.bebop
    logits = _logits_to_sample(sampler, given)
    # Verification of no drafts, unless the scheduler dropped the first of some request under a grammar.
    row_offsets = torch.arange(logits.shape[0] + 1, device=logits.device)
    verification = _verified(
        ours, sampler, given | {"draft_sampled": given["input_ids"]}, logits, given["expanded_idx_mapping"], row_offsets
    )
    processed = _processed_logits(sampler, given, logits) if given.get("return_logprobs") else logits
    return verification.token_ids[:, 0].contiguous(), processed  # vLLM's kernels read it as such


def _verified(
    ours: Tools,
    sampler: Any,
    given: Arguments,
    logits: torch.Tensor,
    slots: torch.Tensor,
    row_offsets: torch.Tensor,
    cut_input_ids: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
) -> Verification:
    """The verification of what each request's slot drafted; it counts no more tokens than there are rows of logits."""
    states = sampler.sampling_states
    kept = {}
    if ours.cache is not None:
        kept = {
            "draft_logsumexp": ours.cache.logsumexp,
            "draft_argmax": ours.cache.argmax,
            "draft_threshold": ours.cache.threshold,
            "draft_ids": ours.cache.ids,
        }
    drafts = ours.backend.gather_drafts(
        given["draft_sampled"],
        given["pos"],
        row_offsets,
        slots,
        ours.num_steps,
        cut_input_ids=cut_input_ids,
        drawn=None if ours.cache is None else ours.cache.drawn,
    )
    is_raw = logits is given["logits"]
    return ours.backend.verify(
        logits,
        drafts.token_ids,
        None if ours.cache is None else ours.cache.logits,
        drafts.num_drafts,
        ours.policies.temperature,
        ours.policies.seeds,
        drafts.positions,
        slots=slots,
        first_rows=row_offsets[:-1],
        target_is_processed=not is_raw,
        filters=ours.policies.filters if is_raw and _any_is_filtered(states, given["idx_mapping_np"]) else NO_FILTERS,
        num_scheduled=drafts.num_scheduled,
        block=ours.in_blocks,
        totals=totals,
        workspace=ours.workspace,
        **kept,
    )


def _any_is_filtered(states: Any, slots: np.ndarray) -> bool:
    return bool(np.any((states.top_k.np[slots] != states.vocab_size) | (states.top_p.np[slots] != 1.0)))


def _add_request(states: Any, given: Arguments) -> bool:
    """Whether the request's sampling parameters need vLLM's own processing."""
    upstream: Any = type(states).__mro__[1]
    upstream.add_request(states, **given)
    slot = given["req_idx"]
    if given["sampling_params"].seed is None:
        states.seeds.np[slot] = states.bebop_seeds.integers(2**63)
    states.bebop_is_new = True
    if states.bebop.cache is not None:
        states.bebop.cache.start(slot, given["sampling_params"].structured_outputs is not None)
    alone = np.array([slot])
    wants_logprobs = states.max_num_logprobs(alone) >= 0 or bool(given["sampling_params"].logprob_token_ids)
    wants_processed = wants_logprobs or states.bebop_returns_mask
    is_left = states.min_p.np[slot] != 0.0 or (wants_processed and _any_is_filtered(states, alone))
    return bool(states.temperature.np[slot] != 0.0 and is_left)


def _apply_staged_writes(states: Any, given: Arguments) -> None:
    """Once a step, before anything is sampled in it."""
    upstream: Any = type(states).__mro__[1]
    upstream.apply_staged_writes(states, **given)
    if states.bebop_is_new:
        states.bebop.policies.follow(states)
        states.bebop_is_new = False


def _logits_to_sample(sampler: Any, given: Arguments) -> torch.Tensor:
    """The given logits themselves where nothing but a temperature applies, else upstream's processed logits in fp32."""
    wanted = _parameters(type(sampler).apply_sampling_params)
    return sampler.apply_sampling_params(**{name: given[name] for name in wanted if name in given})


def _processed_logits(sampler: Any, given: Arguments, logits: torch.Tensor) -> torch.Tensor:
    """What upstream computes log-probabilities from: `logits` with the temperature applied, if it still has to be."""
    states = sampler.sampling_states
    temperature = states.temperature.np[given["idx_mapping_np"]]
    is_applied = logits is not given["logits"] or not np.any((temperature != 0.0) & (temperature != 1.0))
    if is_applied or sampler.logprobs_mode not in _PROCESSED_MODES:
        return logits
    processed = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
    states.apply_temperature(processed, given["expanded_idx_mapping"], given["idx_mapping_np"])
    return processed
