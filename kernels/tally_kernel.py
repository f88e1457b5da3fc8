"""Adding a verification to running totals, by one program: see `tally`. `verify` does it too, where it is asked to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_bebop.kernels.arguments import check_tensor
from vllm_bebop.kernels.launch import compile_options
from vllm_bebop.kernels.reference import Verification
from vllm_bebop.kernels.tally import TOTALS

NUM_TOTALS = tl.constexpr(len(TOTALS))
NUMBERS_AT_ONCE = tl.constexpr(512)  # of each kind: some requests, and all their steps


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
    check_tensor("totals", totals, (len(TOTALS), num_steps), torch.float64, verification.token_ids.device)
    if num_steps == 1 or batch == 0:
        return
    tally_kernel[(1,)](
        verification.target_entropy_nats,
        verification.overlap,
        verification.draft_argmax_prob,
        verification.num_tokens,
        totals,
        batch,
        num_steps - 1,
        STEPS=triton.next_power_of_2(num_steps),
        **compile_options(4),
    )


@triton.jit(do_not_specialize=["batch"])
def tally_kernel(
    entropy_ptr,
    overlap_ptr,
    argmax_prob_ptr,
    num_tokens_ptr,
    totals_ptr,
    batch,
    max_drafts,
    STEPS: tl.constexpr,
):
    add_to_totals(entropy_ptr, overlap_ptr, argmax_prob_ptr, num_tokens_ptr, totals_ptr, batch, max_drafts, STEPS)


@triton.jit
def add_to_totals(
    entropy_ptr, overlap_ptr, argmax_prob_ptr, num_tokens_ptr, totals_ptr, batch, max_drafts, STEPS: tl.constexpr
):
    """By one program. STEPS: a power of two, more than max_drafts."""
    REQUESTS: tl.constexpr = max(1, NUMBERS_AT_ONCE // STEPS)
    steps = tl.arange(0, STEPS)[None, :]
    num_steps = max_drafts + 1
    planes = tl.arange(0, 8)[None, :]  # as in TOTALS, and two of zeros
    place = totals_ptr + planes * num_steps + tl.arange(0, STEPS)[:, None]
    is_place = (planes < NUM_TOTALS) & (tl.arange(0, STEPS)[:, None] < num_steps)
    totals = tl.load(place, mask=is_place, other=0.0)
    for first in range(0, batch, REQUESTS):
        request = (first + tl.arange(0, REQUESTS))[:, None]
        in_batch = request < batch
        # All loads are under way before the first is waited for.
        num_tokens = tl.load(num_tokens_ptr + request, mask=in_batch, other=0)
        first_overlap = tl.load(overlap_ptr + request * max_drafts, mask=in_batch, other=float("nan"))
        is_step, draft = in_batch & (steps < max_drafts), request * max_drafts + steps
        overlap = tl.load(overlap_ptr + draft, mask=is_step, other=float("nan"))
        argmax_prob = tl.load(argmax_prob_ptr + draft, mask=is_step, other=0.0)
        entropy = tl.load(entropy_ptr + request * num_steps + steps, mask=in_batch & (steps < num_steps), other=0.0)

        is_token = (first_overlap == first_overlap) & (steps < num_tokens)  # no NaN: the round has a draft
        is_draft = is_token & (overlap == overlap)
        is_accepted = is_draft & (steps + 1 < num_tokens)
        nothing = tl.zeros_like(entropy)
        found = _join_eight(
            is_token.to(tl.float32),
            tl.where(is_token, entropy, 0.0),
            is_draft.to(tl.float32),
            is_accepted.to(tl.float32),
            tl.where(is_draft, overlap, 0.0),
            tl.where(is_draft, argmax_prob, 0.0),
            nothing,
            nothing,
        )
        totals += tl.sum(found, axis=0).to(tl.float64)
    tl.debug_barrier()  # all warps have read what is overwritten here
    tl.store(place, totals, mask=is_place)


@triton.jit
def _join_eight(a, b, c, d, e, f, g, h):
    """Eight times [R, N] as [R, N, 8]: one sum over requests for all of them."""
    even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), [a.shape[0], a.shape[1], 8])
