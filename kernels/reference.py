"""Sampling and verification of draft tokens in plain torch: the oracle for the fused kernels, and the CPU sampler.

Read this first. p is the target's distribution and q the draft's, both softmax(logits / T) (arXiv:2606.12370, Eq. 2):

1. A draft token y ~ q is accepted with probability min(1, p(y) / q(y)).
2. The first rejected position gets a token from the residual max(0, p - q), renormalised (the recovered token).
3. If all drafts are accepted, one more token is drawn from p of the last row (the bonus token).

The tokens that come out are distributed exactly as if drawn from p one by one. Three choices differ from the textbook;
none of them changes the law, and each saves the kernels a pass over the vocabulary or a random number per entry:

- A draw first picks a sub-block of SUB_BLOCK logits by its total weight S_j, then a token inside it:
  P(j) P(v | j) = (S_j / S) (e^z_v / S_j) = e^z_v / S. Both picks are Gumbel-max.
- The residual is first tried by thinning: draw x ~ p and keep it with probability 1 - min(1, q(x) / p(x)). A kept draw
  has the weight p(x) - min(p(x), q(x)) = max(0, p(x) - q(x)). Only if NUM_THINNING_ROUNDS draws are all dropped is
  max(0, p - q) computed over the vocabulary.
- Random numbers are named by (seed, absolute position, purpose), see `philox`.

A point mass is a row like any other, with one finite score: T < GREEDY_TEMPERATURE puts all of p on the argmax; a
one-hot draft (greedy or n-gram) puts all of q on y, which turns 1 and 2 into target-only acceptance (Eq. 1).

Scores are logits / T in fp32: log p is right to about the rounding of the largest |logit| / T, which for logits of 60
is 1e-5 at T = 1 and 5e-4 at 0.01, the least that vLLM lets through. Below, down to GREEDY_TEMPERATURE, it is coarser.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_bebop.kernels.arguments import check_logits, check_tensor
from vllm_bebop.kernels.filters import NO_FILTERS, Filters, find_threshold
from vllm_bebop.kernels.philox import Stream, gumbel, uniform

SUB_BLOCK = 512
NUM_THINNING_ROUNDS = 32  # where p and q overlap by 0.8, one rejection in 1,300 is left after so many
GREEDY_TEMPERATURE = 1e-5
MAX_SCORE = 1e30
NEG_INF = float("-inf")


@dataclass(frozen=True)
class DraftSample:
    """One token per request, drawn from q = softmax(logits / T). Floats are in the compute dtype."""

    token_ids: Tensor  # [B] int64
    logsumexp: Tensor  # [B], of logits / T in nats; the largest logit for a greedy request
    log_prob: Tensor  # [B], log q(token) in nats; 0 for a greedy request
    entropy_nats: Tensor  # [B]; 0 for a greedy request
    threshold: Tensor  # [B], the lowest logit that the filters keep; -inf where they keep all
    num_nan: Tensor  # [B] int64, NaN logits, which were read as -inf
    is_empty: Tensor  # [B] bool, no logit above -inf: token 0 with log_prob -inf
    argmax_ids: Tensor  # [B] int64, argmax q, the lowest id on ties: what greedy drafting would have drawn (Eq. 1)


@dataclass(frozen=True)
class Verification:
    """Output tokens of one verification step and per-row statistics (compute dtype, NaN where there is no row)."""

    token_ids: Tensor  # [B, max_drafts + 1] int64: accepted drafts, one recovered or bonus token, then -1
    num_accepted: Tensor  # [B] int64, accepted drafts
    num_tokens: Tensor  # [B] int32, of the output: num_accepted + 1, or num_scheduled + 1 where that is less
    target_entropy_nats: Tensor  # [B, max_drafts + 1], H(p) (Eq. 4)
    overlap: Tensor  # [B, max_drafts], sum_v min(p, q), the chance of acceptance (Eq. 2); p(y) for a one-hot draft
    draft_argmax_prob: Tensor  # [B, max_drafts], p(argmax q), the chance under target-only acceptance (Eq. 1)
    num_nan: Tensor  # [B] int64, NaN target logits in the request's rows, which were read as -inf
    num_empty_rows: Tensor  # [B] int64, target rows without a logit above -inf: they reject, and give token 0


@dataclass(frozen=True)
class Proposal:
    """The drafts of a verification step and their laws: log-probabilities in nats, in the compute dtype."""

    target: "_Rows"  # of target_logits
    row: Tensor  # [B, max_drafts + 1] int64, each step's target row; the request's first one past num_draft_tokens
    log_p: Tensor  # [B, max_drafts, V]
    log_q: Tensor  # [B, max_drafts, V]
    log_p_token: Tensor  # [B, max_drafts], log p(y)
    log_q_token: Tensor  # [B, max_drafts], log q(y)
    is_drawn: Tensor  # [B, max_drafts] bool, whether y is a token that q can have given
    seeds: Tensor  # [B] int64
    positions: Tensor  # [B] int64, absolute position of the token that row 0 decides


# Which drafts are accepted: the number of them, and the token after them, [B] int64 each.
Rule = Callable[[Proposal], tuple[Tensor, Tensor]]


def sample_reference(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    rounds: Tensor | None = None,
    streams: tuple[Stream, Stream] = (Stream.DRAFT_BLOCK, Stream.DRAFT_TOKEN),
    filters: Filters = NO_FILTERS,
    dtype: torch.dtype = torch.float32,
) -> DraftSample:
    """Draws one token per row from softmax(logits / temperature), or from what the filters leave of it.

    Args:
        logits: [B, V], any float dtype, before temperature. NaN reads as -inf, +inf as 1e30.
        temperature: [B] fp32. Below 1e-5 is greedy: argmax, the lowest id on ties.
        seeds: [B] int64, one per request.
        positions: [B] int64, absolute position of the token being drawn.
        rounds: [B] int64, position of the first draft of each token's round, where drafts are verified as a block: see
            `block_reference`.
        streams: random streams for the sub-block and for the token. Use the TARGET streams for a token that the target
            draws without any draft.
        filters: top-k, top-p and min-p of each request.
        dtype: compute dtype, fp32 or fp64.
    Returns:
        DraftSample. The logits and the threshold are all that verification needs to know of q.
    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the argument.
    Memory: about four [B, V] temporaries of `dtype`.
    """
    check_logits("logits", logits, (None, None), logits.device)
    batch = logits.shape[0]
    _check_requests(batch, logits.device, temperature, seeds, positions)
    if rounds is not None:
        check_tensor("rounds", rounds, (batch,), torch.int64, logits.device)
    _check_compute_dtype(dtype)

    filters.check(batch, logits.device)
    scores, num_nan, threshold = _scores(logits, temperature, dtype, filters=filters)
    rows = _Rows.from_scores(scores)
    token_ids = rows.draw(seeds, positions, streams, 0 if rounds is None else rounds[:, None])
    return DraftSample(
        token_ids=token_ids,
        logsumexp=rows.logsumexp,
        log_prob=rows.log_prob(token_ids),
        entropy_nats=_entropy_nats(rows.log_probs()),
        threshold=threshold,
        num_nan=num_nan,
        is_empty=rows.logsumexp == NEG_INF,
        argmax_ids=scores.argmax(dim=1),
    )


def accept_one_by_one(proposal: Proposal) -> tuple[Tensor, Tensor]:
    """The rule of Eq. 1 and 2."""
    target, row, log_q_token, is_drawn = proposal.target, proposal.row, proposal.log_q_token, proposal.is_drawn
    seeds, positions, step = proposal.seeds, proposal.positions, torch.arange(row.shape[1], device=row.device)

    # 1. Accept up to the first rejection.
    u = uniform(seeds[:, None], positions[:, None] + step[:-1], Stream.ACCEPT).to(log_q_token.dtype)
    accepts = is_drawn & _is_below_ratio(u, proposal.log_p_token, log_q_token)
    num_accepted = accepts.long().cumprod(dim=1).sum(dim=1)

    # 2. and 3. One more token: from p for a bonus, or where there was no draft token; otherwise from the residual.
    last_row = row.gather(1, num_accepted[:, None]).squeeze(1)
    last_position = positions + num_accepted
    last_token = target.at(last_row).draw(seeds, last_position, (Stream.TARGET_BLOCK, Stream.TARGET_TOKEN))
    request, rejected_step = (is_drawn & (step[:-1] == num_accepted[:, None])).nonzero(as_tuple=True)
    last_token[request] = _sample_residual(
        target.at(last_row[request]), proposal.log_q[request, rejected_step], seeds[request], last_position[request]
    )
    return num_accepted, last_token


def verify_reference(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_logits: Tensor | None,
    num_draft_tokens: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    one_hot: Tensor | None = None,
    target_is_processed: bool = False,
    bitmask: Tensor | None = None,
    filters: Filters = NO_FILTERS,
    draft_threshold: Tensor | None = None,
    num_scheduled: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    rule: Rule = accept_one_by_one,
) -> Verification:
    """Accepts or rejects draft tokens so that the output follows the target exactly (Eq. 1 and 2).

    Args:
        target_logits: [sum(num_draft_tokens + 1), V], any float dtype. Request r owns num_draft_tokens[r] + 1
            consecutive rows; row i decides position positions[r] + i. NaN reads as -inf, +inf as 1e30.
        draft_token_ids: [B, max_drafts] int64; -1 (or any id outside the vocabulary) is no draft: it is rejected, and
            the token comes from p.
        draft_logits: [B, max_drafts, V], any float dtype, before temperature, from which the draft tokens were drawn
            at the same temperature. None: every draft is one-hot. Entries past num_draft_tokens are not used.
        num_draft_tokens: [B] int64, 0 .. max_drafts.
        temperature: [B] fp32. Below 1e-5 is greedy: a draft is accepted iff it is the argmax (lowest id on ties).
        seeds: [B] int64, as for `sample_reference`.
        positions: [B] int64, absolute position of the token that row 0 decides.
        one_hot: [B] bool, requests whose draft is a point mass on its token (Eq. 1); their draft_logits are not used.
        target_is_processed: the target rows already carry temperature and masks (-inf). Temperature then applies to
            the draft rows only, and below 1e-5 still means argmax.
        bitmask: [rows of target_logits, ceil(V / 32)] int32: token v is allowed if bit v % 32 of word v // 32 is set.
        filters: top-k, top-p and min-p of each request, applied to p (after the bitmask).
        draft_threshold: [B, max_drafts] float: the lowest of each row's draft_logits that counts, as returned by
            `sample_reference`; -inf or None where all do.
        num_scheduled: [B] int64, of num_draft_tokens, those with a row of logits behind them that may be served. Where
            one more is accepted, it is the output's last token.
        dtype: compute dtype, fp32 or fp64.
        rule: `accept_one_by_one`, or `block_reference.accept_block`.
    Returns:
        Verification.
    Raises:
        ValueError: a shape, dtype, device or count is wrong; the message names the argument.
    Memory: about four temporaries of `dtype` of the size of target_logits and as many of draft_logits.
    """
    check_logits("target_logits", target_logits, (None, None), target_logits.device)
    device, vocab_size = target_logits.device, target_logits.shape[1]
    check_tensor("draft_token_ids", draft_token_ids, (None, None), torch.int64, device)
    batch, max_drafts = draft_token_ids.shape
    if draft_logits is not None:
        check_logits("draft_logits", draft_logits, (batch, max_drafts, vocab_size), device)
    check_tensor("num_draft_tokens", num_draft_tokens, (batch,), torch.int64, device)
    _check_requests(batch, device, temperature, seeds, positions)
    if one_hot is not None:
        check_tensor("one_hot", one_hot, (batch,), torch.bool, device)
    if bitmask is not None:
        check_tensor("bitmask", bitmask, (target_logits.shape[0], (vocab_size + 31) // 32), torch.int32, device)
        target_logits = target_logits.masked_fill(~_unpack(bitmask, vocab_size), NEG_INF)
    filters.check(batch, device)
    if draft_threshold is not None:
        check_tensor("draft_threshold", draft_threshold, (batch, max_drafts), None, device)
    if num_scheduled is not None:
        check_tensor("num_scheduled", num_scheduled, (batch,), torch.int64, device)
    _check_compute_dtype(dtype)
    if ((num_draft_tokens < 0) | (num_draft_tokens > max_drafts)).any():
        raise ValueError(f"num_draft_tokens must lie in 0 .. {max_drafts}, the width of draft_token_ids")
    num_rows = num_draft_tokens + 1
    if target_logits.shape[0] != int(num_rows.sum()):
        raise ValueError(
            f"target_logits has {target_logits.shape[0]} rows, but sum(num_draft_tokens + 1) is {int(num_rows.sum())}"
        )

    step = torch.arange(max_drafts + 1, device=device)
    has_row = step <= num_draft_tokens[:, None]  # [B, max_drafts + 1]
    has_draft_row = step[:-1] < num_draft_tokens[:, None]  # [B, max_drafts]
    first_row = num_rows.cumsum(0) - num_rows
    row = first_row[:, None] + torch.where(has_row, step, 0)  # a row past the last stands for row 0 and is masked

    request_of_row = torch.arange(batch, device=device).repeat_interleave(num_rows)
    scores, num_nan, _ = _scores(
        target_logits,
        temperature[request_of_row],
        dtype,
        divide=not target_is_processed,
        filters=filters.of(request_of_row),
    )
    target = _Rows.from_scores(scores)
    log_p = target.log_probs()

    # Greedy requests accept iff the token equals the argmax, whatever q was: q as a point mass says just that.
    point_mass = temperature < GREEDY_TEMPERATURE
    if one_hot is not None:
        point_mass = point_mass | one_hot
    log_q = _draft_log_probs(draft_token_ids, draft_logits, draft_threshold, temperature, point_mass, vocab_size, dtype)

    is_token = (draft_token_ids >= 0) & (draft_token_ids < vocab_size)
    token = torch.where(is_token, draft_token_ids, 0)
    log_p_draft = log_p[row[:, :-1]]  # [B, max_drafts, V]
    log_p_token, log_q_token = (each.gather(2, token[:, :, None]).squeeze(2) for each in (log_p_draft, log_q))
    is_drawn = has_draft_row & is_token & (log_q_token > NEG_INF)
    proposal = Proposal(target, row, log_p_draft, log_q, log_p_token, log_q_token, is_drawn, seeds, positions)
    num_accepted, last_token = rule(proposal)

    token_ids = F.pad(draft_token_ids, (0, 1)).where(step < num_accepted[:, None], -1)
    token_ids.scatter_(1, num_accepted[:, None], last_token[:, None])

    nan = torch.full((), float("nan"), dtype=dtype, device=device)
    has_q = has_draft_row & (log_q > NEG_INF).any(dim=2)
    argmax_q = log_q.argmax(dim=2, keepdim=True)
    per_request = torch.zeros(batch, dtype=torch.int64, device=device)
    return Verification(
        token_ids=token_ids,
        num_accepted=num_accepted,
        num_tokens=count_tokens(num_accepted, num_scheduled),
        target_entropy_nats=torch.where(has_row, _entropy_nats(log_p)[row], nan),
        overlap=torch.where(has_q, torch.minimum(log_p_draft, log_q).exp().sum(dim=2), nan),
        draft_argmax_prob=torch.where(has_q, log_p_draft.gather(2, argmax_q).squeeze(2).exp(), nan),
        num_nan=per_request.index_add(0, request_of_row, num_nan),
        num_empty_rows=per_request.index_add(0, request_of_row, (target.logsumexp == NEG_INF).long()),
    )


def count_tokens(num_accepted: Tensor, num_scheduled: Tensor | None) -> Tensor:
    """[B] int32, of the output: see `verify_reference`."""
    counted = num_accepted if num_scheduled is None else torch.minimum(num_accepted, num_scheduled)
    return (counted + 1).to(torch.int32)


@dataclass(frozen=True)
class _Rows:
    """N rows of scores, cut into sub-blocks; row n stands for the distribution softmax(scores[n])."""

    scores: Tensor  # [N, num_blocks, width]; -inf past the vocabulary
    block_logsumexp: Tensor  # [N, num_blocks]
    logsumexp: Tensor  # [N]; -inf for an empty row
    vocab_size: int

    @staticmethod
    def from_scores(scores: Tensor) -> "_Rows":
        """scores: [N, V], -inf for an impossible token."""
        blocks = _cut(scores)
        block_logsumexp = blocks.logsumexp(dim=2)
        return _Rows(blocks, block_logsumexp, block_logsumexp.logsumexp(dim=1), scores.shape[1])

    def at(self, index: Tensor) -> "_Rows":
        return _Rows(self.scores[index], self.block_logsumexp[index], self.logsumexp[index], self.vocab_size)

    def draw(
        self, seeds: Tensor, positions: Tensor, streams: tuple[Stream, Stream], attempt: Tensor | int = 0
    ) -> Tensor:
        """[N] int64: one token of each row; token 0 of an empty row."""
        return _draw(self.scores, self.block_logsumexp, seeds, positions, streams, attempt)

    def log_prob(self, token_ids: Tensor) -> Tensor:
        """[N]: log-probability in nats of token_ids [N]; -inf in an empty row."""
        scores = self.scores.flatten(1).gather(1, token_ids[:, None]).squeeze(1)
        return scores - self._finite_logsumexp()

    def log_probs(self) -> Tensor:
        """[N, V]: log-probabilities in nats; all -inf in an empty row."""
        return self.scores.flatten(1)[:, : self.vocab_size] - self._finite_logsumexp()[:, None]

    def _finite_logsumexp(self) -> Tensor:
        return self.logsumexp.where(self.logsumexp > NEG_INF, 0.0)  # -inf - (-inf) would be NaN


def _cut(values: Tensor, fill: float = NEG_INF) -> Tensor:
    """[N, V] -> [N, num_blocks, width]. A vocabulary below SUB_BLOCK is one sub-block of its own width."""
    width = min(SUB_BLOCK, values.shape[1])
    return F.pad(values, (0, -values.shape[1] % width), value=fill).unflatten(1, (-1, width))


def _draw(
    scores: Tensor,
    block_logsumexp: Tensor,
    seeds: Tensor,
    positions: Tensor,
    streams: tuple[Stream, Stream],
    attempt: Tensor | int = 0,
) -> Tensor:
    """Draws a token with probability softmax(scores): first its sub-block, then the token inside (both Gumbel-max).

    scores: [N, num_blocks, width]; block_logsumexp: [N, num_blocks]; seeds, positions: [N]; attempt: int or [N, 1].
    Returns [N] int64.
    Ties go to the lowest id; where every score is -inf, that is token 0.
    """
    block_stream, token_stream = streams
    num_rows, num_blocks, width = scores.shape
    seeds, positions, dtype = seeds[:, None], positions[:, None], scores.dtype
    blocks = torch.arange(num_blocks, device=scores.device)
    noise = gumbel(seeds, positions, block_stream, blocks, attempt, dtype)
    block = (block_logsumexp + noise).argmax(dim=1)
    inside = scores[torch.arange(num_rows, device=scores.device), block]
    places = torch.arange(width, device=scores.device)
    noise = gumbel(seeds, positions, token_stream, places, attempt, dtype)
    return block * width + (inside + noise).argmax(dim=1)


def _is_below_ratio(u: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """u < a / b, hence True with probability min(1, a / b).

    In this form, and not as log u + log b < log a, equal a and b give True for every u: rounding log u + log b can give
    log b back. False for a = 0.
    """
    return u.log() < log_a - log_b


def _sample_residual(target: _Rows, log_q: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws from max(0, p - q), renormalised; from p where that is zero everywhere (p equal to q up to rounding).

    target: N rows of p; log_q: [N, V]; seeds, positions: [N]. Returns [N] int64.
    """
    token_ids = torch.zeros_like(seeds)
    pending = torch.arange(seeds.shape[0], device=seeds.device)
    for attempt in range(NUM_THINNING_ROUNDS):
        rows = target.at(pending)
        draw = rows.draw(seeds[pending], positions[pending], (Stream.THINNING_BLOCK, Stream.THINNING_TOKEN), attempt)
        token_ids[pending] = draw
        u = uniform(seeds[pending], positions[pending], Stream.THINNING_KEEP, attempt=attempt).to(log_q.dtype)
        pending = pending[_is_below_ratio(u, log_q[pending, draw], rows.log_prob(draw))]
        if pending.numel() == 0:
            return token_ids

    residual = (target.at(pending).log_probs().exp() - log_q[pending].exp()).clamp(min=0)
    draw = draw_residual(residual, seeds[pending], positions[pending])
    token_ids[pending] = torch.where(residual.sum(dim=1) > 0, draw, token_ids[pending])
    return token_ids


def draw_residual(residual: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws from each row of residual [N, V], renormalised; seeds, positions: [N]. Returns [N] int64."""
    blocks = _cut(residual, fill=0.0)
    streams = (Stream.RESIDUAL_BLOCK, Stream.RESIDUAL_TOKEN)
    return _draw(blocks.log(), blocks.sum(dim=2).log(), seeds, positions, streams)


def _scores(
    logits: Tensor,
    temperature: Tensor,
    dtype: torch.dtype,
    *,
    divide: bool = True,
    filters: Filters = NO_FILTERS,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores whose softmax is the distribution to sample, the number of NaN logits per row, and the row's threshold.

    logits: [N, V]; temperature: [N]; divide: apply the temperature (greedy rows need none); filters: of the N rows, or
    threshold: [N], what they came to. Returns [N, V], [N] int64, [N].
    """
    is_greedy = temperature < GREEDY_TEMPERATURE
    divisor = temperature.to(dtype).masked_fill(is_greedy, 1.0) if divide else torch.ones_like(temperature, dtype=dtype)
    logits = logits.to(dtype)
    is_nan = logits.isnan()
    logits = logits.masked_fill(is_nan, NEG_INF).clamp(max=MAX_SCORE)
    if threshold is None:
        threshold = find_threshold(logits, divisor, filters).masked_fill(is_greedy, NEG_INF)
    scores = (logits / divisor[:, None]).clamp(max=MAX_SCORE)
    scores = scores.masked_fill(logits < threshold[:, None], NEG_INF)
    # Unconditional, since draft sampling runs inside CUDA graphs: no branch may depend on the data.
    is_argmax = torch.zeros_like(is_nan).scatter_(1, scores.argmax(dim=1, keepdim=True), True)
    scores = scores.masked_fill(is_greedy[:, None] & ~is_argmax, NEG_INF)
    return scores, is_nan.sum(dim=1), threshold


def _unpack(bitmask: Tensor, vocab_size: int) -> Tensor:
    """[N, V] bool from [N, ceil(V / 32)] int32, the lowest bit first."""
    bits = bitmask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device)
    return (bits & 1).flatten(1)[:, :vocab_size].bool()


def _draft_log_probs(
    token_ids: Tensor,
    logits: Tensor | None,
    threshold: Tensor | None,
    temperature: Tensor,
    point_mass: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """[B, max_drafts, V] log q in nats; where the request's q is a point mass, 0 on its token and -inf elsewhere."""
    if logits is not None and not point_mass.all():
        batch, max_drafts = token_ids.shape
        of_rows = temperature.repeat_interleave(max_drafts)
        flat_threshold = None if threshold is None else threshold.flatten()
        scores, _, _ = _scores(logits.flatten(0, 1), of_rows, dtype, threshold=flat_threshold)
        log_q = _Rows.from_scores(scores).log_probs().unflatten(0, (batch, max_drafts))
        if not point_mass.any():
            return log_q
    else:
        log_q = torch.full((*token_ids.shape, vocab_size), NEG_INF, dtype=dtype, device=token_ids.device)
    is_token = torch.arange(vocab_size, device=token_ids.device) == token_ids[:, :, None]
    return torch.where(point_mass[:, None, None] | (logits is None), is_token.to(dtype).log(), log_q)


def _entropy_nats(log_probs: Tensor) -> Tensor:
    """[N]: -sum_v p(v) log p(v) in nats (Eq. 4) of log_probs [N, V]; impossible tokens add 0."""
    probs = log_probs.exp()
    return -torch.where(probs > 0, probs * log_probs, 0.0).sum(dim=1)


def _check_requests(batch: int, device: torch.device, temperature: Tensor, seeds: Tensor, positions: Tensor) -> None:
    check_tensor("temperature", temperature, (batch,), torch.float32, device)
    check_tensor("seeds", seeds, (batch,), torch.int64, device)
    check_tensor("positions", positions, (batch,), torch.int64, device)


def _check_compute_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.float64")
