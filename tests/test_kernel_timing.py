"""How the GPU benchmarks time, on a fake of CUDA: graphs, repeats, what the GPU does at its best."""

import subprocess

import pytest
import torch

import kernel_timing


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
    calls, changes = [], []
    times = timer(lambda: calls.append(1), lambda: changes.append(cuda.replays))
    assert times == {key: run_ms * 1e3 for key in ("median_us", "p20_us", "p80_us")}
    assert len(calls) == kernel_timing.WARM_UPS + 1 and cuda.replays == cuda.pauses == 1 + repeats
    assert changes == list(range(1 + repeats))


def test_a_captured_run_gives_its_result_at_every_replay(monkeypatch) -> None:
    cuda = FakeCuda(1.0)
    cuda.install(monkeypatch)
    run, _ = kernel_timing.capture(lambda: "result")
    assert [run(), run()] == ["result", "result"] and cuda.replays == 2


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
