"""Block verification in plain torch (arXiv:2403.10444): drafts are accepted together, on average never fewer of them.

The drafts x_1 .. x_n of a round were drawn from q_1 .. q_n; p_i is the target given the drafts before x_i. With

    w_0 = 1,   w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)),   R_i = sum_v max(0, w_i p_{i+1}(v) - q_{i+1}(v))
    h_i = R_i / (R_i + 1 - w_i) for i < n,   h_n = w_n

the first tau drafts are accepted, tau being the largest i with eta_i <= h_i for independent uniform eta_i (h_0 is 1).
The next token is drawn from max(0, w_tau p_{tau+1} - q_{tau+1}), renormalised; if tau = n, from p_{n+1}. That row n has
no draft is the case q_{n+1} = 0 of the same formulas, with R_n = w_n.

Why the output follows p. First, P(tau >= i | x_1 .. x_i) = w_i. It holds at n. If it holds at i + 1, then tau >= i + 1
has, given x_1 .. x_i alone, the probability M = sum_v q_{i+1}(v) min(1, w_i p_{i+1}(v) / q_{i+1}(v)) = w_i - R_i. As
eta_i is independent of what comes after i, P(tau >= i | x_1 .. x_i) = 1 - (1 - h_i) (1 - M), and with
1 - h_i = (1 - w_i) / (1 - M) that is w_i; also P(tau = i | x_1 .. x_i) = h_i (1 - M) = R_i. Hence, after x_1 .. x_i, v
comes next as a draft with probability min(q_{i+1}(v), w_i p_{i+1}(v)) and as a drawn token with the remaining
max(0, w_i p_{i+1}(v) - q_{i+1}(v)): together w_i p_{i+1}(v), the chance of getting as far as i times p.

Random numbers. Whether a draft is accepted depends on drafts after it, rejected ones too, so a round has looked at
noise of positions that the next round decides anew: with the same noise there, rounds would depend on each other. The
draft and accept streams therefore carry the round as their counter `attempt`: the position of its first draft, which
every round moves on. The token after the accepted drafts needs no such key. Only that one token of the round is drawn
on the target and residual streams, at position first + tau, and the next round begins past it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_bebop.kernels.philox import Stream, uniform
from vllm_bebop.kernels.reference import NEG_INF, Proposal, Verification, draw_residual, verify_reference


def verify_block_reference(*arguments: Any, **options: Any) -> Verification:
    """Accepts or rejects draft tokens as a block so that the output follows the target exactly.

    Arguments, result, errors and memory are those of `reference.verify_reference`, but for `rule`. Draft tokens must be
    drawn with `rounds` equal to `positions`. A step without a draft token, and a target row that is empty, end the
    block: what is drafted from there on is rejected, and if all before it is accepted the next token is drawn from p.
    """
    return verify_reference(*arguments, **options, rule=accept_block)


def accept_block(proposal: Proposal) -> tuple[Tensor, Tensor]:
    """The rule of this module, for `verify_reference`."""
    target, row, seeds, positions = proposal.target, proposal.row, proposal.seeds, proposal.positions
    dtype, step = proposal.log_p.dtype, torch.arange(row.shape[1], device=row.device)
    is_in_block = proposal.is_drawn & (target.logsumexp[row[:, :-1]] > NEG_INF)
    num_drafts = is_in_block.long().cumprod(dim=1).sum(dim=1)  # n
    is_end = step == num_drafts[:, None]

    log_weights = [torch.zeros(len(seeds), dtype=dtype, device=seeds.device)]
    for log_ratio in (proposal.log_p_token - proposal.log_q_token).where(is_in_block, 0.0).unbind(1):
        log_weights.append((log_weights[-1] + log_ratio).clamp(max=0.0))
    log_weight = torch.stack(log_weights, dim=1)  # [B, max_drafts + 1], log w
    weight = log_weight.exp()

    residual = _residual(log_weight[:, :-1], proposal.log_p, proposal.log_q)
    residual_sum = F.pad(residual.sum(dim=2), (0, 1)).where(~is_end, weight)  # R
    eta = uniform(seeds[:, None], positions[:, None] + step - 1, Stream.ACCEPT, attempt=positions[:, None]).to(dtype)
    accepts = _is_reached(eta, weight, residual_sum) & (step <= num_drafts[:, None])
    num_accepted = (accepts * step).amax(dim=1)  # tau

    last_row = row.gather(1, num_accepted[:, None]).squeeze(1)
    last_position = positions + num_accepted
    last_token = target.at(last_row).draw(seeds, last_position, (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN))
    # A residual of 0 is p equal to q up to rounding: the token from p stands.
    has_residual = residual_sum.gather(1, num_accepted[:, None]).squeeze(1) > 0
    request = ((num_accepted < num_drafts) & has_residual).nonzero().squeeze(1)
    last_token[request] = draw_residual(
        residual[request, num_accepted[request]], seeds[request], last_position[request]
    )
    return num_accepted, last_token


def _residual(log_weight: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """[B, max_drafts, V]: max(0, w p - q) of log w [B, max_drafts]."""
    return ((log_weight[:, :, None] + log_p).exp() - log_q.exp()).clamp(min=0.0)


def _is_reached(eta: Tensor, weight: Tensor, residual_sum: Tensor) -> Tensor:
    """eta <= h, in a form that is true for w = 1 whatever R: where p equals q, h is 0 / 0 and 1 by its limit."""
    return eta * (residual_sum + (1.0 - weight)) <= residual_sum
