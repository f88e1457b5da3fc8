"""What the loss costs: `python benchmarks/bench_loss.py memory` anywhere, `... time` on a GPU.

Both run forward and backward of the end-to-end TV loss from hidden states to their gradient, ours against plain torch
that stores logits and probabilities, as a careful user would write it (`plain_loss`).

memory: peak resident memory on the CPU above what the process held before the call, each run in a process of its own.
The plain version does not fit most machines at the size asked for: it is measured at smaller ones, where it must come
out linear in the number of tokens, and extrapolated. Ours is measured at the size asked for.

time: milliseconds and peak memory on a GPU, bf16, against plain torch, torch.compile, and the kernels of Liger and
speculators where they are installed; both of those take stored logits (or probabilities), whose GEMMs are timed too.
Ours is not timed unless loss and gradient equal the reference's. What fails is recorded, and the rest is measured all
the same. Saved after every measurement in loss_DEVICE.json, from which a second run goes on if it finds it in `--out`.
`--quick` takes the first size, `--minutes` stops in time, `--dry-run` runs every line on the CPU at a tiny size, in
Triton's interpreter.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lost_gpu import LostGpu, raise_if_lost, start_again
from result_file import RESULTS, ROOT, Entry, ResultFile, conditions
from vllm_bebop.bench.conditions import device_slug
from vllm_bebop.durable import write_json

LOSS, OURS, OURS_IN_TORCH = "e2e_tv", "ours, fused", "ours, chunked torch"

MEMORY_TOKENS, MEMORY_HIDDEN, MEMORY_VOCAB, MEMORY_STEPS = 4096, 256, 151_936, 3
PLAIN_TOKENS = (128, 256, 512)
TIME_TOKENS = 8192
# The size that the goal is about comes first: a run may be cut short.
TIME_SIZES = [(hidden, vocab, steps) for vocab in (151_936, 248_320) for hidden in (4096, 2048) for steps in (3, 5)]
GOAL = {"hidden": 4096, "vocab_size": 151_936, "num_steps": 3, "median_ms": 130, "peak_gb": 1.5}
GATE_TOKENS = 256
REPEATS, LEAST_REPEATS, LONGEST_S = 20, 5, 10.0  # of one measurement
SAME_LOSS = 1e-3  # losses further apart than this are not the same function
KEY = ("name", "hidden", "vocab_size", "num_steps")
PACKAGES = ("torch", "triton", "liger-kernel", "speculators")
NOTES = [
    "Forward and backward from hidden states to their gradient, 5 to 20 repeats, wall clock between two"
    " synchronisations. peak_gb: largest allocation above the arguments. loss: its value; is_same_loss: within 1e-3 of"
    " ours, else this is the time of another function.",
    "gemm_tflop_s: (1 + 2 num_steps) products of tokens x hidden x vocabulary, the least needed, per second.",
    "plain torch, torch.compile, speculators and Liger store logits (Liger probabilities) of all rows. Liger's kernel"
    " returns only the mean TV of a step; the product over the steps is missing from its numbers.",
]


def make_case(num_tokens: int, hidden: int, vocab_size: int, num_steps: int, dtype: Any, device: str) -> dict[str, Any]:
    """Arguments of head_loss for `num_tokens` consecutive tokens, all of them rows; the overlap is near 0.8."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    teacher = randn(num_tokens + num_steps, hidden)
    index = torch.arange(num_tokens, device=device) + torch.arange(num_steps, device=device)[:, None] + 1
    draft = randn(num_steps, num_tokens, hidden).mul_(0.15).add_(teacher[index])
    return {
        "draft_hidden": draft.requires_grad_(),
        "teacher_hidden": teacher,
        "teacher_index": index,
        "token_ids": torch.zeros_like(index),
        "lm_head": randn(vocab_size, hidden).mul_(3 / hidden**0.5),
    }


def our_loss(case: dict[str, Any]) -> Any:
    from vllm_bebop.train.losses import SamplingPolicy, head_loss

    return head_loss(LOSS, **case, policy=SamplingPolicy()).loss


def plain_loss(case: dict[str, Any]) -> Any:
    """Stored logits. p is projected and normalised once per token, and q is kept in fp32, as its softmax needs it."""
    import torch

    with torch.no_grad():
        p = (case["teacher_hidden"] @ case["lm_head"].T).softmax(-1, dtype=torch.float32)
    survival, accepted = 1.0, 0.0
    for hidden, index in zip(case["draft_hidden"], case["teacher_index"], strict=True):
        q = (hidden @ case["lm_head"].T).softmax(-1, dtype=torch.float32)
        survival = survival * torch.minimum(p[index], q).sum(-1)
        accepted = accepted + survival
    return 1 - accepted.mean() / len(case["draft_hidden"])


def measured_with() -> Entry:
    sources = [*(ROOT / "kernels").glob("*.py"), ROOT / "vllm_bebop" / "train" / "losses.py", Path(__file__)]
    return conditions(PACKAGES, sources)


# --- memory ---------------------------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(variant: str, num_tokens: int) -> None:
    """Prints one JSON line: peak resident bytes of forward and backward above those held before."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run = {"ours": our_loss, "plain": plain_loss}[variant]
    # A tiny call first: what libraries load and keep on first use is not the loss's.
    run(make_case(4, 8, 16, MEMORY_STEPS, torch.float32, "cpu")).backward()
    case = make_case(num_tokens, MEMORY_HIDDEN, MEMORY_VOCAB, MEMORY_STEPS, torch.float32, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    loss = run(case)
    loss.backward()
    peak = status_bytes("VmHWM") - before
    gradient = case["draft_hidden"].grad.double().norm().item()
    print(json.dumps({"peak_bytes": peak, "loss": loss.item(), "gradient_norm": gradient}))


def memory() -> None:
    def run(variant: str, num_tokens: int) -> dict[str, Any]:
        command = [sys.executable, __file__, "measure", variant, str(num_tokens)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = {"tokens": num_tokens, **json.loads(child.stdout)}
        print(f"{variant:6} {result}", flush=True)
        return result

    plain = [run("plain", num_tokens) for num_tokens in PLAIN_TOKENS]
    ours = [run("ours", num_tokens) for num_tokens in (*PLAIN_TOKENS, MEMORY_TOKENS)]
    for x, y in zip(plain, ours, strict=False):
        assert abs(x["loss"] - y["loss"]) < 1e-5, "the gate is red: the losses differ"
        assert abs(x["gradient_norm"] / y["gradient_norm"] - 1) < 1e-3, "the gate is red: the gradients differ"
    # Bytes per token from the last two sizes; what does not grow with them is left out, in the plain version's favour.
    per_token = (plain[-1]["peak_bytes"] - plain[-2]["peak_bytes"]) / (PLAIN_TOKENS[-1] - PLAIN_TOKENS[-2])
    earlier = (plain[-2]["peak_bytes"] - plain[-3]["peak_bytes"]) / (PLAIN_TOKENS[-2] - PLAIN_TOKENS[-3])
    plain_peak = round(per_token * MEMORY_TOKENS)
    result = {
        "case": {
            "loss": LOSS,
            "tokens": MEMORY_TOKENS,
            "hidden": MEMORY_HIDDEN,
            "vocab_size": MEMORY_VOCAB,
            "num_steps": MEMORY_STEPS,
            "dtype": "float32",
        },
        "ours_peak_bytes": ours[-1]["peak_bytes"],
        "plain_peak_bytes_extrapolated": plain_peak,
        "ratio": round(ours[-1]["peak_bytes"] / plain_peak, 4),
        "plain_bytes_per_token": {
            "between the last two sizes": round(per_token),
            "between the first two": round(earlier),
        },
        "plain_measured": plain,
        "ours_measured": ours,
        "notes": [
            "Peak resident memory of forward and backward above that before the call, arguments excluded; one process"
            " per measurement, its peak counter reset before the call.",
            f"The plain version was measured at {', '.join(map(str, PLAIN_TOKENS))} tokens and extrapolated to"
            f" {MEMORY_TOKENS} by its bytes per token; ours was measured at all of these sizes.",
        ],
        "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "command": "python benchmarks/bench_loss.py memory",
        "conditions": measured_with(),
    }
    write_json(RESULTS / "loss_memory_cpu.json", result)
    print(f"ours {ours[-1]['peak_bytes'] / 1e9:.2f} GB, plain {plain_peak / 1e9:.2f} GB, ratio {result['ratio']}")
    assert result["ratio"] < 0.1, "ours needs more than a tenth of the plain version's memory"


# --- time -----------------------------------------------------------------------------------------------------------


def speculators_loss(case: dict[str, Any]) -> Any:
    """Their TV kernel on stored bf16 logits, chained over the steps."""
    import torch
    from speculators.losses.fused import fused_tv_loss

    with torch.no_grad():
        target = case["teacher_hidden"] @ case["lm_head"].T
    survival, accepted = 1.0, 0.0
    for hidden, index in zip(case["draft_hidden"], case["teacher_index"], strict=True):
        draft = hidden @ case["lm_head"].T
        survival = survival * (1 - fused_tv_loss(draft[None], target[index][None])[0])
        accepted = accepted + survival
    return 1 - accepted.mean() / len(case["draft_hidden"])


def liger_loss(case: dict[str, Any]) -> Any:
    """Their TV kernel takes probabilities and returns only the mean: the plain TV loss, no product over the steps."""
    import torch
    from liger_kernel.transformers.tvd import LigerTVDLoss

    distance = LigerTVDLoss(reduction="batchmean")
    with torch.no_grad():
        p = (case["teacher_hidden"] @ case["lm_head"].T).softmax(-1, dtype=torch.float32)
    total = 0.0
    for hidden, index in zip(case["draft_hidden"], case["teacher_index"], strict=True):
        q = (hidden @ case["lm_head"].T).softmax(-1, dtype=torch.float32)
        total = total + distance(q, p[index])
    return total / len(case["draft_hidden"])


def our_loss_in_torch(case: dict[str, Any]) -> Any:
    """The same chunks without Triton: what every other loss costs on a GPU, and all of them on a CPU."""
    from unittest.mock import patch

    from vllm_bebop.kernels import linear_statistics

    with patch.object(linear_statistics, "can_fuse", lambda _: False):
        return our_loss(case)


def gradient_of(run: Callable[[Any], Any], case: dict[str, Any]) -> tuple[float, Any]:
    import torch

    loss = run(case)
    (gradient,) = torch.autograd.grad(loss, case["draft_hidden"])
    return loss.item(), gradient


def check_gate(case: dict[str, Any]) -> None:
    """Our loss and gradient against the reference's on a part of the rows, whose logits are rounded to bf16 as ours."""
    import torch

    from vllm_bebop.kernels.loss_reference import head_loss_reference

    part = dict(case)
    for name in ("draft_hidden", "teacher_index", "token_ids"):
        part[name] = case[name][:, :GATE_TOKENS].detach()
    part["draft_hidden"].requires_grad_()

    def reference(part: dict[str, Any]) -> Any:
        weight = part["lm_head"].T
        target = part["teacher_hidden"][: GATE_TOKENS + len(part["teacher_index"]) + 1] @ weight
        draft = part["draft_hidden"] @ weight
        return head_loss_reference(LOSS, draft, target[part["teacher_index"]], part["token_ids"])

    loss, gradient = gradient_of(our_loss, part)
    expected, expected_gradient = gradient_of(reference, part)
    error = ((gradient.float() - expected_gradient.float()).norm() / expected_gradient.float().norm()).item()
    print(f"gate: loss {loss:.6f}, reference {expected:.6f}; relative error of the gradient {error:.2e}")
    assert abs(loss - expected) < 1e-3, "the gate is red: the loss differs from the reference"
    # Two GEMMs that sum in another order round to another bf16 logit now and then; q may then pass p.
    assert error < 0.05 and torch.isfinite(gradient).all(), "the gate is red: the gradient differs from the reference"


def time_ms(run: Callable[[Any], Any], case: dict[str, Any]) -> dict[str, float]:
    """Loss; median, 20th and 80th percentile of forward and backward in ms; peak memory above the arguments in GB."""
    import torch

    on_gpu = case["lm_head"].is_cuda

    def once() -> float:
        start = clock.perf_counter()
        gradient_of(run, case)  # the loss is read, so that the device has finished its forward
        if on_gpu:
            torch.cuda.synchronize()
        return (clock.perf_counter() - start) * 1e3

    loss, _ = gradient_of(run, case)  # compiles
    repeats = max(LEAST_REPEATS, min(REPEATS, int(LONGEST_S * 1e3 / once())))
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    once()  # the allocator's first calls
    times = torch.tensor([once() for _ in range(repeats)], dtype=torch.float64)
    median, p20, p80 = times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    result = {"loss": round(loss, 5), "median_ms": round(median, 2), "p20_ms": round(p20, 2), "p80_ms": round(p80, 2)}
    if on_gpu:
        result["peak_gb"] = round((torch.cuda.max_memory_allocated() - held) / 1e9, 3)
    return result


def variants() -> dict[str, Callable[[Any], Any]]:
    import torch

    return {
        OURS: our_loss,
        OURS_IN_TORCH: our_loss_in_torch,
        "plain torch": plain_loss,
        "speculators": speculators_loss,
        "Liger (tv)": liger_loss,
        "torch.compile": torch.compile(plain_loss, dynamic=False),  # compiles longest
    }


def measure_variant(name: str, run: Callable[[Any], Any], case: dict[str, Any]) -> Entry:
    """A variant may be absent, fail or run out of memory: that is its result."""
    import torch

    num_steps, num_tokens, hidden = case["draft_hidden"].shape
    gemms = (1 + 2 * num_steps) * 2 * num_tokens * hidden * len(case["lm_head"])
    try:
        if name == OURS:
            check_gate(case)
        result = time_ms(run, case)
        return result | {"gemm_tflop_s": round(gemms / result["median_ms"] * 1e-9, 1)}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]}


def compare_losses(entries: list[Entry]) -> None:
    """Adds to each entry whether its loss is ours of the same size."""
    ours = {size_of(entry): entry["loss"] for entry in entries if entry["name"] == OURS and "loss" in entry}
    for entry in entries:
        if "loss" in entry and size_of(entry) in ours:
            entry["is_same_loss"] = abs(entry["loss"] - ours[size_of(entry)]) < SAME_LOSS


def size_of(entry: Entry) -> tuple[int, ...]:
    return tuple(entry[name] for name in KEY[1:])


def time(is_quick: bool, minutes: float, out: Path, is_dry_run: bool) -> list[str]:
    """Measures what is left; returns what failed that must not."""
    if is_dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch
    from tqdm import tqdm

    from vllm_bebop.kernels import linear_statistics

    start = clock.monotonic()
    device, num_tokens, sizes = "cuda", TIME_TOKENS, TIME_SIZES[:1] if is_quick else TIME_SIZES
    if is_dry_run:
        device, num_tokens, sizes = "cpu", 12, [(16, 100, 3)]
        linear_statistics.can_fuse = lambda _: True
    elif not torch.cuda.is_available():
        sys.exit("time needs a GPU")
    file = ResultFile(out / f"loss_{device_slug()}.json", measured_with(), KEY)
    with tqdm(total=len(sizes) * len(variants()), unit="measurement", disable=None) as progress:
        for hidden, vocab_size, num_steps in sizes:
            size = {"hidden": hidden, "vocab_size": vocab_size, "num_steps": num_steps}
            left = {name: run for name, run in variants().items() if not file.find({"name": name, **size})}
            progress.update(len(variants()) - len(left))
            if not left:
                continue
            case = make_case(num_tokens, hidden, vocab_size, num_steps, torch.bfloat16, device)
            for name, run in left.items():
                if clock.monotonic() - start > 60 * minutes:
                    progress.write("some measurements are left: run the same command again")
                    return failures(file.entries)
                entry = {"name": name, **size, **measure_variant(name, run, case)}
                file.entries.append(entry)
                compare_losses(file.entries)
                case_of_all = {"loss": LOSS, "tokens": num_tokens, "dtype": "bfloat16"}
                file.save(case=case_of_all, goal=goal(file.entries), notes=NOTES)
                progress.write(str(entry))
                progress.update()
                torch.compiler.reset()
                if device == "cuda":
                    raise_if_lost()
                    torch.cuda.empty_cache()
            del case
    print(goal(file.entries))
    return failures(file.entries)


def failures(entries: list[Entry]) -> list[str]:
    """Of ours, also in earlier runs."""
    return [str(entry) for entry in entries if entry["name"] in (OURS, OURS_IN_TORCH) and "error" in entry]


def goal(entries: list[Entry]) -> Entry:
    """What the project wants of itself, and whether ours reaches it."""
    for entry in entries:
        if entry["name"] == OURS and "error" not in entry and all(entry[name] == GOAL[name] for name in KEY[1:]):
            reached = entry["median_ms"] <= GOAL["median_ms"] and entry.get("peak_gb", 0) <= GOAL["peak_gb"]
            return {**GOAL, "reached": reached, "measured": {k: entry.get(k) for k in ("median_ms", "peak_gb")}}
    return {**GOAL, "reached": None, "why": "not measured"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("memory")
    one = commands.add_parser("measure", help="one measurement of `memory`, in a process of its own")
    one.add_argument("variant", choices=("ours", "plain"))
    one.add_argument("num_tokens", type=int)
    timed = commands.add_parser("time")
    timed.add_argument("--out", type=Path, default=RESULTS, help="folder for results")
    timed.add_argument("--quick", action="store_true", help="the first size only")
    timed.add_argument("--minutes", type=float, default=float("inf"), help="stop after the measurement at hand")
    timed.add_argument("--dry-run", action="store_true", help="a tiny size on the CPU, in Triton's interpreter")
    given = parser.parse_args()
    if given.command == "memory":
        memory()
    elif given.command == "measure":
        measure(given.variant, given.num_tokens)
    else:
        start = clock.monotonic()
        try:
            failed = time(given.quick, given.minutes, given.out, given.dry_run)
        except LostGpu:
            start_again(given.minutes - (clock.monotonic() - start) / 60)
        if failed:
            sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
