"""What model runner V2 counts under acceptance "target_only": `python -m tests.support.v2_target_only_probe`.

Prints one JSON line: the totals before a request and after one. See v2_probe.
"""

import json

from tests.support.engines import BEBOP, engine, replace_what_cannot_run_without_a_gpu


def main() -> None:
    from vllm import SamplingParams

    replace_what_cannot_run_without_a_gpu()
    with engine(BEBOP | {"acceptance": "target_only"}, max_num_seqs=4, max_model_len=64) as llm:
        (before,) = llm.collective_rpc("bebop_totals")
        llm.generate(["import os"], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), use_tqdm=False)
        (after,) = llm.collective_rpc("bebop_totals")
    print("RESULT", json.dumps({"before": before, "after": after}))


if __name__ == "__main__":
    main()
