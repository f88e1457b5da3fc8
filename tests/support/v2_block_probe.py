"""What model runner V2 serves under acceptance "block": `python -m tests.support.v2_block_probe`, see v2_probe.

Prints one JSON line: seeded and greedy tokens.
"""

import json
from typing import Any

from tests.support.engines import BEBOP, engine, replace_what_cannot_run_without_a_gpu, runner, token_ids

BLOCK = BEBOP | {"acceptance": "block"}
PROMPTS = ["import os", "   +-----------+", "x = [1, 2", "Problem: Add", "class A", "for i in"]
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 16, "ignore_eos": True}
GREEDY = SEEDED | {"temperature": 0.0}


def main() -> None:
    from vllm import SamplingParams

    replace_what_cannot_run_without_a_gpu()
    with engine(BLOCK, max_num_seqs=8, max_model_len=64) as llm:
        sampler = runner(llm).rejection_sampler
        result: dict[str, Any] = {"class": type(sampler).__name__, "in_blocks": sampler.bebop.in_blocks}
        for name, params in (("seeded", SEEDED), ("greedy", GREEDY)):
            outputs = llm.generate(PROMPTS, SamplingParams(**params), use_tqdm=False)
            result[name] = token_ids(outputs)
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
