"""Which sampler runs on a device: the fused kernels wherever Triton does, the reference elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_bebop.kernels.candidates import Candidates
from vllm_bebop.kernels.gathering import GatheredDrafts
from vllm_bebop.kernels.reference import DraftSample, Verification


@dataclass(frozen=True)
class Backend:
    """The samplers and what goes with them, with the signatures that Triton's have.

    The workspaces are made by `sampling_workspace(max_batch, vocab_size, device)` and
    `verification_workspace(max_batch, max_drafts, vocab_size, device)`; None where the backend needs none.
    """

    name: str
    sample: Callable[..., DraftSample]
    verify: Callable[..., Verification]
    find_candidates: Callable[..., Candidates]
    gather_drafts: Callable[..., GatheredDrafts]
    sampling_workspace: Callable[..., Any]
    verification_workspace: Callable[..., Any]


def pick(device: torch.device) -> Backend:
    """The fused kernels on CUDA, on ROCm and in Triton's interpreter; the reference on any other device."""
    return fused() if _runs_triton(device) else plain()


def fused() -> Backend:
    from vllm_bebop.kernels.candidate_kernel import find_candidates
    from vllm_bebop.kernels.draft_sampling import SamplingWorkspace, sample
    from vllm_bebop.kernels.gathering_kernel import gather_drafts
    from vllm_bebop.kernels.launch import is_interpreted
    from vllm_bebop.kernels.verification import VerificationWorkspace, verify

    name = "Triton kernels, interpreted" if is_interpreted() else "Triton kernels"
    return Backend(name, sample, verify, find_candidates, gather_drafts, SamplingWorkspace, VerificationWorkspace)


def plain() -> Backend:
    from vllm_bebop.kernels.fallback import find_candidates, sample, verify
    from vllm_bebop.kernels.gathering import gather_drafts_reference

    def none(*_: object, **__: object) -> None:
        return None

    gather_drafts = gather_drafts_reference
    return Backend("reference in plain torch", sample, verify, find_candidates, gather_drafts, none, none)


def _runs_triton(device: torch.device) -> bool:
    if device.type == "cuda":  # ROCm calls itself that too
        return True
    try:
        from vllm_bebop.kernels.launch import is_interpreted
    except ImportError:  # no Triton here
        return False
    return is_interpreted()
