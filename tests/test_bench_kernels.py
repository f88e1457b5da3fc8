"""The GPU benchmarks' own logic, on the CPU with tiny sizes and fakes: sizes, gate, peers, resuming, goals, plot."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_kernels  # noqa: E402
import bench_loss  # noqa: E402
import kernel_cases  # noqa: E402
import kernel_implementations  # noqa: E402
import kernel_timing  # noqa: E402
import lost_gpu  # noqa: E402
from bench_kernels import goals  # noqa: E402
from kernel_cases import BATCHES, COMPILED, DRAFTS, DRY_RUN, GRID, QUICK, VOCAB_SIZES, Case, Point  # noqa: E402
from kernel_implementations import OURS, OURS_IN_VLLM, TORCH_COMPILE, VLLM_V2, Implementation  # noqa: E402
from result_file import ResultFile  # noqa: E402

from vllm_bebop.bench.conditions import device_slug  # noqa: E402


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


def make_case(point: Point, q_is_p: bool = False) -> Case:
    generator = torch.Generator().manual_seed(0)
    batch, num_drafts, vocab_size = point
    draft = torch.randn(batch, num_drafts, vocab_size, generator=generator).to(torch.bfloat16)
    other = torch.randn(batch, num_drafts + 1, vocab_size, generator=generator).to(torch.bfloat16)
    if q_is_p:
        other[:, :num_drafts] = draft
    return Case(
        point=point,
        draft_logits=draft,
        target_logits=other.flatten(0, 1),
        temperature=torch.full((batch,), 0.7),
        seeds=torch.arange(batch),
        positions=torch.arange(num_drafts + 1)[:, None].expand(-1, batch).contiguous(),
        draft_tokens=torch.randint(vocab_size, (batch, num_drafts), generator=generator),
    )


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

        def __call__(self, run):
            run()
            return {"median_us": 2.0}

    point = Point(2, 3, 1000)
    copies = dataclasses.replace(fake(make_case(point)), logit_passes={"draft": 2, "verify": 1})
    result = bench_kernels.time_parts(copies, point, Timer())
    assert result["draft"]["least_gb_s"] == 2 * 3 * 1000 * 2 / 2.0 * 1e-3
    assert result["draft"]["moved_gb_s"] == 12.0 and result["draft"]["moved_bytes"] == 24_000
    assert result["draft"]["share_of_copy"] == round(12.0 / 100, 3)
    assert result["verify"]["share_of_copy"] == round(8.0 / 100, 3) and result["total_us"] == 4.0


# --- On a GPU ---------------------------------------------------------------------------------------------------------


class FakeCuda:
    """What kernel_timing calls: a run takes `run_ms`; `fails` breaks the first capture."""

    def __init__(self, run_ms: float, fails: bool = False) -> None:
        self.run_ms, self.fails, self.captures, self.replays, self.pauses = run_ms, fails, 0, 0, 0

    def install(self, monkeypatch) -> None:
        cuda = self

        class Context:
            def __init__(self, _) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *_) -> None:
                pass

        class Capture(Context):
            def __enter__(self) -> None:
                cuda.captures += 1

            def __exit__(self, *_) -> None:
                if cuda.fails and cuda.captures == 1:
                    raise RuntimeError("operation not permitted when stream is capturing\nand more")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                pass

            def elapsed_time(self, _) -> float:
                return cuda.run_ms

        def replay(_) -> None:
            cuda.replays += 1

        def sleep(cycles: int) -> None:
            cuda.pauses += 1

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name, value in {
            "_sleep": sleep,
            "CUDAGraph": type("CUDAGraph", (), {"replay": replay}),
            "graph": Capture,
            "stream": Context,
            "current_stream": lambda: None,
            "synchronize": lambda: None,
            "Event": Event,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("run_ms, repeats", [(0.1, 100), (10.0, 50), (1000.0, 20)])
def test_gpu_timer_replays_a_graph_as_often_as_time_allows(monkeypatch, run_ms: float, repeats: int) -> None:
    cuda = FakeCuda(run_ms)
    cuda.install(monkeypatch)
    timer = object.__new__(kernel_timing.GpuTimer)
    timer.other = torch.zeros(4)
    calls = []
    assert timer(lambda: calls.append(1)) == {key: run_ms * 1e3 for key in ("median_us", "p20_us", "p80_us")}
    assert len(calls) == kernel_timing.WARM_UPS + 1 and cuda.replays == cuda.pauses == 1 + repeats


def test_gpu_timer_runs_without_a_graph_what_cannot_be_captured(monkeypatch) -> None:
    cuda = FakeCuda(1000.0, fails=True)
    cuda.install(monkeypatch)
    timer = object.__new__(kernel_timing.GpuTimer)
    timer.other = torch.zeros(4)
    calls = []
    result = timer(lambda: calls.append(1))
    assert result["without_a_graph"] == "RuntimeError: operation not permitted when stream is capturing"
    assert cuda.captures == 2  # the second one, empty, ends what the first left behind
    assert cuda.replays == 0 and len(calls) == kernel_timing.WARM_UPS + 1 + 1 + kernel_timing.LEAST_REPEATS


def test_gpu_timer_states_what_the_gpu_does_at_its_best(monkeypatch) -> None:
    FakeCuda(0.5).install(monkeypatch)
    monkeypatch.setattr(kernel_timing, "copied_buffers", lambda: torch.zeros(2, 1).unbind())
    monkeypatch.setattr(kernel_timing, "WARM_S", 0.01)
    properties = type("Properties", (), {"uuid": "12-34"})()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def answer(command: list[str], **_) -> subprocess.CompletedProcess:
        assert command[:2] == ["nvidia-smi", "--id=GPU-12-34"]
        return subprocess.CompletedProcess(command, 0, stdout="1980, 1980, 2619\n")

    monkeypatch.setattr(subprocess, "run", answer)
    timer = object.__new__(kernel_timing.GpuTimer)
    timer.other = torch.zeros(4)
    clocks = {"clocks_sm_mhz": 1980, "clocks_max_sm_mhz": 1980, "clocks_mem_mhz": 2619}
    assert timer.state() == {"copy_gb_s": round(2 * 2**30 / 500e3, 1), "empty_graph_us": 500.0, **clocks}

    def has_no_nvidia_smi(*_, **__) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", has_no_nvidia_smi)
    assert set(timer.state()) == {"copy_gb_s", "empty_graph_us"}


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


# --- Peers ------------------------------------------------------------------------------------------------------------


def test_plain_torch_accepts_all_drafts_from_the_target_itself() -> None:
    case = make_case(Point(20, 3, 11), q_is_p=True)
    implementation = kernel_implementations.plain_torch(case)
    num_accepted, tokens = implementation.verify()
    assert num_accepted.tolist() == [3] * 20 and tokens.min() >= 0 and tokens.max() < 11
    assert all(drawn.shape == (20,) for drawn in implementation.draft())


def test_plain_torch_recovers_from_the_residual() -> None:
    case = make_case(Point(20, 2, 11))
    case.draft_logits[:, :, 5:] = float("-inf")  # q on 0..4, p on 5..10
    case.target_logits[:, :5] = float("-inf")
    case.draft_tokens.remainder_(5)
    num_accepted, tokens = kernel_implementations.plain_torch(case).verify()
    assert num_accepted.tolist() == [0] * 20 and tokens.min() >= 5


def test_compiled_torch_compiles_both_parts(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function.__name__) or function)
    accepted = kernel_implementations.compiled_torch(make_case(Point(2, 3, 11))).verify()[0]
    assert accepted.shape == (2,) and compiled == ["draw", "accept"]


def install_flashinfer(monkeypatch, has_seed: bool) -> None:
    module = ModuleType("flashinfer.sampling")
    module.softmax = lambda logits, temperature: (logits.float() / temperature[:, None]).softmax(-1)

    def sampling_from_probs(probs, indices=None, seed=None, offset=None):
        assert len(seed) == len(offset) == 1
        return probs.argmax(-1).int()

    def chain_speculative_sampling(draft_probs, draft_token_ids, target_probs, seed=None, offset=None):
        batch, num_drafts, vocab_size = draft_probs.shape
        assert draft_token_ids.shape == (batch, num_drafts) and draft_token_ids.dtype == torch.int32
        assert target_probs.shape == (batch, num_drafts + 1, vocab_size)
        for probs in (draft_probs, target_probs):
            assert torch.allclose(probs.sum(-1), torch.ones(()))
        recovered = torch.full((batch, num_drafts + 1), -1, dtype=torch.int32)
        recovered[:, 0] = 7
        return recovered, None, None

    module.sampling_from_probs = sampling_from_probs if has_seed else lambda probs: None
    module.chain_speculative_sampling = chain_speculative_sampling
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", module)


def test_flashinfer_gets_what_its_documentation_asks_for(monkeypatch) -> None:
    install_flashinfer(monkeypatch, has_seed=True)
    implementation = kernel_implementations.flashinfer(make_case(Point(3, 2, 11)))
    assert len(implementation.draft()) == 2
    assert implementation.num_accepted(implementation.verify()).tolist() == [0, 0, 0]


def test_flashinfer_of_an_older_version_is_left_out(monkeypatch) -> None:
    install_flashinfer(monkeypatch, has_seed=False)
    with pytest.raises(kernel_implementations.LeftOut, match="sampling_from_probs|lambda"):
        kernel_implementations.flashinfer(make_case(Point(3, 2, 11)))


# --- With the kernels, in Triton's interpreter ------------------------------------------------------------------------

IN_THE_INTERPRETER = """
import sys
sys.path.insert(0, sys.argv[2])
sys.argv[1:2] = ["time", "--dry-run", "--out", sys.argv[1]]
sys.argv = sys.argv[:5]
import bench_kernels
bench_kernels.main()

import dataclasses, torch, kernel_cases, kernel_implementations, kernel_races
case = kernel_cases.make_case(kernel_cases.Point(3, 2, 700), "cpu")
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
    assert "caught: output of broken" in child.stdout
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


@pytest.mark.parametrize("error, message", [(torch.OutOfMemoryError("x"), "out of memory"), (TypeError("y\nz"), "y")])
def test_loss_records_what_fails(error: Exception, message: str) -> None:
    def run(case):
        raise error

    case = {"draft_hidden": torch.zeros(1, 2, 4), "lm_head": torch.zeros(8, 4)}
    measured = bench_loss.measure_variant("Liger (tv)", run, case)
    assert message in measured["error"]
    assert not bench_loss.failures([{"name": "Liger (tv)", **measured}])
    assert bench_loss.failures([{"name": bench_loss.OURS, **measured}])


def test_loss_says_whose_loss_is_another() -> None:
    size = {name: bench_loss.GOAL[name] for name in bench_loss.KEY[1:]}
    losses = {"plain torch": 0.5009, bench_loss.OURS: 0.5, "Liger (tv)": 0.502}
    entries = [{"name": name, **size, "loss": loss} for name, loss in losses.items()]
    entries += [{"name": "absent", **size, "error": "x"}, {"name": "alone", **size, "num_steps": 9, "loss": 0.5}]
    bench_loss.compare_losses(entries)
    assert [entry.get("is_same_loss") for entry in entries] == [True, True, False, None, None]


def test_loss_goes_on_after_a_failure_of_ours(monkeypatch, tmp_path: Path) -> None:
    def wrong(case):
        return (case["draft_hidden"] * 0).sum()

    monkeypatch.setattr(bench_loss, "our_loss", wrong)
    monkeypatch.setattr(bench_loss, "variants", lambda: {bench_loss.OURS: wrong, "peer": bench_loss.plain_loss})
    monkeypatch.setattr("vllm_bebop.kernels.linear_statistics.can_fuse", lambda _: False)  # put back afterwards
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for _ in range(2):
        (failed,) = bench_loss.time(is_quick=False, minutes=1.0, out=tmp_path, is_dry_run=True)
        assert "the gate is red" in failed
    content = json.loads((tmp_path / "loss_cpu.json").read_text())
    assert [(entry["name"], "error" in entry) for entry in content["entries"]] == [
        (bench_loss.OURS, True),
        ("peer", False),
    ]
    assert content["goal"]["reached"] is None


def test_loss_goal_needs_both_time_and_memory() -> None:
    assert bench_loss.goal([])["reached"] is None
    size = {name: bench_loss.GOAL[name] for name in bench_loss.KEY[1:]}
    for median, peak, reached in ((130, 1.5, True), (131, 1.0, False), (100, 1.6, False)):
        measured = {"name": bench_loss.OURS, **size, "median_ms": median, "peak_gb": peak}
        assert bench_loss.goal([measured])["reached"] is reached
    assert sorted(bench_loss.TIME_SIZES) == sorted(itertools.product((2048, 4096), (151_936, 248_320), (3, 5)))
    assert bench_loss.TIME_SIZES[0] == tuple(size.values())


BENCH_GPU = ROOT / "scripts" / "bench_gpu.sh"


def test_bench_gpu_names_steps_and_tests_that_exist() -> None:
    child = subprocess.run(["bash", BENCH_GPU, "nonsense"], capture_output=True, text=True)
    assert child.returncode == 2 and "unknown step nonsense" in child.stderr
    script = BENCH_GPU.read_text()
    (chosen,) = re.findall(r"-k '([^']+)'", script)
    sources = "".join(
        (ROOT / "tests" / f"test_kernels_{name}.py").read_text() for name in ("sampling", "verification", "loss")
    )
    names = re.findall(r"^def (test_\w+)", sources, re.MULTILINE)
    for word in chosen.split(" or "):
        assert any(word in name for name in names), word
    ((file, left_out),) = re.findall(r"--deselect (\S+)::(\S+)", script)
    assert f"def {left_out}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("is_quick", [True, False])
def test_bench_gpu_runs_each_step_and_names_what_failed(tmp_path: Path, is_quick: bool) -> None:
    """With a python that only notes what it is called with."""
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(f'#!/bin/sh\necho "$@" >> {notes}\ncase "$*" in *selftest*) exit 1;; esac\n')
    python.chmod(0o755)
    command = ["bash", str(BENCH_GPU), *(["--quick"] if is_quick else []), "--out", str(tmp_path)]
    child = subprocess.run(
        command, env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert child.returncode == 1 and child.stderr.strip().endswith("failed: selftest")
    quick, minutes = (" --quick", ("3.6", "1.575")) if is_quick else ("", ("9", "9"))
    calls = {
        "selftest": "-m vllm_bebop.cli selftest --device cuda",
        "tests": "-m pytest -v",
        "kernels": f"benchmarks/bench_kernels.py time{quick} --out {tmp_path} --minutes {minutes[0]}",
        "loss": f"benchmarks/bench_loss.py time{quick} --out {tmp_path} --minutes {minutes[1]}",
        "races": f"benchmarks/bench_kernels.py races{quick} --out {tmp_path}",
        "plot": "benchmarks/bench_kernels.py plot",
    }
    order = ["kernels", "loss", "selftest", "races", "plot"] if is_quick else list(calls)
    made = [line for line in notes.read_text().splitlines() if not line.startswith("-c ")]
    for step, call in zip(order, made, strict=True):
        assert call.startswith(calls[step]), step


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
