"""What a draft cache of candidates saves and costs: `python benchmarks/bench_candidates.py`, anywhere, in a minute.

Rows of 151,936 logits with target entropies from 0.2 to 3 nats: Gaussian logits, scaled to the entropy; the draft's are
the target's with noise, scaled to an overlap of 0.8. In a second set the likely tokens stand close together, as the
common ones do at the low end of a BPE vocabulary. Acceptance is exact: sum min(p, q), with q full and with q restricted
to its candidates.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from result_file import ROOT, conditions
from vllm_bebop.durable import write_json
from vllm_bebop.kernels.candidates import (
    GROUP,
    NUM_KEPT,
    expand_candidates,
    find_candidates_reference,
    num_candidates,
)

RESULT = Path(__file__).parent / "results" / "candidates.json"
VOCAB_SIZE, NUM_ROWS, OVERLAP = 151_936, 64, 0.8
ENTROPIES = (0.2, 0.5, 1.0, 2.0, 3.0)
LIKELY, STRETCH = 4_096, 16_384  # in the second set, where the likeliest tokens stand: among the first ids


def scale_to(goal: float, measure: Any, low: float, high: float) -> float:
    """The scale at which `measure`, falling or rising in it, reaches `goal`."""
    rising = measure(high) > measure(low)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if (measure(middle) < goal) == rising else (low, middle)
    return (low + high) / 2


def entropy(logits: Tensor) -> float:
    log_p = logits.log_softmax(1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


def overlap(target: Tensor, draft: Tensor) -> Tensor:
    """[N]: sum_v min(p, q)."""
    return torch.minimum(target.softmax(1), draft.softmax(1)).sum(1)


def crowd(rows: Tensor, generator: torch.Generator) -> Tensor:
    """The ids of the LIKELY likeliest tokens of each row exchanged for ids below STRETCH."""
    moved = rows.clone()
    for row in moved:
        likely = row.topk(LIKELY).indices
        places = torch.randperm(STRETCH, generator=generator)[:LIKELY]
        row[likely], row[places] = row[places].clone(), row[likely].clone()
    return moved


def main() -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    noise, other = (torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator) for _ in range(2))
    results = []
    for nats in ENTROPIES:
        scale = scale_to(nats, lambda s: entropy(noise * s), 1.0, 40.0)
        spread = noise * scale
        for name, target in (
            ("spread over the vocabulary", spread),
            ("crowded at its start", crowd(spread, generator)),
        ):
            distance = scale_to(OVERLAP, lambda s, t=target: float(overlap(t, t + s * other).mean()), 0.0, 5.0)
            draft = (target + distance * other).to(torch.bfloat16)
            found = find_candidates_reference(draft)
            full = overlap(target, draft.float())
            kept = overlap(target, expand_candidates(found.ids, found.logits, VOCAB_SIZE).float())
            results.append(
                {
                    "entropy_nats": nats,
                    "likely_tokens": name,
                    "acceptance_full": round(float(full.mean()), 4),
                    "acceptance_candidates": round(float(kept.mean()), 4),
                }
            )
            print(results[-1], flush=True)
    full_bytes, candidate_bytes = VOCAB_SIZE * 2, num_candidates(VOCAB_SIZE) * (2 + 4)
    result = {
        "case": {"vocab_size": VOCAB_SIZE, "rows": NUM_ROWS, "group": GROUP, "kept": NUM_KEPT, "dtype": "bfloat16"},
        "bytes_per_draft_full": full_bytes,
        "bytes_per_draft_candidates": candidate_bytes,
        "results": results,
        "conditions": conditions(("torch",), [ROOT / "kernels" / "candidates.py", Path(__file__)]),
        "notes": ["Synthetic rows, see the script; acceptance is the exact expectation, not a count."],
        "command": "python benchmarks/bench_candidates.py",
    }
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
