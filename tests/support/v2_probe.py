"""What model runner V2 does under bebop, for a test to read: `python -m tests.support.v2_probe`.

V2 is chosen by the environment before vLLM is imported, and without a GPU runs in Triton's interpreter, hence a process
of its own. Prints one JSON line: greedy and seeded tokens, and the p-values of the law of the first tokens, honest and
with a planted fault.
"""

import json

from tests.support import laws
from tests.support.engines import BEBOP, TINY_MODEL, accepted_per_position, engine, runner, token_ids

PROMPTS = [
    start + end
    for start in (
        "import os",
        "The return value",
        "x = [1, 2",
        '{"role": "',
        "Problem: Add",
        "class A",
        "for i in",
        "If ",
    )
    + ("def read", "    ")
    for end in ("", " ", "1", "a", "\n")
]  # 50
MAX_TOKENS = 8
LAW_PROMPT = "Problem: Find the average"
NUM_SAMPLES = 300


def main() -> None:
    from vllm import SamplingParams

    from vllm_bebop.kernels import reference

    result: dict[str, object] = {}
    # A cache of its own size: V2's block tables are as long as the context, and the interpreter pays for each block.
    with engine(BEBOP, max_num_seqs=64, max_model_len=64, logprobs_mode="processed_logprobs") as llm:
        inside = runner(llm)
        result["classes"] = [type(o).__name__ for o in (inside.speculator, inside.sampler, inside.rejection_sampler)]
        params = [SamplingParams(temperature=t, seed=3, max_tokens=MAX_TOKENS, ignore_eos=True) for t in (0.0, 1.0)]
        result["greedy"], result["seeded"] = (token_ids(llm.generate(PROMPTS, each, use_tqdm=False)) for each in params)
        prompt = llm.get_tokenizer().encode(LAW_PROMPT)
        drawn = laws.sample(llm, prompt, NUM_SAMPLES, first_seed=0, temperature=1.0)
        result["honest"] = laws.p_values(drawn, TINY_MODEL, prompt)
        reference._is_below_ratio = lambda u, log_a, log_b: u > 0  # the planted fault: accept every draft
        drawn = laws.sample(llm, prompt, NUM_SAMPLES, first_seed=NUM_SAMPLES, temperature=1.0)
        result["faulty"] = laws.p_values(drawn, TINY_MODEL, prompt)
        result["rounds"], result["accepted"] = accepted_per_position(llm)
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
