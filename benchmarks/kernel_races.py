"""Looks for races on a GPU: the same step, over and over in CUDA graphs, must give the same bits every time.

Before each repeat the scratch is filled with NaN or -7, and so are the outputs after it: a program that reads what
another has not written yet would otherwise find the right number there, left by the repeat before. Every repeat of the
sampler and of each form of the verifier is compared with the first, all numbers bit for bit; the tokens of one launch
with those of two. Requests are mixed: none to three drafts, greedy and sampled, some one-hot, so that programs exit
early; some rows hold NaN or huge numbers, which take a second pass. Without thinning every rejected request that is
sampled draws from its residual.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

BATCH, NUM_DRAFTS = 64, 3
VOCAB_SIZES = (151_936, 20_000)
CHUNK = 1000  # replays queued at once
DRAFT, TWO_LAUNCHES, SINGLE_LAUNCH = "draft", "verify, two launches", "verify, single launch"
BLOCK, FILTERS, WITHOUT_THINNING = "verify, block", "verify, filters", "verify, without thinning"
RUNS = DRAFT, TWO_LAUNCHES, SINGLE_LAUNCH, BLOCK, FILTERS, WITHOUT_THINNING
# Of a workspace. They carry over from launch to launch, by design.
COUNTERS = ("tickets", "row_tickets", "request_tickets", "first_rejected")


def mixed_step(vocab_size: int, device: str) -> tuple[dict[str, Callable[[], Any]], list[Any]]:
    """The launches to repeat, each returning its result, and the workspaces that they use."""
    from vllm_bebop.kernels import reference
    from vllm_bebop.kernels.draft_sampling import SamplingWorkspace, sample
    from vllm_bebop.kernels.filters import Filters
    from vllm_bebop.kernels.tally import TOTALS
    from vllm_bebop.kernels.verification import VerificationWorkspace, verify

    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, vocab_size, generator=generator, device=device)

    requests = torch.arange(BATCH, device=device)
    draft = randn(BATCH, NUM_DRAFTS).mul_(3).to(torch.bfloat16)
    target = torch.cat([draft.float(), 3 * randn(BATCH, 1)], dim=1) + 0.7 * randn(BATCH, NUM_DRAFTS + 1)
    for logits in (draft, target):
        logits[5::16, :, vocab_size // 2 :: 7], logits[6::16, :, vocab_size // 3] = float("nan"), 3e30
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

    def drafting() -> Any:
        cache, first = torch.empty_like(draft[:, :1]), torch.zeros((), dtype=torch.int64, device=device)
        out = sample(draft[:, 0], temperature, requests, positions, cache=cache, step=first, workspace=sampling)
        return SimpleNamespace(**vars(out), cache=cache)

    def verification(thinning_rounds: int = reference.NUM_THINNING_ROUNDS, **form: Any) -> Any:
        totals = torch.zeros(len(TOTALS), NUM_DRAFTS + 1, dtype=torch.float64, device=device)
        with mock.patch.object(reference, "NUM_THINNING_ROUNDS", thinning_rounds):
            out = verify(*arguments, temperature, requests, positions, **options, totals=totals, **form)
        return SimpleNamespace(**vars(out), totals=totals)

    runs = {
        DRAFT: drafting,
        TWO_LAUNCHES: verification,
        SINGLE_LAUNCH: lambda: verification(single_launch=True),
        BLOCK: lambda: verification(block=True),
        FILTERS: lambda: verification(filters=filters),
        WITHOUT_THINNING: lambda: verification(thinning_rounds=0),
    }
    return runs, [sampling, verifying]


def run_once(vocab_size_and_name: tuple[int, str]) -> None:
    """Compiles what is to be repeated."""
    vocab_size, name = vocab_size_and_name
    mixed_step(vocab_size, "cuda")[0][name]()


def spoil(tensors: Any) -> None:
    """Fills a workspace's scratch, or a result, with NaN or -7."""
    for name, value in vars(tensors).items():
        if isinstance(value, Tensor) and name not in COUNTERS:
            value.fill_(float("nan") if value.is_floating_point() else -7)


def on_spoiled_scratch(run: Callable[[], Any], workspaces: list[Any]) -> Callable[[], Tensor]:
    """Returns run() as integers; nothing that an earlier call left in scratch or outputs can pass for its own."""

    def bits() -> Tensor:
        for workspace in workspaces:
            spoil(workspace)
        result = run()
        integers = as_integers(result)
        spoil(result)  # in a graph the next replay's outputs have the same addresses
        return integers

    return bits


def as_integers(result: Any) -> Tensor:
    """Every tensor of a result, floats by their bits (NaN as one of them), in one int64 tensor."""
    return torch.cat(
        [
            (x.nan_to_num(nan=-1.0).view(torch.int32) if x.is_floating_point() else x).flatten().long()
            for x in vars(result).values()
        ]
    )


def count_mismatches(run: Callable[[], Tensor], expected: Tensor, repeats: int, name: str = "") -> int:
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
    """Mismatches by what was repeated."""
    runs, workspaces = mixed_step(vocab_size, device)
    of_two_launches = runs[TWO_LAUNCHES]()
    mismatches = {}
    for name, run in runs.items():
        expected = run()
        if name == SINGLE_LAUNCH:
            tokens = {field: getattr(of_two_launches, field) for field in ("token_ids", "num_accepted")}
            expected = SimpleNamespace(**vars(expected) | tokens)
        bits = on_spoiled_scratch(run, workspaces)
        mismatches[name] = count_mismatches(bits, as_integers(expected), repeats, f"V={vocab_size}: {name}")
    return mismatches
