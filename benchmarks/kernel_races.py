"""Looks for races on a GPU: the same step, over and over in CUDA graphs, must give the same bits every time.

The sampler and every form of the verifier are compared with their own first results, all numbers bit for bit, and those
of one and two launches with each other, token for token. Requests are mixed: none to three drafts, greedy and sampled,
some one-hot, so that tiles exit early.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

BATCH, NUM_DRAFTS = 64, 3
VOCAB_SIZES = (20_000, 151_936)
CHUNK = 1000  # replays queued at once
TWO_LAUNCHES, SINGLE_LAUNCH = "verify, two launches", "verify, single launch"


def mixed_step(vocab_size: int, device: str) -> dict[str, Callable[[], Any]]:
    """The launches to repeat, each returning its result."""
    from vllm_bebop.kernels.draft_sampling import SamplingWorkspace, sample
    from vllm_bebop.kernels.filters import Filters
    from vllm_bebop.kernels.verification import VerificationWorkspace, verify

    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, vocab_size, generator=generator, device=device)

    requests = torch.arange(BATCH, device=device)
    draft = randn(BATCH, NUM_DRAFTS).mul_(3).to(torch.bfloat16)
    target = torch.cat([draft.float(), 3 * randn(BATCH, 1)], dim=1) + 0.7 * randn(BATCH, NUM_DRAFTS + 1)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3], device=device)[requests // 2 % 4].contiguous()
    positions = torch.full_like(requests, 100)
    logsumexp = torch.empty(BATCH, NUM_DRAFTS, device=device)
    argmax = torch.empty(BATCH, NUM_DRAFTS, dtype=torch.int64, device=device)
    sampling = SamplingWorkspace(BATCH, vocab_size, device)
    verifying = VerificationWorkspace(BATCH, NUM_DRAFTS, vocab_size, device, with_draft_statistics=False)

    def draft_step(i: int) -> Any:
        return sample(
            draft[:, i],
            temperature,
            requests,
            positions + i,
            cache_logsumexp=logsumexp,
            cache_argmax=argmax,
            step=torch.tensor(i, device=device),
            workspace=sampling,
        )

    tokens = torch.stack([draft_step(i).token_ids.clone() for i in range(NUM_DRAFTS)], dim=1)
    arguments = (target.to(torch.bfloat16).flatten(0, 1), tokens, draft, requests % (NUM_DRAFTS + 1))
    options = {
        "first_rows": requests * (NUM_DRAFTS + 1),
        "one_hot": requests % 5 == 0,
        "draft_logsumexp": logsumexp,
        "draft_argmax": argmax,
        "workspace": verifying,
    }

    filters = Filters(top_k=requests.int() % 3 * 20, top_p=1 - 0.05 * (requests % 4).float())  # 0 and 1: none

    def verification(**form: Any) -> Any:
        return verify(*arguments, temperature, requests, positions, **options, **form)

    return {
        "draft": lambda: sample(draft[:, 0], temperature, requests, positions, workspace=sampling),
        TWO_LAUNCHES: verification,
        SINGLE_LAUNCH: lambda: verification(single_launch=True),
        "verify, block": lambda: verification(block=True),
        "verify, filters": lambda: verification(filters=filters),
    }


def as_integers(result: Any) -> Tensor:
    """Every field of a result, floats by their bits (NaN as one of them), in one int64 tensor."""
    fields = [getattr(result, field.name) for field in dataclasses.fields(result)]
    return torch.cat(
        [(x.nan_to_num(nan=-1.0).view(torch.int32) if x.is_floating_point() else x).flatten().long() for x in fields]
    )


def count_mismatches(run: Callable[[], Tensor], expected: Tensor, repeats: int, name: str) -> int:
    """Elements that differed from `expected` in any of the repeats."""
    mismatches = torch.zeros((), dtype=torch.int64, device=expected.device)

    def compare() -> None:
        mismatches.add_((run() != expected).sum())

    compare()  # compiles
    if expected.is_cuda:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compare()
        compare = graph.replay
    for start in tqdm(range(0, repeats, CHUNK), desc=name, unit_scale=CHUNK, disable=None):
        for _ in range(min(CHUNK, repeats - start)):
            compare()
        mismatches.item()  # waits, so that the queue stays short
    return int(mismatches)


def races(vocab_size: int, device: str, repeats: int) -> dict[str, int]:
    """Mismatches by what was repeated, and between the two forms of the verifier."""
    runs = mixed_step(vocab_size, device)
    two, single = runs[TWO_LAUNCHES](), runs[SINGLE_LAUNCH]()
    mismatches = {f"{SINGLE_LAUNCH} against two, tokens": int((two.token_ids != single.token_ids).sum())}
    for name, run in runs.items():

        def bits(run: Callable[[], Any] = run) -> Tensor:
            return as_integers(run())

        mismatches[name] = count_mismatches(bits, bits(), repeats, f"V={vocab_size}: {name}")
    return mismatches
