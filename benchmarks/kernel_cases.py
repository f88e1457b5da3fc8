"""Where the sampling kernels are measured, and logits of such a size."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURE = 0.7
BYTES_PER_LOGIT = 2  # bf16


class Point(NamedTuple):
    batch: int
    num_drafts: int
    vocab_size: int

    def floor_bytes(self, part: str) -> int:
        """To read each logit once: those that the "draft" draws from, or the target's, of the "verify"."""
        rows = self.num_drafts + (part == "verify")
        return self.batch * rows * self.vocab_size * BYTES_PER_LOGIT


BATCHES, DRAFTS, VOCAB_SIZES = (1, 8, 32, 64, 128, 256, 512), (1, 3, 5, 7), (32_000, 151_936, 248_320)
TRAFFIC_POINT = Point(batch=64, num_drafts=3, vocab_size=151_936)
# What matters most comes first, and what may be too large last: a run may be cut short.
COMPILED = [Point(64, 3, vocab_size) for vocab_size in (151_936, 32_000, 248_320)]  # torch.compile takes long, per size
QUICK = [*COMPILED, *(Point(batch, 3, 151_936) for batch in (1, 128, 512))]
GRID = [
    *QUICK,
    *(
        point
        for drafts in (3, 1, 5, 7)
        for vocab_size in (151_936, 248_320, 32_000)
        for point in (Point(batch, drafts, vocab_size) for batch in BATCHES)
        if point not in QUICK
    ),
]
DRY_RUN = [Point(3, 2, 700), Point(1, 1, 100)]


@dataclass(frozen=True)
class Case:
    """One drafting and verification step of `batch` requests, up to the drafts."""

    point: Point
    draft_logits: Tensor  # [B, num_drafts, V] bf16
    target_logits: Tensor  # [B * (num_drafts + 1), V] bf16
    temperature: Tensor  # [B] fp32
    seeds: Tensor  # [B] int64
    positions: Tensor  # [num_drafts + 1, B] int64, of every row
    draft_tokens: Tensor  # [B, num_drafts] int64, drawn from q

    def select(self, requests: Tensor) -> "Case":
        """The same step of some of the requests, [n] int64."""
        rows = self.target_logits.view(self.point.batch, -1, self.point.vocab_size)
        return replace(
            self,
            point=self.point._replace(batch=len(requests)),
            draft_logits=self.draft_logits[requests],
            target_logits=rows[requests].flatten(0, 1),
            temperature=self.temperature[requests],
            seeds=self.seeds[requests],
            positions=self.positions[:, requests].contiguous(),
            draft_tokens=self.draft_tokens[requests],
        )


def make_case(point: Point, device: str) -> Case:
    """Logits of p and q whose overlap is about 0.8, with noise of their own in each row, and drafts from q."""
    from vllm_bebop.kernels.draft_sampling import sample

    batch, num_drafts, vocab_size = point
    generator = torch.Generator(device).manual_seed(0)

    def randn(rows: int) -> Tensor:
        return torch.randn(batch, rows, vocab_size, generator=generator, device=device)

    draft_logits = randn(num_drafts).mul_(3).to(torch.bfloat16)
    target_logits = randn(num_drafts + 1).mul_(0.3)
    target_logits[:, :num_drafts] += draft_logits
    target_logits[:, num_drafts] *= 10
    temperature = torch.full((batch,), TEMPERATURE, device=device)
    seeds = torch.arange(batch, device=device)
    positions = 100 + torch.arange(num_drafts + 1, device=device)[:, None].expand(-1, batch).contiguous()
    tokens = [sample(draft_logits[:, i], temperature, seeds, positions[i]).token_ids for i in range(num_drafts)]
    return Case(
        point=point,
        draft_logits=draft_logits,
        target_logits=target_logits.to(torch.bfloat16).flatten(0, 1),
        temperature=temperature,
        seeds=seeds,
        positions=positions,
        draft_tokens=torch.stack(tokens, dim=1),
    )
