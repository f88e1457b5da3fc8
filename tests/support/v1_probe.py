"""What model runner V1 answers with the fused kernels, for a test to read: `python -m tests.support.v1_probe`.

Without a GPU they are interpreted or emulated, hence a process of its own. Prints one JSON line.
"""

import json
from typing import Any

from tests.support.engines import (
    BEBOP,
    accepted_per_position,
    engine,
    num_finished,
    replace_what_cannot_run_without_a_gpu,
    runner,
)
from tests.support.v2_probe import OPTIONS, answers, crowded_grammar
from vllm_bebop.kernels.backend import Backend


def answered(backend: Backend | None = None) -> dict[str, Any]:
    """The answers of an engine that drafts and samples with this backend, or with the one that bebop chose."""
    with engine(BEBOP, **OPTIONS) as llm:
        inside = runner(llm)
        for place in (inside.drafter, inside.sampler, inside.rejection_sampler):
            place.backend = backend or place.backend
        result = {"backend": inside.rejection_sampler.backend.name} | json.loads(json.dumps(answers(llm)))
        accepted = accepted_per_position(llm)[1]
        totals = llm.collective_rpc("bebop_totals")[0]
        return result | {"totals": totals, "accepted": accepted, "num_finished": num_finished(llm)}


def main() -> None:
    replace_what_cannot_run_without_a_gpu()
    print("RESULT", json.dumps(answered() | crowded_grammar()))


if __name__ == "__main__":
    main()
