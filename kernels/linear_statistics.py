"""Draft and target compared row by row straight from hidden states: no [tokens, vocabulary] tensor, no recomputation.

A loss of a draft head needs a few numbers per row and step, the statistics below, and p = softmax(z_target / T) and
q = softmax(z_draft / T) are needed for nothing else. The lm_head W is frozen, so a statistic s of one row has one
gradient, ds/dh = (ds/dz) W, a vector of hidden_size numbers that depends on that row and step alone: on no other step
and on nothing that follows in the loss. It is computed in the forward, while the row's logits are there, and the
backward multiplies it by what comes from the loss. Per chunk of rows: one GEMM for the target (its rows are shared
between steps), and per step one for the draft, one pass over the rows, one GEMM per gradient.

| statistic | value | gradient in z_draft, times T |
| --- | --- | --- |
| overlap | alpha = sum_v min(p, q) (arXiv:2606.12370, Eq. 2) | q ([q <= p] - S), S = sum_v [q <= p] q (Eq. 11) |
| kl | D(p||q) | q - p |
| reverse_kl | D(q||p) | q (log(q/p) - D(q||p)) (Eq. 17) |
| log_q | log q(token) | [v = token] - q |
| log_p | log p(token) | none |

On a GPU the rows' pass for the overlap is one Triton kernel (`tv_loss`); everything else is plain torch, anywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vllm_bebop.kernels.vocab_shard import VocabShard

STATISTICS = ("overlap", "kl", "reverse_kl", "log_q", "log_p")

# Logits of one chunk. Plain torch holds about eight fp32 copies of it, Triton the draft's and the target's as they are.
TORCH_CHUNK, TORCH_CHUNK_ON_GPU = 2**24, 2**26
TRITON_CHUNK, TRITON_ROWS = 2**28, 1024  # as many rows at most: few enough, and whole tiles of a GEMM
FILTERED_ROWS = 64  # sorted at a time


def linear_statistics(
    names: Sequence[str],
    draft_hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_index: Tensor,
    token_ids: Tensor,
    lm_head: Tensor,
    *,
    temperature: float = 1.0,
    filter_scores: Callable[[Tensor], Tensor] | None = None,
    vocab_group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The statistics `names` of every row and step, differentiable in draft_hidden (log_p is a constant).

    Args:
        names: of STATISTICS. The overlap is returned in any case, but is differentiable only if named.
        draft_hidden: [num_steps, N, H], what the draft logits are projected from.
        teacher_hidden: [M, H], the same of the target; a constant.
        teacher_index: [num_steps, N] int64, the row of teacher_hidden that each row and step is compared with.
        token_ids: [num_steps, N] int64, the token of log_q and log_p; -1 for none: 0, without a gradient.
        lm_head: [V, H], frozen. Logits are computed in its dtype (fp64, fp32, bf16 or fp16), statistics in fp32, in
            fp64 if it is that. With `vocab_group`, this rank's slice of it: slices follow in the order of ranks.
        temperature: above 0, of draft and target.
        filter_scores: maps the target's scores z / T [rows, V] (all of V) to the same with -inf where p is 0.
        vocab_group: ranks that share the vocabulary. Hidden states are the same on all of them; so are the statistics
            and the gradients, which are reduced over the group.
    Returns:
        Name -> [num_steps, N].
    Raises:
        ValueError: a name is unknown.
    Memory: keeps [len(names), num_steps, N, H] in draft_hidden's dtype; temporaries of one chunk of rows.
    Reference: kernels.loss_reference.statistics_reference
    """
    unknown = set(names) - set(STATISTICS)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}, expected some of {', '.join(STATISTICS)}")
    comparison = _Comparison(
        teacher_hidden.detach(),
        teacher_index,
        token_ids,
        lm_head.detach(),
        temperature,
        filter_scores,
        VocabShard.of(len(lm_head), vocab_group, lm_head.device),
    )
    returned = tuple(name for name in STATISTICS if name in names or name == "overlap")
    differentiable: tuple[str, ...] = ()
    if torch.is_grad_enabled() and draft_hidden.requires_grad:
        differentiable = tuple(name for name in returned if name in names and name != "log_p")
    values = _LinearStatistics.apply(draft_hidden, comparison, returned, differentiable)
    return {
        name: value if name in differentiable else value.detach()
        for name, value in zip(returned, values.unbind(), strict=True)
    }


class _LinearStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft_hidden, comparison, returned, differentiable):
        values, gradients = comparison.evaluate(draft_hidden, returned, differentiable)
        ctx.save_for_backward(gradients)
        ctx.planes = [returned.index(name) for name in differentiable]
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradients,) = ctx.saved_tensors
        total = torch.zeros_like(gradients[0])
        for gradient, plane in zip(gradients, ctx.planes, strict=True):
            # Step by step, and in the wider of both dtypes: upstream may be large where the gradient is small.
            for step in range(len(total)):
                total[step] += gradient[step] * upstream[plane, step, :, None]
        return total, None, None, None


@dataclass(frozen=True)
class _Comparison:
    """Everything that the statistics depend on but the draft's hidden states."""

    teacher_hidden: Tensor
    teacher_index: Tensor
    token_ids: Tensor
    lm_head: Tensor
    temperature: float
    filter_scores: Callable[[Tensor], Tensor] | None
    shard: VocabShard

    def evaluate(
        self, draft_hidden: Tensor, returned: tuple[str, ...], differentiable: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        """Values [returned, num_steps, N] and gradients [differentiable, num_steps, N, H]."""
        num_steps, num_rows, _ = draft_hidden.shape
        dtype = torch.promote_types(self.lm_head.dtype, torch.float32)
        values = draft_hidden.new_empty(len(returned), num_steps, num_rows, dtype=dtype)
        gradients = draft_hidden.new_empty(len(differentiable), *draft_hidden.shape)
        fused = returned == ("overlap",) and can_fuse(self.lm_head)
        compare = self._compare_fused if fused else self._compare
        chunk = self._rows_of_a_chunk(num_rows, fused)
        buffer = self.lm_head.new_empty(chunk, self.shard.size)
        for start in range(0, num_rows, chunk):
            rows = slice(start, start + chunk)
            compare(
                draft_hidden[:, rows],
                self.teacher_index[:, rows],
                self.token_ids[:, rows],
                buffer,
                dict(zip(returned, values[:, :, rows], strict=True)),
                dict(zip(differentiable, gradients[:, :, rows], strict=True)),
            )
        return values, self.shard.sum(gradients)

    def _rows_of_a_chunk(self, num_rows: int, fused: bool) -> int:
        """Chunks of about one size, by the largest slice of the vocabulary: all ranks have to make the same calls."""
        size = max(self.shard.sizes)
        if fused:
            most = min(TRITON_ROWS, TRITON_CHUNK // size)
        else:
            most = (TORCH_CHUNK_ON_GPU if self.lm_head.is_cuda else TORCH_CHUNK) // size
        num_chunks = max(1, -(-num_rows // max(1, most)))
        return max(1, -(-num_rows // num_chunks))

    def _compare(
        self,
        draft_hidden: Tensor,
        teacher_index: Tensor,
        token_ids: Tensor,
        buffer: Tensor,
        values: dict[str, Tensor],
        gradients: dict[str, Tensor],
    ) -> None:
        """One chunk of rows, in plain torch."""
        used, inverse = teacher_index.unique(return_inverse=True)
        log_p = self._log_softmax(self._teacher_logits(used))
        for step, hidden in enumerate(draft_hidden):
            log_q = self._log_softmax(self._project(hidden, buffer))
            pair = _Rows(log_p[inverse[step]], log_q, token_ids[step], self.shard)
            for name, value in values.items():
                value[step] = pair.value(name)
            for name, gradient in gradients.items():
                slope = pair.gradient(name).div_(self.temperature)
                gradient[step] = slope.to(self.lm_head.dtype) @ self.lm_head

    def _compare_fused(
        self,
        draft_hidden: Tensor,
        teacher_index: Tensor,
        _: Tensor,
        buffer: Tensor,
        values: dict[str, Tensor],
        gradients: dict[str, Tensor],
    ) -> None:
        """One chunk of rows, only their overlap, in Triton. The gradient overwrites the draft's logits."""
        from vllm_bebop.kernels.tv_loss import RowPairs, logsumexp

        scale = 1.0 / self.temperature
        used, inverse = teacher_index.unique(return_inverse=True)
        teacher = self._teacher_logits(used)
        teacher_logsumexp = self.shard.logsumexp(logsumexp(teacher, scale))
        for step, hidden in enumerate(draft_hidden):
            draft = self._project(hidden, buffer)
            draft_logsumexp = self.shard.logsumexp(logsumexp(draft, scale))
            pairs = RowPairs(draft, teacher, draft_logsumexp, teacher_logsumexp, scale, inverse[step])
            values["overlap"][step] = pairs.overlap(self.shard, draft if gradients else None)[0]
            for gradient in gradients.values():
                gradient[step] = draft @ self.lm_head

    def _project(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        return torch.mm(hidden.to(self.lm_head.dtype), self.lm_head.T, out=buffer[: len(hidden)])

    def _teacher_logits(self, used: Tensor) -> Tensor:
        """[len(used), size], with -inf where the sampling policy leaves no probability."""
        logits = self.teacher_hidden[used].to(self.lm_head.dtype) @ self.lm_head.T
        if self.filter_scores is not None:
            own = slice(self.shard.start, self.shard.start + self.shard.size)
            for rows in logits.split(FILTERED_ROWS):
                scores = self.filter_scores(_widen(self.shard.gather(rows)) / self.temperature)
                rows.masked_fill_(scores[:, own] == float("-inf"), float("-inf"))
        return logits

    def _log_softmax(self, logits: Tensor) -> Tensor:
        scores = _widen(logits) / self.temperature
        return scores.sub_(self.shard.logsumexp(scores.logsumexp(-1))[:, None])


def can_fuse(lm_head: Tensor) -> bool:
    """Triton compiles for GPUs only."""
    return lm_head.is_cuda and lm_head.dtype != torch.float64


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Rows:
    """Statistics of a chunk of rows of one step, from log p and log q [rows, size]."""

    def __init__(self, log_p: Tensor, log_q: Tensor, token_ids: Tensor, shard: VocabShard) -> None:
        self.log_p, self.log_q, self.shard = log_p, log_q, shard
        self.p, self.q = log_p.exp(), log_q.exp()
        local = token_ids - shard.start
        self.has_token = token_ids >= 0
        self.is_local = self.has_token & (local >= 0) & (local < shard.size)
        self.local_token = torch.where(self.is_local, local, 0)[:, None]

    def value(self, name: str) -> Tensor:
        return getattr(self, f"_{name}")()

    def gradient(self, name: str) -> Tensor:
        """In the draft's scores, [rows, size]; the caller may change it."""
        return getattr(self, f"_{name}_gradient")()

    def _overlap(self) -> Tensor:
        return self.shard.sum(torch.minimum(self.p, self.q).sum(-1)).clamp_(max=1)

    def _overlap_gradient(self) -> Tensor:
        is_below = self.q <= self.p
        below, above = self.shard.sum(torch.stack([(self.q * is_below).sum(-1), (self.q * ~is_below).sum(-1)]))
        return torch.where(is_below, above[:, None], -below[:, None]).mul_(self.q)

    def _kl(self) -> Tensor:
        return self.shard.sum(torch.where(self.p > 0, (self.log_p - self.log_q).mul_(self.p), 0).sum(-1))

    def _kl_gradient(self) -> Tensor:
        return self.q - self.p

    def _log_ratio(self) -> Tensor:
        return torch.where(self.q > 0, self.log_q - self.log_p, 0)

    def _reverse_kl(self) -> Tensor:
        return self.shard.sum(self._log_ratio().mul_(self.q).sum(-1))

    def _reverse_kl_gradient(self) -> Tensor:
        return self._log_ratio().sub_(self._reverse_kl()[:, None]).mul_(self.q)

    def _of_token(self, log_probs: Tensor) -> Tensor:
        return self.shard.sum(torch.where(self.is_local, log_probs.gather(1, self.local_token)[:, 0], 0))

    def _log_q(self) -> Tensor:
        return self._of_token(self.log_q)

    def _log_q_gradient(self) -> Tensor:
        gradient = -self.q * self.has_token[:, None]
        gradient[torch.arange(len(gradient), device=gradient.device), self.local_token[:, 0]] += self.is_local
        return gradient

    def _log_p(self) -> Tensor:
        return self._of_token(self.log_p)
