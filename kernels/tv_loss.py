"""Total variation between draft and target from raw logits, in Triton: no softmax is ever stored.

p = softmax(z_target / T) and q = softmax(z_draft / T) of a row are formed tile by tile from the cached logsumexps:

    forward    overlap = sum_v min(p, q)        S = sum_v [q <= p] q        TV = 1 - overlap
    backward   d overlap / dz_draft = q ([q <= p] - S) / T

(arXiv:2606.12370, Eqs. 10 and 11, appendix F). With `<=`, q = p gives S = 1 and a zero gradient, here exactly 0:
1 - S is summed on its own, as sum_v [q > p] q, and both logsumexps come from one kernel, so that the same instructions
make them equal to the last bit where the logits are. S on its own keeps its precision where the overlap is tiny.

One program per row, whose tiles it walks. -inf reads as probability 0; NaN and +inf make the row's result NaN, which a
training loop should see.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vllm_bebop.kernels.arguments import check_rows
from vllm_bebop.kernels.launch import compile_options
from vllm_bebop.kernels.vocab_shard import VocabShard

BLOCK = 4096  # logits of one tile
NUM_WARPS = 8

NEG_INF = tl.constexpr(float("-inf"))


def tv_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    *,
    temperature: float = 1.0,
    vocab_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Total variation distance per token: the chance that its draft is rejected (arXiv:2606.12370, Eq. 10).

    Args:
        draft_logits: [num_tokens, V] fp32, bf16 or fp16; unit stride inside a row. Differentiable.
        target_logits: same shape, any of these dtypes; a constant. -inf where a sampling policy leaves no probability.
        temperature: above 0, of both.
        vocab_group: ranks that each hold a slice of the vocabulary, [num_tokens, V / ranks]. All get the whole
            distance, and each the gradient of its slice. Max, sum, overlap and S are reduced.
    Returns:
        [num_tokens] fp32 in [0, 1].
    Raises:
        ValueError: a shape, dtype, stride or device is wrong, or the temperature; the message names the argument.
    Memory: keeps both arguments and 4 fp32 per row; the backward writes one [num_tokens, V] gradient.
    Reference: kernels.loss_reference.tv_loss_reference
    """
    check_rows("draft_logits", draft_logits, (None, None), draft_logits.device)
    check_rows("target_logits", target_logits, tuple(draft_logits.shape), draft_logits.device)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    return 1 - _Overlap.apply(draft_logits, target_logits.detach(), 1.0 / temperature, vocab_group)


def logsumexp(logits: Tensor, inverse_temperature: float) -> Tensor:
    """[rows] fp32: logsumexp of logits / T, -inf for a row without a logit above that."""
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _logsumexp_kernel[(len(logits),)](
            logits,
            logits.stride(0),
            out,
            inverse_temperature,
            logits.shape[1],
            BLOCK=tile_size(logits.shape[1]),
            **compile_options(NUM_WARPS),
        )
    return out


@dataclass(frozen=True)
class RowPairs:
    """Rows of the draft's logits, and the target's rows that they are compared with."""

    draft_logits: Tensor  # [rows, V]
    target_logits: Tensor  # [target rows, V]
    draft_logsumexp: Tensor  # [rows] fp32, of logits / T of the whole vocabulary
    target_logsumexp: Tensor  # [target rows] fp32
    inverse_temperature: float
    target_index: Tensor | None = None  # [rows] int64, each row's target row; None: the same

    def overlap(self, shard: VocabShard, gradient: Tensor | None = None) -> Tensor:
        """Overlap, S and 1 - S of every row, [3, rows] fp32.

        Args:
            gradient: [rows, V], receives d overlap / dz_draft in its dtype. May be draft_logits itself.
        """
        sums = torch.empty(3, len(self.draft_logits), dtype=torch.float32, device=self.draft_logits.device)
        # One launch does both unless something has to be reduced in between.
        at_once = gradient if shard.group is None else None
        self._launch(sums, gradient=at_once, computes_sums=True)
        shard.sum(sums)
        if gradient is not at_once:
            self._launch(sums, gradient=gradient)
        sums[0].clamp_(max=1)
        return sums

    def write_gradient(self, sums: Tensor, upstream: Tensor, gradient: Tensor) -> None:
        """gradient [rows, V] = upstream [rows] times d overlap / dz_draft, from the sums that `overlap` returned."""
        self._launch(sums, gradient=gradient, upstream=upstream)

    def _launch(
        self,
        sums: Tensor,
        *,
        gradient: Tensor | None,
        upstream: Tensor | None = None,
        computes_sums: bool = False,
    ) -> None:
        num_rows, vocab_size = self.draft_logits.shape
        if num_rows == 0:
            return
        _overlap_kernel[(num_rows,)](
            self.draft_logits,
            self.draft_logits.stride(0),
            self.target_logits,
            self.target_logits.stride(0),
            self.target_index,
            self.draft_logsumexp,
            self.target_logsumexp,
            sums,
            upstream,
            gradient,
            0 if gradient is None else gradient.stride(0),
            self.inverse_temperature,
            num_rows,
            vocab_size,
            COMPUTES_SUMS=computes_sums,
            BLOCK=tile_size(vocab_size),
            **compile_options(NUM_WARPS),
        )


def tile_size(vocab_size: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocab_size))


class _Overlap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, draft_logits, target_logits, inverse_temperature, group):
        shard = VocabShard.of(draft_logits.shape[1], group, draft_logits.device)
        draft_logsumexp = shard.logsumexp(logsumexp(draft_logits, inverse_temperature))
        target_logsumexp = shard.logsumexp(logsumexp(target_logits, inverse_temperature))
        pairs = RowPairs(draft_logits, target_logits, draft_logsumexp, target_logsumexp, inverse_temperature)
        sums = pairs.overlap(shard)
        ctx.save_for_backward(sums, draft_logits, target_logits, draft_logsumexp, target_logsumexp)
        ctx.inverse_temperature = inverse_temperature
        return sums[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        sums, draft_logits, target_logits, draft_logsumexp, target_logsumexp = ctx.saved_tensors
        pairs = RowPairs(draft_logits, target_logits, draft_logsumexp, target_logsumexp, ctx.inverse_temperature)
        gradient = torch.empty(draft_logits.shape, dtype=draft_logits.dtype, device=draft_logits.device)
        pairs.write_gradient(sums, upstream.contiguous(), gradient)
        return gradient, None, None, None


# --- Device functions -----------------------------------------------------------------------------------------------


@triton.jit
def finite(x):
    """0 for -inf, as the number to subtract: -inf - (-inf) would be NaN."""
    return tl.where(x == NEG_INF, 0.0, x)


@triton.jit
def load_scores(row, ids, inverse_temperature, vocab_size):
    """fp32 logits / T of one row; -inf past the vocabulary."""
    return tl.load(row + ids, mask=ids < vocab_size, other=NEG_INF).to(tl.float32) * inverse_temperature


@triton.jit
def _logsumexp_kernel(logits_ptr, logits_stride, out_ptr, inverse_temperature, vocab_size, BLOCK: tl.constexpr):
    """Grid (rows). Every lane keeps a running maximum and sum of its own; they meet once, at the end."""
    index = tl.program_id(0).to(tl.int64)
    row = logits_ptr + index * logits_stride
    largest = tl.full([BLOCK], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        scores = load_scores(row, start + tl.arange(0, BLOCK), inverse_temperature, vocab_size)
        new = tl.maximum(largest, scores)
        base = finite(new)
        total = total * tl.exp(largest - base) + tl.exp(scores - base)
        largest = new
    top = finite(tl.max(largest, axis=0))
    tl.store(out_ptr + index, top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0)))


@triton.jit
def _overlap_kernel(
    draft_ptr,
    draft_stride,
    target_ptr,
    target_stride,
    target_index_ptr,
    draft_logsumexp_ptr,
    target_logsumexp_ptr,
    sums_ptr,
    upstream_ptr,
    gradient_ptr,
    gradient_stride,
    inverse_temperature,
    num_rows,
    vocab_size,
    COMPUTES_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows). COMPUTES_SUMS stores overlap, S and 1 - S [3, rows]; otherwise they are read.

    With gradient_ptr a second walk over the row, which the cache still holds in part, writes the gradient. It may be
    draft_ptr: each tile is read before it is written, by the same program.
    """
    index = tl.program_id(0).to(tl.int64)
    target_row = index
    if target_index_ptr is not None:
        target_row = tl.load(target_index_ptr + index)
    draft = draft_ptr + index * draft_stride
    target = target_ptr + target_row * target_stride
    draft_logsumexp = finite(tl.load(draft_logsumexp_ptr + index))
    target_logsumexp = finite(tl.load(target_logsumexp_ptr + target_row))

    if COMPUTES_SUMS:
        overlaps = tl.zeros([BLOCK], tl.float32)
        belows = tl.zeros([BLOCK], tl.float32)
        aboves = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            q = tl.exp(load_scores(draft, ids, inverse_temperature, vocab_size) - draft_logsumexp)
            p = tl.exp(load_scores(target, ids, inverse_temperature, vocab_size) - target_logsumexp)
            overlaps += tl.where(q <= p, q, p)
            belows += tl.where(q <= p, q, 0.0)
            aboves += tl.where(q <= p, 0.0, q)
        below = tl.sum(belows, axis=0)
        above = tl.sum(aboves, axis=0)
        # Where q is NaN, `q <= p` has chosen p; the difference is 0, or NaN as the row's logsumexp.
        tl.store(sums_ptr + index, tl.sum(overlaps, axis=0) + (draft_logsumexp - draft_logsumexp))
        tl.store(sums_ptr + num_rows + index, below)
        tl.store(sums_ptr + 2 * num_rows + index, above)
    else:
        below = tl.load(sums_ptr + num_rows + index)
        above = tl.load(sums_ptr + 2 * num_rows + index)

    if gradient_ptr is not None:
        gradient = gradient_ptr + index * gradient_stride
        scale = inverse_temperature
        if upstream_ptr is not None:
            scale *= tl.load(upstream_ptr + index)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            q = tl.exp(load_scores(draft, ids, inverse_temperature, vocab_size) - draft_logsumexp)
            p = tl.exp(load_scores(target, ids, inverse_temperature, vocab_size) - target_logsumexp)
            slope = scale * q * tl.where(q <= p, above, -below)
            tl.store(gradient + ids, slope.to(gradient_ptr.dtype.element_ty), mask=ids < vocab_size)
