"""Rows to draw from, and the fused sampler on poisoned scratch."""

import torch
from torch import Tensor

from benchmarks.kernel_races import spoil
from tests.support.kernels import DEVICE, TEMPERATURES


def arguments(batch: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab_size, generator=generator) * 4
    values = {
        "logits": logits.to(dtype),
        "temperature": torch.tensor(TEMPERATURES).repeat(batch)[:batch],
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
        "positions": torch.randint(0, 2**31 - 1, (batch,), generator=generator),
    }
    return {name: value.to(DEVICE) for name, value in values.items()}


def poisoned(batch: int, vocab_size: int):
    """A workspace whose scratch and outputs are NaN or -7."""
    from vllm_bebop.kernels.draft_sampling import SamplingWorkspace

    workspace = SamplingWorkspace(batch, vocab_size, DEVICE)
    spoil(workspace)
    return workspace


def sample(logits, *others, workspace=None, **options):
    from vllm_bebop.kernels.draft_sampling import sample

    return sample(logits, *others, workspace=workspace or poisoned(*logits.shape), **options)
