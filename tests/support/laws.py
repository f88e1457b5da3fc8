"""The law of an engine's first tokens against the exact law of its target."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support import target
from tests.support.statistics import g_test

_BREADTH = (12, 8, 4)  # cells of the joint law: most likely tokens at each depth; all else is one cell


def sample(llm: Any, prompt: Sequence[int], num_samples: int, first_seed: int, **params: Any) -> list[tuple[int, ...]]:
    """`num_samples` completions of one prompt, four tokens each: one from the prefill, three from verification."""
    from vllm import SamplingParams

    requests = [
        SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "seed": first_seed + i, "detokenize": False} | params)
        for i in range(num_samples)
    ]
    outputs = llm.generate([{"prompt_token_ids": list(prompt)}] * num_samples, requests, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def p_values(
    samples: list[tuple[int, ...]], model: str | Path, prompt: Sequence[int], **policy: Any
) -> dict[str, float]:
    """P-values of: the first token; the second and third given the likeliest token before; the first three jointly."""

    def law(*prefixes: tuple[int, ...]) -> torch.Tensor:
        logits = target.next_logits(model, [[*prompt, *prefix] for prefix in prefixes])
        return target.filtered(logits, **policy)

    results, condition = {}, ()
    for name in ("token 1", "token 2 | 1", "token 3 | 1, 2"):
        probabilities = law(condition)[0]
        position = len(condition)
        drawn = [s[position] for s in samples if s[:position] == condition]
        results[name] = g_test(torch.bincount(torch.tensor(drawn), minlength=len(probabilities)), probabilities)
        condition = (*condition, int(probabilities.argmax()))

    cells: dict[tuple[int, ...], float] = {(): 1.0}
    for breadth in _BREADTH:
        laws = law(*cells)
        cells = {
            (*prefix, int(token)): mass * float(row[token])
            for (prefix, mass), row in zip(cells.items(), laws, strict=True)
            for token in row.topk(breadth).indices
            if row[token] > 0
        }
    counts = Counter(s[:3] for s in samples)
    observed = [counts[cell] for cell in cells]
    expected = list(cells.values())
    results["tokens 1 to 3"] = g_test(
        [*observed, len(samples) - sum(observed)], [*expected, max(0.0, 1.0 - sum(expected))]
    )
    return results
