"""Running totals over verifications: what drafting is worth, and the policy's entropy, as a by-product on the device.

Only what was served counts: of each request that had a draft whose q is known, the steps up to and including the
first rejection. At those the drafts stand on accepted tokens only, so that in the mean overlap = accepted / drafts
(arXiv:2606.12370, Eq. 2; not with block verification, which decides drafts together). With asynchronous scheduling
vLLM begins a round more before it knows of a request's end; that one counts, too. In Triton: `tally_kernel`.
"""

import torch
from torch import Tensor

from vllm_bebop.kernels.reference import Verification

# Totals by step, each a sum over requests. Of the step behind the last draft (the bonus token's), only the first two.
TOTALS = (
    "tokens",  # tokens served
    "entropy_nats",  # H(p) of the laws they were drawn from (Eq. 4)
    "drafts",  # drafts decided
    "accepted",  # of these
    "overlap",  # sum_v min(p, q), as `Verification` has it
    "target_only",  # p(argmax q), what target-only acceptance would accept (Eq. 1)
)


def new_totals(max_drafts: int, device: torch.device | str) -> Tensor:
    """[len(TOTALS), max_drafts + 1] fp64, zero."""
    return torch.zeros(len(TOTALS), max_drafts + 1, dtype=torch.float64, device=device)


def read_totals(totals: Tensor) -> dict[str, list[float]]:
    """By name, a list over steps; waits for the device."""
    num_tokens, max_drafts = totals.shape[1], totals.shape[1] - 1
    rows = zip(TOTALS, totals.tolist(), strict=True)
    return {name: row[: num_tokens if name in TOTALS[:2] else max_drafts] for name, row in rows}


def tally_reference(verification: Verification, totals: Tensor) -> None:
    """Add one verification to the totals, in place; of steps past those that `totals` has, nothing."""
    num_steps = min(totals.shape[1], verification.overlap.shape[1])
    if num_steps == 0:
        return
    overlap = verification.overlap
    has_draft = ~overlap.isnan()
    steps = torch.arange(totals.shape[1], device=totals.device)
    num_tokens = verification.num_tokens[:, None]
    is_served = has_draft[:, :1] & (steps < num_tokens)
    is_decided = is_served[:, :num_steps] & has_draft[:, :num_steps]
    is_accepted = is_decided & (steps[:num_steps] + 1 < num_tokens)
    entropy = verification.target_entropy_nats[:, : totals.shape[1]]
    is_token = is_served[:, : entropy.shape[1]]
    values = (
        is_token,
        entropy.where(is_token, 0.0),
        is_decided,
        is_accepted,
        overlap[:, :num_steps].where(is_decided, 0.0),
        verification.draft_argmax_prob[:, :num_steps].where(is_decided, 0.0),
    )
    for total, value in zip(totals, values, strict=True):
        total[: value.shape[1]] += value.double().sum(0)
