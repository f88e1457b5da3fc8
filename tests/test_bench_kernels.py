"""The GPU benchmarks' own logic, on the CPU with tiny sizes and fakes: sizes, gate, peers, resuming, goals, plot."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import bench_kernels
import kernel_cases
import kernel_implementations
import kernel_timing
import lost_gpu
from bench_kernels import goals
from kernel_cases import BATCHES, COMPILED, DRAFTS, DRY_RUN, GRID, QUICK, VOCAB_SIZES, Case, Point
from kernel_implementations import OURS, OURS_IN_VLLM, TORCH_COMPILE, VLLM_V2, Implementation
from result_file import ResultFile
from tests.support.bench_case import make_case
from vllm_bebop.bench.conditions import device_slug

ROOT = Path(__file__).parent.parent


def test_grid_has_every_size_once() -> None:
    assert sorted(GRID) == sorted(itertools.product(BATCHES, DRAFTS, VOCAB_SIZES))
    assert GRID[: len(QUICK)] == QUICK


def test_stages_measure_what_compiles_slowest_last() -> None:
    quick, rest, compiled = bench_kernels.stages(is_quick=False, is_dry_run=False)
    assert [point for point, _ in quick] == QUICK and [point for point, _ in quick + rest] == GRID
    assert all(TORCH_COMPILE not in names and names[:2] == [OURS, OURS_IN_VLLM] for _, names in quick + rest)
    assert compiled == [(point, [TORCH_COMPILE]) for point in COMPILED]
    assert sorted(point.vocab_size for point in COMPILED) == sorted(VOCAB_SIZES) and set(COMPILED) <= set(QUICK)
    assert bench_kernels.stages(is_quick=True, is_dry_run=False) == [quick, [], compiled]


def test_floor_bytes_read_each_logit_once() -> None:
    point = Point(batch=64, num_drafts=3, vocab_size=151_936)
    assert point.floor_bytes("draft") == 64 * 3 * 151_936 * 2
    assert point.floor_bytes("draft") + point.floor_bytes("verify") == 136_134_656  # as in traffic.json


# --- The file of results ----------------------------------------------------------------------------------------------


def test_result_file_keeps_only_what_the_same_code_measured(tmp_path: Path) -> None:
    path, key = tmp_path / "results.json", ("batch",)
    conditions = {"device": "H100", "code_sha256": "1", "commit": "a"}
    first = ResultFile(path, conditions, key)
    first.entries.append({"batch": 1, "us": 5})
    first.save(notes=["n"])
    assert json.loads(path.read_text())["notes"] == ["n"]
    again = ResultFile(path, conditions | {"commit": "b"}, key)
    assert again.find({"batch": 1, "us": 8}) == {"batch": 1, "us": 5} and again.find({"batch": 2}) is None
    again.entries.append({"batch": 2, "us": 7})
    again.save()
    assert [entry["us"] for entry in json.loads(path.read_text())["entries"]] == [5, 7]
    for change in ({"code_sha256": "2"}, {"device": "H200"}):
        assert not ResultFile(path, conditions | change, key).entries
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name, slug",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("CPU (AMD EPYC), 2 cores", "cpu"),
    ],
)
def test_device_slug_is_short(monkeypatch, name: str, slug: str) -> None:
    monkeypatch.setattr("vllm_bebop.bench.conditions.device_name", lambda: name)
    assert device_slug() == slug


def entry(point: Point, totals: dict[str, float], share: float = 0.9) -> dict:
    parts = {part: {"median_us": 1.0, "share_of_copy": share} for part in ("draft", "verify")}
    results = {name: {**parts, "total_us": total} for name, total in totals.items()}
    return {**point._asdict(), "gpu": [], "results": results, "left_out": {}, "errors": {}}


OUR_TOTALS = {OURS: 10.0, OURS_IN_VLLM: 10.0}


def test_goals_name_the_worst_size_of_each_vocabulary() -> None:
    large, small, one = Point(64, 3, 100), Point(128, 3, 100), Point(1, 3, 100)
    entries = [
        entry(large, OUR_TOTALS | {VLLM_V2: 29.0}),
        entry(small, OUR_TOTALS | {VLLM_V2: 40.0}, share=0.7),
        entry(one, OUR_TOTALS | {VLLM_V2: 10.0}),
        entry(Point(128, 3, 200), OUR_TOTALS | {VLLM_V2: 40.0}),
        entry(Point(256, 3, 200), {}),  # failed
    ]
    small_ones, large_ones = ([goal for goal in goals(entries) if goal["vocab_size"] == size] for size in (100, 200))
    found = {(goal["goal"].split(":")[0], goal["goal"].split(" at ")[-1]): goal for goal in small_ones}
    fast = found[(OURS, "64 requests and more")]
    assert not fast["reached"] and fast["worst"] == 2.9 and fast["at"]["batch"] == 64
    assert fast["sizes_reached"] == "1 of 2"
    assert found[(OURS, "1 request")]["reached"]
    bandwidth = next(goal for goal in small_ones if "bandwidth" in goal["goal"])
    assert not bandwidth["reached"] and bandwidth["worst"] == 0.7
    assert {goal["reached"] for goal in large_ones} == {True, None}  # no size has 1 request
    without_v2 = goals([entry(large, OUR_TOTALS)])
    assert {goal["reached"] for goal in without_v2} == {None}


# --- Measuring one size -----------------------------------------------------------------------------------------------


def fake(case: Case) -> Implementation:
    return Implementation(lambda: None, lambda: torch.full((case.point.batch,), 2), lambda out: out)


def fails(case: Case) -> Implementation:
    raise ImportError("No module named 'peer'\nmore")


def runs_out_of_memory(case: Case) -> Implementation:
    def verify() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    return Implementation(lambda: None, verify, lambda out: out)


@pytest.fixture
def only_fakes(monkeypatch):
    monkeypatch.setattr(bench_kernels, "check", lambda case: None)
    monkeypatch.setattr(kernel_cases, "make_case", lambda point, device: make_case(point))

    def use(**builders) -> None:
        named = {OURS: fake, OURS_IN_VLLM: fake, **builders}
        monkeypatch.setattr(kernel_implementations, "IMPLEMENTATIONS", named)

    return use


def dry_run(folder: Path, minutes: float = 1.0) -> tuple[list[str], list[dict]]:
    """What failed, and the entries on file."""
    failed = bench_kernels.time(is_quick=False, minutes=minutes, out=folder, is_dry_run=True)
    path = folder / "kernels_cpu.json"
    return failed, json.loads(path.read_text())["entries"] if path.exists() else []


def test_time_goes_on_where_it_stopped(only_fakes, tmp_path: Path) -> None:
    built = []

    def counted(name: str):
        def build(case: Case) -> Implementation:
            built.append((case.point, name))
            if len(built) == 3:
                raise KeyboardInterrupt
            return fake(case)

        return build

    only_fakes(**{OURS: counted("ours"), "peer": counted("peer"), TORCH_COMPILE: fails})
    assert dry_run(tmp_path, minutes=0.0) == ([], [])  # no time at all
    with pytest.raises(KeyboardInterrupt):
        dry_run(tmp_path)
    for _ in range(2):
        failed, entries = dry_run(tmp_path)
    first, second = DRY_RUN
    assert built == [(first, "ours"), (first, "peer"), *2 * [(second, "ours")], (second, "peer")]
    assert not failed and [set(x["results"]) for x in entries] == 2 * [{OURS, OURS_IN_VLLM, "peer"}]
    assert all(len(x["gpu"]) >= 1 and x["gpu"][-1]["copy_gb_s_afterwards"] == 1.0 for x in entries)


def test_time_leaves_out_a_peer_that_fails(only_fakes, tmp_path: Path) -> None:
    only_fakes(absent=fails, large=runs_out_of_memory, peer=fake)
    failed, entries = dry_run(tmp_path)
    assert not failed and list(entries[0]["results"]) == [OURS, OURS_IN_VLLM, "peer"]
    assert entries[0]["left_out"] == {
        "absent": "ImportError: No module named 'peer'",
        "large": "OutOfMemoryError: CUDA out of memory",
    }
    result = entries[0]["results"]["peer"]
    assert result["accepted_per_request"] == 2 and result["times_bebop"] > 0
    assert {"median_us", "p20_us", "p80_us", "least_gb_s"} == set(result["verify"])


def test_time_records_what_fails_of_ours_and_goes_on(only_fakes, monkeypatch, tmp_path: Path) -> None:
    def check(case: Case) -> None:
        if case.point == DRY_RUN[0]:
            raise bench_kernels.WrongTokens("output differs")

    only_fakes(**{OURS_IN_VLLM: runs_out_of_memory, "peer": fake})
    monkeypatch.setattr(bench_kernels, "check", check)
    for _ in range(2):  # a second run does not try again, but fails again
        failed, entries = dry_run(tmp_path)
        assert len(failed) == 2 and "check at B=3 gamma=2 V=700: WrongTokens: output differs" in failed
        assert [list(x["results"]) for x in entries] == [[], [OURS, "peer"]]
        assert entries[1]["errors"] == {OURS_IN_VLLM: "OutOfMemoryError: CUDA out of memory"}


def test_time_starts_again_without_what_lost_the_gpu(only_fakes, monkeypatch, tmp_path: Path) -> None:
    class Restarted(Exception):
        pass

    def release(timer) -> None:
        (entry,) = json.loads((tmp_path / "kernels_cpu.json").read_text())["entries"][:1]
        if OURS in entry["errors"] and not is_new_process:
            lost_gpu.raise_if_lost()

    def lose(*_) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def execute(program: str, arguments: list[str]) -> None:
        assert program == arguments[0] == sys.executable and arguments[-2] == "--minutes" and float(arguments[-1]) > 0
        raise Restarted

    only_fakes(**{OURS: fails})
    is_new_process = False
    monkeypatch.setattr(kernel_timing.HostTimer, "release", release)
    monkeypatch.setattr(torch.cuda, "synchronize", lose)
    monkeypatch.setattr(os, "execv", execute)
    with pytest.raises(Restarted):
        dry_run(tmp_path)
    is_new_process = True
    _, entries = dry_run(tmp_path)
    assert [list(x["results"]) for x in entries] == [[OURS_IN_VLLM], [OURS_IN_VLLM]]


def test_time_parts_relates_what_moves_to_the_copy_bandwidth() -> None:
    class Timer:
        copy_gb_s = 100.0

        def __call__(self, run, before_each):
            for _ in range(2):
                before_each()
                run()
                seeds.append(case.seeds.tolist())
            return {"median_us": 2.0}

    seeds: list[list[int]] = []
    case = make_case(Point(2, 3, 1000))
    copies = dataclasses.replace(fake(case), logit_passes={"draft": 2, "verify": 1})
    result = bench_kernels.time_parts(copies, case, Timer())
    assert seeds == 2 * [[2, 3], [4, 5]] and case.seeds.tolist() == [0, 1]
    assert result["draft"]["least_gb_s"] == 2 * 3 * 1000 * 2 / 2.0 * 1e-3
    assert result["draft"]["moved_gb_s"] == 12.0 and result["draft"]["moved_bytes"] == 24_000
    assert result["draft"]["share_of_copy"] == round(12.0 / 100, 3)
    assert result["verify"]["share_of_copy"] == round(8.0 / 100, 3) and result["total_us"] == 4.0


def test_compile_kernels_takes_every_kind_of_size_once(monkeypatch, capsys) -> None:
    class Pool:
        def __init__(self, workers: int, context) -> None:
            assert 1 <= workers <= 8 and context.get_start_method() == "spawn"

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            pass

        def submit(self, function, argument) -> Future:
            future: Future = Future()
            try:
                future.set_result(function(argument))
            except bench_kernels.WrongTokens as error:
                future.set_exception(error)
            return future

    def check_size(point: Point) -> None:
        sizes.append(point)
        if point == Point(8, 3, 32_000):
            raise bench_kernels.WrongTokens("output differs")

    sizes: list[Point] = []
    monkeypatch.setattr(bench_kernels, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench_kernels, "check_size", check_size)
    bench_kernels.compile_kernels([])
    bench_kernels.compile_kernels(GRID)
    assert capsys.readouterr().out.count("output differs") == 1
    assert len(sizes) == len(set(sizes)) == 3 * len(DRAFTS) * len(VOCAB_SIZES)
    assert {size.batch for size in sizes} == {1, 8, 32}


IN_THE_INTERPRETER = """
import sys
sys.path.insert(0, sys.argv[2])
sys.argv[1:2] = ["time", "--dry-run", "--out", sys.argv[1]]
sys.argv = sys.argv[:5]
import bench_kernels
bench_kernels.main()

import dataclasses, torch, kernel_cases, kernel_implementations, kernel_races
cases = [kernel_cases.make_case(kernel_cases.Point(batch, 2, 700), "cpu") for batch in (1, 3)]
for case in cases:
    bench_kernels.check(case)
assert kernel_races.count_mismatches(lambda: torch.arange(3), torch.arange(3), 5, "same") == 0
assert kernel_races.count_mismatches(lambda: torch.arange(3) * 2, torch.arange(3), 5, "other") == 2 * 6
assert not any(kernel_races.races(700, "cpu", 1).values())
original = kernel_implementations.bebop_in_vllm
def broken(case):
    implementation = original(case)
    def verify():
        out = implementation.verify()
        return dataclasses.replace(out, token_ids=(out.token_ids + 1) % 700)
    return dataclasses.replace(implementation, verify=verify)
kernel_implementations.bebop_in_vllm = broken
for case in cases:
    try:
        bench_kernels.check(case)
    except bench_kernels.WrongTokens as error:
        print("caught:", error)
"""


def test_time_measures_ours_and_the_installed_vllm(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    cpu_support = str(ROOT / "tests" / "cpu_support")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": cpu_support, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_THE_INTERPRETER, str(tmp_path), str(ROOT / "benchmarks")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.count("caught: output of broken") == 2  # at one request too
    entries = json.loads((tmp_path / "kernels_cpu.json").read_text())["entries"]
    assert [tuple(x[name] for name in bench_kernels.KEY) for x in entries] == DRY_RUN
    peers = {OURS, OURS_IN_VLLM, "plain torch"}
    try:
        import vllm  # noqa: F401
    except ImportError:
        pass
    else:
        peers |= {VLLM_V2, "vLLM V2, temperature 1", "vLLM V1"}
    for x in entries:
        assert set(x["results"]) >= peers, x["left_out"]
        assert not x["errors"] and TORCH_COMPILE not in x["results"]
        assert x["results"][OURS]["accepted_per_request"] == x["results"][OURS_IN_VLLM]["accepted_per_request"]


# --- The rest ---------------------------------------------------------------------------------------------------------


def test_plot_draws_every_implementation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from kernel_plot import plot

    path = tmp_path / "kernels_h100.json"
    file = ResultFile(path, {"device": "NVIDIA H100", "commit": None}, bench_kernels.KEY)
    for batch, vocab_size in itertools.product((1, 64), VOCAB_SIZES):
        file.entries.append(entry(Point(batch, 3, vocab_size), OUR_TOTALS | {VLLM_V2: 20.0 * batch}))
    file.entries.append(entry(Point(512, 3, 32_000), {}))  # failed
    file.save()
    assert plot(path) == tmp_path / "kernels_h100.png"
    assert (tmp_path / "kernels_h100.png").read_bytes().startswith(b"\x89PNG")


def test_case_select_keeps_the_rows_of_its_requests() -> None:
    case = make_case(Point(4, 2, 5))
    part = case.select(torch.tensor([3, 1]))
    assert part.point == Point(2, 2, 5)
    rows = case.target_logits.view(4, 3, 5)
    assert torch.equal(part.target_logits, torch.cat([rows[3], rows[1]]))
    for field in dataclasses.fields(case):
        value = getattr(part, field.name)
        assert not isinstance(value, torch.Tensor) or value.is_contiguous(), field.name
    assert part.positions.shape == (3, 2)
