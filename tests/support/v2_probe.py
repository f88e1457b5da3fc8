"""What model runner V2 does under bebop, for a test to read: `python -m tests.support.v2_probe`.

V2 is chosen by the environment before vLLM is imported, and without a GPU runs in Triton's interpreter, hence a process
of its own. Prints one JSON line: tokens and log-probabilities of both samplers (the fused kernels and the reference),
and, with a draft cache for half of the requests, greedy tokens and the p-values of the law of the first tokens, honest
and with a planted fault.
"""

import json
from dataclasses import replace
from typing import Any

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
LAW_PROMPT = "   +-----------+"
NUM_SAMPLES = 300
NUM_REQUESTS = 64
NUM_CACHED = NUM_REQUESTS // 2
# A cache of its own size: V2's block tables are as long as the context, and the interpreter pays for each block.
OPTIONS = {"max_num_seqs": NUM_REQUESTS, "max_model_len": 64, "logprobs_mode": "processed_logprobs"}


def use(llm: Any, backend: Any) -> None:
    """Exchange the sampler inside a running engine."""
    inside = runner(llm)
    for place in (inside.speculator, inside.sampler, inside.rejection_sampler):
        place.bebop = replace(place.bebop, backend=backend)


def both_samplers() -> dict[str, Any]:
    from vllm import SamplingParams

    from vllm_bebop.kernels.backend import fused, plain

    def params(i: int, penalty: float) -> SamplingParams:
        temperature = (0.0, 0.7, 1.0, 1.3)[i % 4]
        wanted = {"temperature": temperature, "repetition_penalty": penalty, "seed": i}
        return SamplingParams(**wanted, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)

    result: dict[str, Any] = {}
    with engine(BEBOP, **OPTIONS) as llm:
        inside = runner(llm)
        places = inside.speculator, inside.sampler, inside.sampler.sampling_states, inside.rejection_sampler
        result["classes"] = [type(place).__name__ for place in places]
        result["backend"] = inside.speculator.bebop.backend.name
        seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=MAX_TOKENS, ignore_eos=True)
        result["seeded"] = token_ids(llm.generate(PROMPTS[:20], seeded, use_tqdm=False))
        # The first half asks for a temperature at most; one request of the second half makes vLLM process its logits.
        for half, penalty in ((PROMPTS[::4], 1.0), (PROMPTS[1::4], 1.5)):
            for name, backend in (("kernels", fused()), ("reference", plain())):
                use(llm, backend)
                wanted = [params(i, penalty if i == 1 else 1.0) for i in range(len(half))]
                outputs = llm.generate(half, wanted, use_tqdm=False)
                result.setdefault(name, []).extend(
                    [[(token, step[token].logprob) for token, step in zip(c.token_ids, c.logprobs, strict=True)]
                     for output in outputs for c in output.outputs]
                )  # fmt: skip
    return result


def half_a_cache() -> dict[str, Any]:
    from vllm import SamplingParams

    from vllm_bebop.kernels import verification_kernel

    result: dict[str, Any] = {}
    vocab_size = json.loads((TINY_MODEL / "config.json").read_text())["vocab_size"]
    request_bytes = BEBOP["num_speculative_tokens"] * vocab_size * 4  # fp32
    with engine(BEBOP | {"draft_cache_gib": NUM_CACHED * request_bytes / 2**30}, **OPTIONS) as llm:
        result["num_cached"] = len(runner(llm).speculator.draft_logits)
        greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        result["greedy"] = token_ids(llm.generate(PROMPTS, greedy, use_tqdm=False))
        prompt = llm.get_tokenizer().encode(LAW_PROMPT)
        drawn = laws.sample(llm, prompt, NUM_SAMPLES, first_seed=0, temperature=1.0)
        result["honest"] = laws.p_values(drawn, TINY_MODEL, prompt)
        verification_kernel.is_below_ratio = lambda u, log_a, log_b: u > 0  # the planted fault: accept every draft
        drawn = laws.sample(llm, prompt, NUM_SAMPLES // 3, first_seed=NUM_SAMPLES, temperature=1.0)
        result["faulty"] = laws.p_values(drawn, TINY_MODEL, prompt)
        result["rounds"], result["accepted"] = accepted_per_position(llm)
    return result


def main() -> None:
    print("RESULT", json.dumps(both_samplers() | half_a_cache()))


if __name__ == "__main__":
    main()
