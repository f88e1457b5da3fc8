"""What the loss costs: `python benchmarks/bench_loss.py memory` anywhere, `... time` on a GPU.

Both run forward and backward of the end-to-end TV loss from hidden states to their gradient, ours against plain torch
that stores logits and probabilities, as a careful user would write it (`plain_loss`).

memory: peak resident memory on the CPU above what the process held before the call, each run in a process of its own.
The plain version does not fit most machines at the size asked for: it is measured at smaller ones, where it must come
out linear in the number of tokens, and extrapolated. Ours is measured at the size asked for.

time: milliseconds and peak memory on a GPU, bf16, against plain torch, torch.compile, and the kernels of Liger and
speculators where they are installed; both of those take stored logits (or probabilities), whose GEMMs are timed too.
Nothing is timed unless our loss and gradient equal the reference's. `time --dry-run` runs every line of it on the CPU
at a tiny size, in Triton's interpreter, and writes nothing.
"""

import json
import os
import platform
import subprocess
import sys
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LOSS = "e2e_tv"

MEMORY_TOKENS, MEMORY_HIDDEN, MEMORY_VOCAB, MEMORY_STEPS = 4096, 256, 151_936, 3
PLAIN_TOKENS = (128, 256, 512)
TIME_TOKENS = 8192
TIME_SIZES = [(hidden, vocab, steps) for vocab in (151_936, 248_320) for hidden in (2048, 4096) for steps in (3, 5)]
GOAL = {"hidden": 4096, "vocab_size": 151_936, "num_steps": 3, "median_ms": 130, "peak_gb": 1.5}
GATE_TOKENS = 256
REPEATS = 20


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


def environment() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    def find(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {package: find(package) for package in ("torch", "triton", "liger-kernel", "speculators")}
    return {"commit": commit, "python": platform.python_version(), **versions}


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
        "environment": environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "loss_memory_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
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


def time_ms(run: Callable[[Any], Any], case: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median, 20th and 80th percentile of forward and backward in ms, and peak memory above the arguments in GB."""
    import torch

    on_gpu = case["lm_head"].is_cuda

    def once() -> float:
        start = clock.perf_counter()
        gradient_of(run, case)  # the loss is read, so that the device has finished its forward
        if on_gpu:
            torch.cuda.synchronize()
        return (clock.perf_counter() - start) * 1e3

    for _ in range(min(3, repeats)):
        once()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    times = torch.tensor([once() for _ in range(repeats)], dtype=torch.float64)
    median, p20, p80 = times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    result = {"median_ms": round(median, 2), "p20_ms": round(p20, 2), "p80_ms": round(p80, 2)}
    if on_gpu:
        result["peak_gb"] = round((torch.cuda.max_memory_allocated() - held) / 1e9, 3)
    return result


def variants() -> dict[str, Callable[[Any], Any]]:
    import importlib

    import torch

    runs = {
        "ours, fused": our_loss,
        "ours, chunked torch": our_loss_in_torch,
        "plain torch": plain_loss,
        "torch.compile": torch.compile(plain_loss, dynamic=False),
    }
    for name, module, run in (
        ("speculators", "speculators.losses.fused", speculators_loss),
        ("Liger (tv)", "liger_kernel.transformers.tvd", liger_loss),
    ):
        try:
            importlib.import_module(module)
            runs[name] = run
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return runs


def time(is_dry_run: bool) -> None:
    if is_dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    from vllm_bebop.kernels import linear_statistics

    device, num_tokens, sizes, repeats = "cuda", TIME_TOKENS, TIME_SIZES, REPEATS
    if is_dry_run:
        device, num_tokens, sizes, repeats = "cpu", 12, [(16, 100, 3)], 2
        linear_statistics.can_fuse = lambda _: True
    elif not torch.cuda.is_available():
        sys.exit("time needs a GPU")
    runs, results = variants(), []
    for hidden, vocab_size, num_steps in sizes:
        case = make_case(num_tokens, hidden, vocab_size, num_steps, torch.bfloat16, device)
        check_gate(case)
        gemms = (1 + 2 * num_steps) * 2 * num_tokens * hidden * vocab_size
        for name, run in runs.items():
            size = {"hidden": hidden, "vocab_size": vocab_size, "num_steps": num_steps}
            try:
                result = time_ms(run, case, repeats)
                result["gemm_tflop_s"] = round(gemms / result["median_ms"] * 1e-9, 1)
            except torch.OutOfMemoryError:
                result = {"error": "out of memory"}
            torch.compiler.reset()
            if device == "cuda":
                torch.cuda.empty_cache()
            results.append({"name": name, **size, **result})
            print(results[-1], flush=True)
        del case
    if is_dry_run:
        return
    result = {
        "case": {"loss": LOSS, "tokens": num_tokens, "dtype": "bfloat16"},
        "goal": GOAL,
        "device": torch.cuda.get_device_name(),
        "results": results,
        "notes": [
            f"Forward and backward from hidden states to their gradient, {REPEATS} repeats after 3, wall clock between"
            " two synchronisations. peak_gb: largest allocation above the arguments.",
            "gemm_tflop_s: (1 + 2 num_steps) products of tokens x hidden x vocabulary, the least needed, per second.",
            "plain torch, torch.compile, speculators and Liger store logits (Liger probabilities) of all rows. Liger's"
            " kernel returns only the mean TV of a step; the product over the steps is missing from its numbers.",
        ],
        "command": "python benchmarks/bench_loss.py time",
        "environment": environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "loss_times.json").write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    match sys.argv[1:]:
        case ["memory"]:
            memory()
        case ["measure", variant, num_tokens]:
            measure(variant, int(num_tokens))
        case ["time"]:
            time(is_dry_run=False)
        case ["time", "--dry-run"]:
            time(is_dry_run=True)
        case _:
            sys.exit(f"usage: {sys.argv[0]} memory | time [--dry-run]")


if __name__ == "__main__":
    main()
