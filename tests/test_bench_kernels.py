"""The GPU benchmarks' own logic, on the CPU with tiny sizes and fakes: sizes, gate, peers, resuming, goals, plot."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
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
from bench_kernels import goals  # noqa: E402
from kernel_cases import BATCHES, DRAFTS, GRID, QUICK, VOCAB_SIZES, Case, Point  # noqa: E402
from kernel_implementations import OURS, OURS_IN_VLLM, VLLM_V2, Implementation  # noqa: E402
from result_file import ResultFile  # noqa: E402

from vllm_bebop.bench.conditions import device_slug  # noqa: E402


def test_grid_has_every_size_once() -> None:
    assert sorted(GRID) == sorted(itertools.product(BATCHES, DRAFTS, VOCAB_SIZES))
    assert GRID[: len(QUICK)] == QUICK


def test_floor_bytes_read_each_logit_once() -> None:
    point = Point(batch=64, num_drafts=3, vocab_size=151_936)
    assert point.floor_bytes("draft") == 64 * 3 * 151_936 * 2
    assert point.floor_bytes("draft") + point.floor_bytes("verify") == 136_134_656  # as in traffic.json


# --- The file of results ----------------------------------------------------------------------------------------------


def test_result_file_keeps_only_what_the_same_code_measured(tmp_path: Path) -> None:
    path, key = tmp_path / "results.json", ("batch",)
    conditions = {"device": "H100", "code_sha256": "1", "commit": "a"}
    ResultFile(path, conditions, key).add({"batch": 1, "us": 5}, notes=["n"])
    assert json.loads(path.read_text())["notes"] == ["n"]
    again = ResultFile(path, conditions | {"commit": "b"}, key)
    assert again.has({"batch": 1}) and not again.has({"batch": 2})
    again.add({"batch": 2, "us": 7})
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
    return {**point._asdict(), "results": results, "left_out": {}}


OUR_TOTALS = {OURS: 10.0, OURS_IN_VLLM: 10.0}


def test_time_goes_on_where_it_stopped(monkeypatch, tmp_path: Path) -> None:
    measured = []

    def measure(point, timer):
        if len(measured) == 1:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(point)
        return entry(point, OUR_TOTALS)

    monkeypatch.setattr(bench_kernels, "measure", measure)
    assert not bench_kernels.time(False, 0.0, tmp_path, True)  # no time at all
    with pytest.raises(KeyboardInterrupt):
        bench_kernels.time(False, 1.0, tmp_path, True)
    assert bench_kernels.time(False, 1.0, tmp_path, True)
    assert bench_kernels.time(False, 1.0, tmp_path, True)
    assert measured == [kernel_cases.DRY_RUN[0], None, *kernel_cases.DRY_RUN[1:]]
    content = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert len(content["entries"]) == len(content["goals"]) - 4 == 2 and content["notes"]


def test_goals_name_the_worst_size() -> None:
    large, small, one = Point(64, 3, 100), Point(128, 3, 100), Point(1, 3, 100)
    entries = [
        entry(large, OUR_TOTALS | {VLLM_V2: 29.0}),
        entry(small, OUR_TOTALS | {VLLM_V2: 40.0}, share=0.7),
        entry(one, OUR_TOTALS | {VLLM_V2: 10.0}),
    ]
    found = {(goal["goal"].split(":")[0], goal["goal"].split(" at ")[-1]): goal for goal in goals(entries)}
    fast = found[(OURS, "64 requests and more")]
    assert not fast["reached"] and fast["worst"] == 2.9 and fast["at"]["batch"] == 64
    assert fast["sizes_reached"] == "1 of 2"
    assert found[(OURS, "1 request")]["reached"]
    bandwidth = next(goal for goal in goals(entries) if "bandwidth" in goal["goal"])
    assert not bandwidth["reached"] and bandwidth["worst"] == 0.7
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


def test_measure_leaves_out_a_peer_that_fails(only_fakes) -> None:
    only_fakes(absent=fails, large=runs_out_of_memory, peer=fake)
    measured = bench_kernels.measure(Point(2, 3, 8), kernel_timing.HostTimer())
    assert list(measured["results"]) == [OURS, OURS_IN_VLLM, "peer"]
    assert measured["left_out"] == {
        "absent": "ImportError: No module named 'peer'",
        "large": "OutOfMemoryError: CUDA out of memory",
    }
    result = measured["results"]["peer"]
    assert result["accepted_per_request"] == 2 and result["times_bebop"] > 0
    assert {"median_us", "p20_us", "p80_us", "gb_s", "share_of_copy"} <= set(result["verify"])


def test_measure_stops_where_ours_fails(only_fakes) -> None:
    only_fakes(**{OURS: fails})
    with pytest.raises(ImportError):
        bench_kernels.measure(Point(2, 3, 8), kernel_timing.HostTimer())


def test_time_parts_relates_the_floor_to_the_copy_bandwidth() -> None:
    class Timer:
        copy_gb_s = 100.0

        def __call__(self, run):
            run()
            return {"median_us": 2.0}

    point = Point(2, 3, 1000)
    result = bench_kernels.time_parts(fake(make_case(point)), point, Timer())
    assert result["draft"]["gb_s"] == 2 * 3 * 1000 * 2 / 2.0 * 1e-3
    assert result["verify"]["share_of_copy"] == round(8.0 / 100, 3) and result["total_us"] == 4.0


# --- On a GPU ---------------------------------------------------------------------------------------------------------


class FakeCuda:
    """What kernel_timing calls: a run takes `run_ms`; `fails` breaks the first capture."""

    def __init__(self, run_ms: float, fails: bool = False) -> None:
        self.run_ms, self.fails, self.captures, self.replays = run_ms, fails, 0, 0

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

        for name, value in {
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
    assert len(calls) == kernel_timing.WARM_UPS + 1 and cuda.replays == 1 + repeats


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


def test_compile_kernels_takes_every_kind_of_size_once(monkeypatch) -> None:
    class Pool:
        def __init__(self, workers: int, context) -> None:
            assert 1 <= workers <= 8 and context.get_start_method() == "spawn"

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            pass

        map = staticmethod(map)

    sizes = []
    monkeypatch.setattr(bench_kernels, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench_kernels, "check_size", sizes.append)
    bench_kernels.compile_kernels(GRID)
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


def test_compiled_torch_compiles_one_number_of_drafts(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function.__name__) or function)
    accepted = kernel_implementations.compiled_torch(make_case(Point(2, 3, 11))).verify()[0]
    assert accepted.shape == (2,) and compiled == ["draw", "accept"]
    with pytest.raises(kernel_implementations.LeftOut):
        kernel_implementations.compiled_torch(make_case(Point(2, 1, 11)))


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
    assert [tuple(x[name] for name in bench_kernels.KEY) for x in entries] == kernel_cases.DRY_RUN
    peers = {OURS, OURS_IN_VLLM, "plain torch"}
    try:
        import vllm  # noqa: F401
    except ImportError:
        pass
    else:
        peers |= {VLLM_V2, "vLLM V2, temperature 1", "vLLM V1"}
    for x in entries:
        assert set(x["results"]) >= peers, x["left_out"]
        assert x["results"][OURS]["accepted_per_request"] == x["results"][OURS_IN_VLLM]["accepted_per_request"]


# --- The rest ---------------------------------------------------------------------------------------------------------


def test_plot_draws_every_implementation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from kernel_plot import plot

    path = tmp_path / "kernels_h100.json"
    file = ResultFile(path, {"device": "NVIDIA H100", "commit": None}, bench_kernels.KEY)
    for batch in (1, 64):
        file.add(entry(Point(batch, 3, 151_936), OUR_TOTALS | {VLLM_V2: 20.0 * batch}))
    assert plot(path) == tmp_path / "kernels_h100.png"
    assert (tmp_path / "kernels_h100.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("error, message", [(torch.OutOfMemoryError("x"), "out of memory"), (TypeError("y\nz"), "y")])
def test_loss_records_a_peer_that_fails(error: Exception, message: str) -> None:
    def run(case):
        raise error

    case = {"draft_hidden": torch.zeros(1, 2, 4), "lm_head": torch.zeros(8, 4)}
    assert message in bench_loss.measure_variant("Liger (tv)", run, case)["error"]
    with pytest.raises(type(error)):
        bench_loss.measure_variant(bench_loss.OURS, run, case)


def test_loss_goal_needs_both_time_and_memory() -> None:
    assert bench_loss.goal([])["reached"] is None
    size = {name: bench_loss.GOAL[name] for name in bench_loss.KEY[1:]}
    for median, peak, reached in ((130, 1.5, True), (131, 1.0, False), (100, 1.6, False)):
        measured = {"name": bench_loss.OURS, **size, "median_ms": median, "peak_gb": peak}
        assert bench_loss.goal([measured])["reached"] is reached
    assert sorted(bench_loss.TIME_SIZES) == sorted(itertools.product((2048, 4096), (151_936, 248_320), (3, 5)))
    assert bench_loss.TIME_SIZES[0] == tuple(size.values())


def test_bench_gpu_names_steps_and_tests_that_exist() -> None:
    script = ROOT / "scripts" / "bench_gpu.sh"
    child = subprocess.run(["bash", script, "nonsense"], capture_output=True, text=True)
    assert child.returncode == 2 and "unknown step nonsense" in child.stderr
    (chosen,) = re.findall(r"-k '([^']+)'", script.read_text())
    sources = "".join(
        (ROOT / "tests" / f"test_kernels_{name}.py").read_text() for name in ("sampling", "verification", "loss")
    )
    names = re.findall(r"^def (test_\w+)", sources, re.MULTILINE)
    for word in chosen.split(" or "):
        assert any(word in name for name in names), word


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
