"""The exact law of the target, computed by Transformers from the weights that vLLM serves."""

from functools import cache
from pathlib import Path

import torch


@cache
def load(model: str | Path) -> torch.nn.Module:
    """The target in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.inference_mode()
def next_logits(model: str | Path, prefixes: list[list[int]]) -> torch.Tensor:
    """Logits of the token after each prefix. Prefixes of one length; returns [len(prefixes), vocab_size] fp32."""
    return load(model)(torch.tensor(prefixes)).logits[:, -1].float()


@torch.inference_mode()
def all_logits(model: str | Path, tokens: list[int]) -> torch.Tensor:
    """Logits at every position of one text: row i decides token i + 1. [len(tokens), vocab_size] fp32."""
    return load(model)(torch.tensor([tokens])).logits[0].float()


def filtered(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    allowed: list[int] | None = None,
) -> torch.Tensor:
    """Probabilities of the allowed tokens after temperature, top-k and top-p, in fp64: [..., vocab_size].

    Written from the definition.
    """
    scores = logits.double() / temperature
    if allowed is not None:
        scores = torch.full_like(scores, float("-inf")).index_copy(-1, torch.tensor(allowed), scores[..., allowed])
    if top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    probabilities = scores.softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # the smallest set whose mass reaches top_p stays
    probabilities = probabilities.scatter(-1, ids, ordered.masked_fill(outside, 0.0))
    return probabilities / probabilities.sum(-1, keepdim=True)
