"""What model runner V2 draws under bebop, for a test to read: `python -m tests.support.v2_law_probe`, see v2_probe.

Prints one JSON line: what a crowd under a grammar is served; greedy tokens with one draft a round; with a cache of
candidates for half of the requests, greedy tokens and the p-values of the law of the first tokens, honest and with a
planted fault.
"""

import json
from typing import Any

from tests.support import laws
from tests.support.engines import (
    BEBOP,
    TINY_MODEL,
    accepted_per_position,
    engine,
    num_finished,
    replace_what_cannot_run_without_a_gpu,
    runner,
    token_ids,
)
from tests.support.v2_probe import LAW_PROMPT, MAX_TOKENS, OPTIONS, PROMPTS, crowded_grammar, use
from vllm_bebop.bench.conditions import on_cpu

NUM_SAMPLES = 300
NUM_REQUESTS = 64
NUM_CACHED = NUM_REQUESTS // 2


def half_a_cache() -> dict[str, Any]:
    from vllm import SamplingParams

    from vllm_bebop.kernels import reference
    from vllm_bebop.kernels.backend import plain
    from vllm_bebop.kernels.candidates import num_candidates

    result: dict[str, Any] = {}
    vocab_size = json.loads((TINY_MODEL / "config.json").read_text())["vocab_size"]
    request_bytes = BEBOP["num_speculative_tokens"] * num_candidates(vocab_size) * (4 + 4)  # fp32 and int32
    config = BEBOP | {"draft_cache": "candidates", "draft_cache_gib": NUM_CACHED * request_bytes / 2**30}
    # On a GPU as a server runs: with CUDA graphs.
    with engine(config, max_num_seqs=NUM_REQUESTS, max_model_len=64, enforce_eager=on_cpu()) as llm:
        result["backend"] = runner(llm).speculator.bebop.backend.name
        result["num_cached"] = len(runner(llm).speculator.draft_logits)
        greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        result["greedy"] = token_ids(llm.generate(PROMPTS, greedy, use_tqdm=False))
        prompt = llm.get_tokenizer().encode(LAW_PROMPT)
        drawn = laws.sample(llm, prompt, NUM_SAMPLES, first_seed=0, temperature=1.0)
        result["honest"] = laws.p_values(drawn, TINY_MODEL, prompt)
        result["totals"] = llm.collective_rpc("bebop_totals")[0]
        result["rounds"], result["accepted"] = accepted_per_position(llm)
        result["num_finished"] = num_finished(llm)
        # The planted fault: accept every draft. In the reference, since a compiled kernel cannot be changed.
        use(llm, plain())
        reference._is_below_ratio = lambda u, log_a, log_b: u > 0
        drawn = laws.sample(llm, prompt, NUM_SAMPLES // 3, first_seed=NUM_SAMPLES, temperature=1.0)
        result["faulty"] = laws.p_values(drawn, TINY_MODEL, prompt)
    return result


def one_draft() -> dict[str, Any]:
    from vllm import SamplingParams

    with engine(BEBOP | {"num_speculative_tokens": 1}, **OPTIONS) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        served = token_ids(llm.generate(PROMPTS[:8], greedy, use_tqdm=False))
        return {"one_draft": {"greedy": served, "accepted": accepted_per_position(llm)}}


def main() -> None:
    replace_what_cannot_run_without_a_gpu()
    print("RESULT", json.dumps(crowded_grammar() | one_draft() | half_a_cache()))


if __name__ == "__main__":
    main()
