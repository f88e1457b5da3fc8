"""Times on a GPU: replays of a CUDA graph between two events, each on a cold L2 cache."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

WARM_UPS, REPEATS, LEAST_REPEATS = 3, 100, 20
LONGEST_S = 0.5  # of one function's repeats, as far as LEAST_REPEATS allow
CACHES_READ = 4  # what is read before each repeat, in sizes of the L2 cache
COPIED_BYTES = 2**30

Times = dict[str, Any]


class GpuTimer:
    """`timer(run)`: median, 20th and 80th percentile of one run in microseconds.

    Before each repeat a buffer larger than the cache is read, not written: lines that have to be written back would
    cost the next kernel bandwidth.
    """

    device = "cuda"

    def __init__(self) -> None:
        cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.other = torch.zeros(CACHES_READ * cache_bytes // 4, dtype=torch.float32, device="cuda")
        source, destination = torch.zeros(2, COPIED_BYTES, dtype=torch.uint8, device="cuda").unbind()
        copy_us = self(lambda: destination.copy_(source))["median_us"]
        self.copy_gb_s = round(2 * COPIED_BYTES / copy_us * 1e-3, 1)

    def __call__(self, run: Callable[[], Any]) -> Times:
        for _ in range(WARM_UPS):
            run()
        torch.cuda.synchronize()
        replay, graph_error = capture(run)
        (first,) = self._repeat(replay, 1)
        repeats = max(LEAST_REPEATS, min(REPEATS, int(LONGEST_S * 1e6 / first)))
        times = torch.tensor(self._repeat(replay, repeats), dtype=torch.float64)
        median, p20, p80 = times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
        result: Times = {"median_us": round(median, 2), "p20_us": round(p20, 2), "p80_us": round(p80, 2)}
        return result if graph_error is None else result | {"without_a_graph": graph_error}

    def _repeat(self, replay: Callable[[], Any], repeats: int) -> list[float]:
        events = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.other.sum()
            start.record()
            replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def release(self) -> None:
        """Gives back the memory of what was timed."""
        torch.cuda.empty_cache()


def capture(run: Callable[[], Any]) -> tuple[Callable[[], Any], str | None]:
    """What replays `run`: a CUDA graph, or `run` itself and why it could not be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context brings the stream back: a capture that fails to end stays on its own.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            run()
        return graph.replay, None
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

    def __call__(self, run: Callable[[], Any]) -> Times:
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
