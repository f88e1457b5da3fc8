"""What vLLM's modules answer alone, as scripts/gather_peers.sh gathers them, for a test to read.

Prints one JSON line. In a process of its own: PYTHONPATH begins with what was gathered, and its kernels are
interpreted.
"""

import json
import sys

import kernel_implementations
from kernel_cases import Point
from tests.support.bench_case import make_case


def main() -> None:
    implementation = kernel_implementations.vllm_v1(make_case(Point(4, 2, 50), q_is_p=True))
    drawn, num_accepted = implementation.draft(), implementation.num_accepted(implementation.verify())
    from vllm.config import VllmConfig  # not gathered

    try:
        refused = f"no: {VllmConfig()}"
    except NotImplementedError as error:
        refused = str(error)
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"]
    result = {
        "drawn": list(drawn.shape),
        "num_accepted": num_accepted.tolist(),
        "files": [file for module in modules if (file := getattr(module, "__file__", None))],
        "refused": refused,
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
