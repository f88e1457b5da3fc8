"""Adding a verification to running totals, in one launch of one program: see `tally`."""

import triton
import triton.language as tl
from torch import Tensor

from vllm_bebop.kernels.arguments import check_tensor
from vllm_bebop.kernels.launch import compile_options
from vllm_bebop.kernels.reference import Verification
from vllm_bebop.kernels.tally import TOTALS

_REQUESTS = 128  # that the program reads at once


def tally(verification: Verification, totals: Tensor) -> None:
    """Add one verification of B requests to the totals, in place and without waiting for the device.

    Args:
        verification: of the fused `verify`, of as many drafts as the totals have steps but one.
        totals: [len(TOTALS), max_drafts + 1] fp64, contiguous.
    Raises:
        ValueError: the totals are of another number of drafts, or on another device.
    Reference: tally.tally_reference
    """
    batch, num_steps = verification.token_ids.shape
    check_tensor("totals", totals, (len(TOTALS), num_steps), totals.double().dtype, verification.token_ids.device)
    if num_steps == 1 or batch == 0:
        return
    tally_kernel[(1,)](
        verification.target_entropy_nats,
        verification.overlap,
        verification.draft_argmax_prob,
        verification.num_accepted,
        totals,
        batch,
        num_steps - 1,
        REQUESTS=_REQUESTS,
        STEPS=triton.next_power_of_2(num_steps),
        **compile_options(4),
    )


@triton.jit(do_not_specialize=["batch"])
def tally_kernel(
    entropy_ptr,
    overlap_ptr,
    argmax_prob_ptr,
    num_accepted_ptr,
    totals_ptr,
    batch,
    max_drafts,
    REQUESTS: tl.constexpr,
    STEPS: tl.constexpr,
):
    steps = tl.arange(0, STEPS)
    num_steps = max_drafts + 1
    zeros = tl.zeros([STEPS], tl.float64)
    tokens, entropies, drafts, accepted, overlaps, argmax_probs = zeros, zeros, zeros, zeros, zeros, zeros
    for first in range(0, batch, REQUESTS):
        request = (first + tl.arange(0, REQUESTS))[:, None]
        in_batch = request < batch
        num_accepted = tl.load(num_accepted_ptr + request, mask=in_batch, other=-1)
        first_overlap = tl.load(overlap_ptr + request * max_drafts, mask=in_batch, other=float("nan"))
        is_round = first_overlap == first_overlap  # not NaN
        is_token = is_round & (steps[None, :] <= num_accepted) & (steps[None, :] < num_steps)
        entropy = tl.load(entropy_ptr + request * num_steps + steps[None, :], mask=is_token, other=0.0)
        draft = request * max_drafts + steps[None, :]
        is_draft = is_token & (steps[None, :] < max_drafts)
        overlap = tl.load(overlap_ptr + draft, mask=is_draft, other=float("nan"))
        is_draft = is_draft & (overlap == overlap)
        argmax_prob = tl.load(argmax_prob_ptr + draft, mask=is_draft, other=0.0)
        is_accepted = is_draft & (steps[None, :] < num_accepted)
        tokens += _sum(is_token)
        entropies += _sum(entropy)
        drafts += _sum(is_draft)
        accepted += _sum(is_accepted)
        overlaps += _sum(tl.where(is_draft, overlap, 0.0))
        argmax_probs += _sum(argmax_prob)
    _add(totals_ptr, 0, steps, num_steps, tokens)
    _add(totals_ptr, 1, steps, num_steps, entropies)
    _add(totals_ptr, 2, steps, num_steps, drafts)
    _add(totals_ptr, 3, steps, num_steps, accepted)
    _add(totals_ptr, 4, steps, num_steps, overlaps)
    _add(totals_ptr, 5, steps, num_steps, argmax_probs)


@triton.jit
def _sum(values):
    """Over requests: [R, STEPS] -> [STEPS] fp64."""
    return tl.sum(values.to(tl.float32), axis=0).to(tl.float64)


@triton.jit
def _add(totals_ptr, plane, steps, num_steps, sums):
    place = totals_ptr + plane * num_steps + steps
    total = tl.load(place, mask=steps < num_steps) + sums
    tl.debug_barrier()  # all warps have read what is overwritten here
    tl.store(place, total, mask=steps < num_steps)
