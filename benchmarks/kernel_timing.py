"""Times on a GPU: replays of a CUDA graph between two events, each on a cold L2 cache."""

import subprocess
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lost_gpu import raise_if_lost

WARM_UPS, REPEATS, LEAST_REPEATS = 3, 100, 20
LONGEST_S = 0.5  # of one function's repeats, as far as LEAST_REPEATS allow
CACHES_READ = 4  # what is read before each repeat, in sizes of the L2 cache
PAUSE_CYCLES = 10**6  # half a millisecond before each repeat: longer than the host takes to launch it
COPIED_BYTES = 2**30
WARM_S, QUEUED_COPIES = 0.5, 500

Times = dict[str, Any]


class GpuTimer:
    """`timer(run, before_each)`: median, 20th and 80th percentile of one run in microseconds.

    Before each repeat a buffer larger than the cache is read, not written: lines that have to be written back would
    cost the next kernel bandwidth. Then the GPU waits until the repeat is queued, so that launching it takes no time.
    """

    device = "cuda"
    copy_gb_s: float

    def __init__(self) -> None:
        cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.other = torch.zeros(CACHES_READ * cache_bytes // 4, dtype=torch.float32, device="cuda")

    def state(self) -> dict[str, Any]:
        """What the GPU does at its best now, warmed up: the clock and bandwidth that times are to be compared with."""
        clocks = warm_up()
        self.copy_gb_s = self.measure_copy()
        return {"copy_gb_s": self.copy_gb_s, "empty_graph_us": self.measure_nothing(), **clocks}

    def measure_copy(self) -> float:
        """By the device's own copy or a kernel's, whichever is faster."""
        source, destination = copied_buffers()
        words = source.view(torch.int32), destination.view(torch.int32)
        copies = (lambda: destination.copy_(source), lambda: torch.bitwise_not(words[0], out=words[1]))
        copy_us = min(self(copy)["median_us"] for copy in copies)
        return round(2 * COPIED_BYTES / copy_us * 1e-3, 1)

    def measure_nothing(self) -> float | None:
        """Of a graph without a launch; None where PyTorch replays none such."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "The CUDA Graph is empty"
            try:
                return self(lambda: None)["median_us"]
            except RuntimeError:
                return None

    def __call__(self, run: Callable[[], Any], before_each: Callable[[], Any] = lambda: None) -> Times:
        for _ in range(WARM_UPS):
            run()
        torch.cuda.synchronize()
        replay, graph_error = capture(run)
        (first,) = self._repeat(replay, before_each, 1)
        repeats = max(LEAST_REPEATS, min(REPEATS, int(LONGEST_S * 1e6 / max(first, 1.0))))
        times = torch.tensor(self._repeat(replay, before_each, repeats), dtype=torch.float64)
        median, p20, p80 = times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
        result: Times = {"median_us": round(median, 2), "p20_us": round(p20, 2), "p80_us": round(p80, 2)}
        return result if graph_error is None else result | {"without_a_graph": graph_error}

    def _repeat(self, replay: Callable[[], Any], before_each: Callable[[], Any], repeats: int) -> list[float]:
        events = []
        for _ in range(repeats):
            before_each()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.other.sum()
            if torch.version.cuda:
                torch.cuda._sleep(PAUSE_CYCLES)
            start.record()
            replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def release(self) -> None:
        """Gives back the memory of what was timed. Raises LostGpu."""
        raise_if_lost()
        torch.cuda.empty_cache()


def copied_buffers() -> tuple[Tensor, ...]:
    return torch.zeros(2, COPIED_BYTES, dtype=torch.uint8, device="cuda").unbind()


def warm_up() -> dict[str, int]:
    """Keeps the GPU busy for a while; the clocks that it then runs at."""
    source, destination = copied_buffers()
    end = time.perf_counter() + WARM_S
    while time.perf_counter() < end:
        destination.copy_(source)
        torch.cuda.synchronize()
    for _ in range(QUEUED_COPIES):  # so that it is busy while nvidia-smi looks
        destination.copy_(source)
    clocks = read_clocks()
    torch.cuda.synchronize()
    return clocks


def read_clocks() -> dict[str, int]:
    """In MHz; nothing where nvidia-smi cannot tell."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem")
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        values = [int(word) for word in answer.split(",")]
        return {f"{name.replace('.', '_')}_mhz": value for name, value in zip(fields, values, strict=True)}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def capture(run: Callable[[], Any]) -> tuple[Callable[[], Any], str | None]:
    """A CUDA graph of `run`, to be called as `run` is; or `run` itself and why it could not be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context brings the stream back: a capture that fails to end stays on its own.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            result = run()

        def replay() -> Any:
            graph.replay()
            return result

        return replay, None
    except Exception as error:
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "The CUDA Graph is empty"
            # A failed capture leaves the random number generator believing in it; one that ends well mends that.
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                pass
        return run, reason(error)


class HostTimer:
    """The same on the CPU, for a dry run: once, by the clock."""

    device, copy_gb_s = "cpu", 1.0

    def state(self) -> dict[str, Any]:
        return {"copy_gb_s": self.copy_gb_s}

    def measure_copy(self) -> float:
        return self.copy_gb_s

    def __call__(self, run: Callable[[], Any], before_each: Callable[[], Any] = lambda: None) -> Times:
        before_each()
        start = time.perf_counter()
        run()
        elapsed = round((time.perf_counter() - start) * 1e6, 2)
        return {"median_us": elapsed, "p20_us": elapsed, "p80_us": elapsed}

    def release(self) -> None:
        pass


def reason(error: Exception) -> str:
    """Its type and first line, for the results."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:200]
