"""Which vLLM bebop runs on, and what it needs of it: one table, checked when a config asks for bebop.

A version enters `TESTED_VERSIONS` only once the engine tests have passed on it (`make test-versions`). Versions being
equal is not enough: the upstream functions that are replaced or called are looked up and their parameters compared, so
that a patched or vendored vLLM fails at the start, by name, and not in the middle of a rollout.
"""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass
from typing import Any

from vllm_bebop.config import BebopConfigError

TESTED_VERSIONS = ("0.24", "0.25", "0.26", "0.27", "0.29", "0.31", "0.32", "0.33")
# Admits one version more, so that the engine tests can run on it before it is listed. Not for production.
_CANDIDATE = "VLLM_BEBOP_CANDIDATE"


@dataclass(frozen=True)
class Seam:
    """An upstream symbol and the parameters by whose names bebop calls it, or expects to be called ("a|b": either)."""

    symbol: str  # "module:attribute.path"
    parameters: tuple[str, ...] = ()
    used_by: str = ""


_INTAKE = (
    Seam(
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        ("target_model_config", "target_parallel_config"),
        "engine/intake.py",
    ),
    Seam("vllm.engine.arg_utils:EngineArgs.create_load_config", (), "engine/intake.py"),
    Seam("vllm.model_executor.model_loader:register_model_loader", ("load_format",), "engine/draft_loader.py"),
    Seam(
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights",
        ("model_config", "model"),
        "engine/draft_loader.py",
    ),
    Seam(
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.load_weights",
        ("model", "model_config"),
        "engine/draft_loader.py",
    ),
    Seam("vllm.distributed.parallel_state:get_tp_group", (), "engine/draft_shards.py"),
    Seam("vllm.model_executor.layers.linear:ColumnParallelLinear", (), "engine/draft_shards.py"),
    Seam("vllm.model_executor.layers.linear:RowParallelLinear", (), "engine/draft_shards.py"),
    Seam("vllm.model_executor.layers.linear:QKVParallelLinear", (), "engine/draft_shards.py"),
    Seam("vllm.distributed.parallel_state:get_pp_group", (), "engine/draft_loader.py"),
    Seam("vllm.distributed.parallel_state:get_dp_group", (), "engine/draft_loader.py"),
    Seam("vllm.distributed.parallel_state:get_pcp_group", (), "engine/draft_loader.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.init_device", (), "engine/worker.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.load_model", (), "engine/worker.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", (), "engine/worker.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.sleep", ("level",), "engine/worker.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.wake_up", ("tags",), "engine/worker.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.get_model", (), "engine/sleeping_head.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.start_weight_update", (), "engine/worker.py"),
    Seam("vllm.v1.worker.gpu_worker:Worker.finish_weight_update", (), "engine/worker.py"),
)
_RUNNER_V1 = (
    Seam(
        "vllm.v1.spec_decode.eagle:EagleProposer.propose",
        ("target_positions", "token_indices_to_sample", "common_attn_metadata", "sampling_metadata"),
        "engine/runner_v1.py",
    ),
    Seam(
        "vllm.v1.spec_decode.eagle:EagleProposer._sample_draft_tokens",
        ("hidden_states", "sampling_metadata"),
        "engine/runner_v1.py",
    ),
    Seam("vllm.v1.spec_decode.eagle:EagleProposer._greedy_sample", ("hidden_states",), "engine/runner_v1.py"),
    Seam("vllm.v1.sample.sampler:Sampler.sample", ("logits", "sampling_metadata"), "engine/runner_v1.py"),
    Seam(
        "vllm.v1.sample.sampler:Sampler.apply_logits_processors",
        ("logits", "sampling_metadata", "predict_bonus_token"),
        "engine/runner_v1.py",
    ),
    Seam("vllm.v1.sample.sampler:Sampler.compute_logprobs", ("logits",), "engine/runner_v1.py"),
    Seam("vllm.v1.sample.sampler:Sampler.apply_temperature", ("logits", "temp", "all_random"), "engine/runner_v1.py"),
    Seam("vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p", ("logits", "k", "p"), "engine/runner_v1.py"),
    Seam(
        "vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
        ("metadata", "draft_probs", "logits", "sampling_metadata"),
        "engine/runner_v1.py",
    ),
    Seam(
        "vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors",
        ("logits", "sampling_metadata", "metadata"),
        "engine/runner_v1.py",
    ),
    Seam(
        "vllm.v1.sample.rejection_sampler:RejectionSampler._get_logprobs_tensors",
        ("max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits", "sampled_token_ids"),
        "engine/runner_v1.py",
    ),
)
_RUNNER_V2 = (
    Seam(
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.sample_draft",
        ("hidden_states", "positions|sample_src_positions", "idx_mapping", "temperature", "seeds", "draft_step"),
        "engine/runner_v2.py",
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler._verify",
        ("logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping", "idx_mapping_np", "expanded_idx_mapping"),
        "engine/runner_v2.py",
    ),
    Seam(
        "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_sampling_params",
        ("logits", "expanded_idx_mapping", "pos", "input_ids", "expanded_local_pos"),
        "engine/runner_v2.py",
    ),
    Seam(
        "vllm.v1.worker.gpu.sample.sampler:Sampler.sample",
        ("logits", "expanded_idx_mapping", "idx_mapping_np", "pos", "input_ids", "return_logprobs"),
        "engine/runner_v2.py",
    ),
    Seam(
        "vllm.v1.worker.gpu.sample.states:SamplingStates.add_request",
        ("req_idx", "sampling_params"),
        "engine/runner_v2.py",
    ),
    Seam("vllm.v1.worker.gpu.sample.states:SamplingStates.apply_staged_writes", (), "engine/runner_v2.py"),
    Seam(
        "vllm.v1.worker.gpu.sample.states:SamplingStates.apply_temperature",
        ("logits", "expanded_idx_mapping", "idx_mapping_np"),
        "engine/runner_v2.py",
    ),
    Seam(
        "vllm.v1.worker.gpu.sample.states:SamplingStates.max_num_logprobs",
        ("idx_mapping_np",),
        "engine/runner_v2.py",
    ),
)

# What versions call differently. `sample_draft` is given a position, of the hidden state (until 0.28) or of the token
# before the one drawn: how far the token drawn lies beyond it.
DRAFT_POSITION_ARGUMENTS = {"positions": 2, "sample_src_positions": 1}


def slots_are_int32() -> bool:
    """Whether model runner V2 counts request slots in int32 (until 0.31) or in int64."""
    return vllm_release() < (0, 32)


def has_usable_v2() -> bool:
    """Whether bebop runs on model runner V2 here. Until 0.26 verification is no method of its own there; of models with
    an MTP head, only MiMo has V2 by default in these versions."""
    return vllm_release() >= (0, 27)


def refuse_unusable_v2(uses_v2: bool | None) -> None:
    """Raise BebopConfigError where the engine is to run on a model runner V2 that is not usable."""
    if uses_v2 and not has_usable_v2():
        raise BebopConfigError(
            f"bebop needs model runner V1 on vLLM {installed_vllm()}: set VLLM_USE_V2_MODEL_RUNNER=0, or use vLLM 0.27 "
            "or later"
        )


def dummy_batches_spare_drafts(speculator: Any) -> bool:
    """Whether model runner V2 keeps the steps of an idle data-parallel replica away from request slots (since 0.32)."""
    copy_inputs = getattr(speculator, "_copy_request_inputs", None)
    return copy_inputs is not None and "dummy_run" in inspect.signature(copy_inputs).parameters


def installed_vllm() -> str:
    """vLLM's version, without a local tag such as "+cpu"."""
    import vllm

    return vllm.__version__.split("+")[0]


def vllm_release() -> tuple[int, int]:
    major, minor, *_ = installed_vllm().split(".")
    return int(major), int(minor)


def _tested(version: str) -> bool:
    return ".".join(version.split(".")[:2]) in (*TESTED_VERSIONS, os.environ.get(_CANDIDATE))


def missing_seams() -> list[str]:
    """Upstream symbols that are absent or have lost a parameter, each with the file of ours that needs it."""
    problems = []
    for seam in (*_INTAKE, *_RUNNER_V1, *(_RUNNER_V2 if has_usable_v2() else ())):
        module_name, path = seam.symbol.split(":")
        try:
            found: Any = importlib.import_module(module_name)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            problems.append(f"{seam.symbol} is missing ({error}; needed by {seam.used_by})")
            continue
        accepted = inspect.signature(inspect.unwrap(found)).parameters
        lost = [names for names in seam.parameters if not any(name in accepted for name in names.split("|"))]
        if lost:
            problems.append(f"{seam.symbol} no longer takes {', '.join(lost)} (needed by {seam.used_by})")
    return problems


def require_supported_vllm() -> None:
    """Stop the start on a vLLM that bebop was not tested on.

    Raises:
        BebopConfigError: naming the version, or each symbol that is missing, or the model runner that cannot be had.
    """
    from vllm import envs

    version = installed_vllm()
    if not _tested(version):
        raise BebopConfigError(
            f"vLLM {version} has not been tested with bebop; supported: {', '.join(v + '.*' for v in TESTED_VERSIONS)}"
            ". Install one of these, or a bebop release that lists yours"
        )
    problems = missing_seams()
    if problems:
        raise BebopConfigError(f"this vLLM {version} differs from the one bebop was tested on: " + "; ".join(problems))
    refuse_unusable_v2(envs.VLLM_USE_V2_MODEL_RUNNER)  # whatever is the model's default, the worker will know


def check_versions() -> list[tuple[str, bool, str]]:
    """Rows (what, passed, detail) for `bebop doctor`."""
    version = installed_vllm()
    problems = missing_seams()
    return [
        ("vLLM version", _tested(version), f"{version} (tested: {', '.join(v + '.*' for v in TESTED_VERSIONS)})"),
        ("vLLM's seams", not problems, "; ".join(problems) or "the functions that bebop replaces or calls are there"),
    ]
