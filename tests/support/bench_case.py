"""A random case of the kernel benchmarks, on the CPU: theirs draws its drafts with the kernels."""

import torch

from kernel_cases import Case, Point


def make_case(point: Point, q_is_p: bool = False) -> Case:
    generator = torch.Generator().manual_seed(0)
    batch, num_drafts, vocab_size = point
    draft = torch.randn(batch, num_drafts, vocab_size, generator=generator).to(torch.bfloat16)
    other = torch.randn(batch, num_drafts + 1, vocab_size, generator=generator).to(torch.bfloat16)
    if q_is_p:
        other[:, :num_drafts] = draft
    return Case(
        point=point,
        draft_logits=draft,
        target_logits=other.flatten(0, 1),
        temperature=torch.full((batch,), 0.7),
        seeds=torch.arange(batch),
        positions=torch.arange(num_drafts + 1)[:, None].expand(-1, batch).contiguous(),
        draft_tokens=torch.randint(vocab_size, (batch, num_drafts), generator=generator),
    )
