"""What model runner V2 does under bebop, for a test to read: `python -m tests.support.v2_probe`.

V2 is chosen by the environment before vLLM is imported, and without a GPU its kernels are interpreted or emulated:
hence a process of its own. Prints one JSON line: answers to requests of every kind, as `answers` asks for them, also
without asynchronous scheduling; tokens and log-probabilities of both samplers (the fused kernels and the reference);
which kernels were compiled, and when.
"""

import json
from dataclasses import replace
from typing import Any

from tests.support import grammar
from tests.support.engines import BEBOP, engine, replace_what_cannot_run_without_a_gpu, runner

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
FILTERS = {"top_k": 7, "top_p": 0.8}
# What a request may ask for besides a policy of sampling. All of it changes the text that this prompt and seed give.
KINDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "n": {"n": 3},
    "stop": {"stop": ["e", "u"]},
    "stop_token_ids": {"stop_token_ids": list(range(13, 60))},
    "min_tokens": {"min_tokens": 6, "stop": ["a"]},
    "bad_words": {"bad_words": ["bu"]},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "allowed_token_ids": {"allowed_token_ids": list(range(5, 200))},
    "choice": {"structured_outputs": {"choice": ["yes", "no", "perhaps not"]}},
    "json": {
        "structured_outputs": {
            "json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        }
    },
}
KINDS_PROMPT, KINDS_SEED = "The module provides ", 7
# Short contexts, since the interpreter pays for each block of a block table; and few blocks, so that twelve long
# prompts are preempted, but none of the other batches.
OPTIONS = {"max_num_seqs": 32, "max_model_len": 96, "block_size": 32, "num_gpu_blocks_override": 24}

SCORED_PROMPTS = PROMPTS[::4], PROMPTS[1::4]
SCORED_IDS = range(10, 90)

LAW_PROMPT = "   +-----------+"


def use(llm: Any, backend: Any) -> None:
    """Exchange the sampler inside a running engine."""
    inside = runner(llm)
    for place in (inside.speculator, inside.sampler, inside.rejection_sampler):
        place.bebop = replace(place.bebop, backend=backend)


def seeded(i: int) -> dict[str, Any]:
    """Sampling parameters of the i-th seeded request; every other one is filtered."""
    filters = FILTERS if i % 2 else {}
    return {"temperature": 1.0, "seed": 3, "max_tokens": MAX_TOKENS, "ignore_eos": True} | filters


def scored(half: int, i: int) -> dict[str, Any]:
    """Sampling parameters of the i-th request of `SCORED_PROMPTS[half]`, whose log-probabilities are compared.

    The first half asks for a temperature at most; three requests of the second make vLLM process the logits of all.
    """
    wanted: dict[str, Any] = {"temperature": (0.0, 0.7, 1.0, 1.3)[i % 4], "seed": i}
    if half == 1 and i == 1:
        wanted["repetition_penalty"] = 1.5
    if half == 1 and i in (5, 7):
        wanted |= FILTERS
    return wanted | {"max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 0}


def answers(llm: Any) -> dict[str, Any]:
    """What an engine with `OPTIONS`, of either model runner, answers to requests of every kind."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def ask(prompts: list[Any], wanted: list[dict[str, Any]]) -> list[Any]:
        return llm.generate(prompts, [SamplingParams(**each) for each in wanted], use_tqdm=False)

    def told(outputs: list[Any]) -> list[list[Any]]:
        return [[c.text, list(c.token_ids), c.finish_reason, c.stop_reason] for o in outputs for c in o.outputs]

    greedy = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    result: dict[str, Any] = {"seeded": told(ask(PROMPTS[:20], [seeded(i) for i in range(20)]))}

    wanted = [{"temperature": 1.0, "seed": KINDS_SEED, "max_tokens": MAX_TOKENS} | kind for kind in KINDS.values()]
    for each in wanted:
        if "structured_outputs" in each:
            each["structured_outputs"] = StructuredOutputsParams(**each["structured_outputs"])
    outputs = ask([KINDS_PROMPT] * len(wanted), wanted)
    result["kinds"] = {kind: told([output]) for kind, output in zip(KINDS, outputs, strict=True)}

    prompt = llm.get_tokenizer().encode(LAW_PROMPT)
    with grammar.unsuited_head(llm, prompt):
        result["grammar"] = grammar.sample(llm, prompt, 20, first_seed=0)

    almost_full = {"prompt_token_ids": list(range(5, 95))}  # 6 tokens below max_model_len
    beyond = {"max_tokens": 50, "ignore_eos": True}
    result["max_model_len"] = told(ask([almost_full] * 2, [greedy | beyond, seeded(0) | beyond]))

    long = {"prompt_token_ids": list(range(30, 100))}  # two blocks and more, of which the first may be found again
    outputs = [ask([long], [greedy])[0] for _ in range(2)]
    result["prefix_cache"] = [told(outputs), [output.num_cached_tokens for output in outputs]]

    before = _num_preemptions(llm)
    crowd = [{"prompt_token_ids": list(range(start, start + 60))} for start in range(20, 104, 7)]
    result["preemption"] = told(ask(crowd, [greedy] * len(crowd)))
    result["num_preemptions"] = before, _num_preemptions(llm)
    return result


def is_asynchronous(llm: Any) -> bool:
    """Whether the next step is scheduled before the last one's tokens are known."""
    return llm.llm_engine.vllm_config.scheduler_config.async_scheduling


def _num_preemptions(llm: Any) -> int:
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def both_samplers() -> dict[str, Any]:
    from vllm import SamplingParams

    from vllm_bebop.kernels.backend import fused, plain

    compiled = note_compilations()
    result: dict[str, Any] = {}
    with engine(BEBOP, **OPTIONS, logprobs_mode="processed_logprobs") as llm:
        inside = runner(llm)
        places = inside.speculator, inside.sampler, inside.sampler.sampling_states, inside.rejection_sampler
        result["classes"] = [type(place).__name__ for place in places]
        result["backend"] = inside.speculator.bebop.backend.name
        llm.generate(PROMPTS[:1], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
        result["compiled"] = {"at the start": list(compiled)}
        result["is_asynchronous"] = is_asynchronous(llm)
        result["answers"] = answers(llm)
        asked = SamplingParams(temperature=1.0, max_tokens=1, logprob_token_ids=list(SCORED_IDS), **FILTERS)
        (output,) = llm.generate(PROMPTS[:1], asked, use_tqdm=False)
        (scores,) = output.outputs[0].logprobs
        result["scored_ids"] = [scores[token].logprob for token in SCORED_IDS]
        for half, prompts in enumerate(SCORED_PROMPTS):
            wanted = [SamplingParams(**scored(half, i)) for i in range(len(prompts))]
            for name, backend in (("kernels", fused()), ("reference", plain())):
                use(llm, backend)
                outputs = llm.generate(prompts, wanted, use_tqdm=False)
                result.setdefault(name, []).append(
                    [[(token, step[token].logprob) for token, step in zip(c.token_ids, c.logprobs, strict=True)]
                     for output in outputs for c in output.outputs]
                )  # fmt: skip
        result["compiled"]["while serving"] = compiled[len(result["compiled"]["at the start"]) :]
    return result


def without_asynchronous_scheduling() -> dict[str, Any]:
    with engine(BEBOP, **OPTIONS, async_scheduling=False) as llm:
        return {"synchronous": {"is_asynchronous": is_asynchronous(llm), "answers": answers(llm)}}


def note_compilations() -> list[str]:
    """The names of our kernels, as Triton compiles them from now on."""
    import triton

    names: list[str] = []

    def note(*, fn: Any, **_: Any) -> None:
        if fn.module.startswith("vllm_bebop"):
            names.append(fn.name)

    triton.knobs.runtime.jit_post_compile_hook = note
    return names


def crowded_grammar() -> dict[str, Any]:
    """Tokens that the grammar forbids, and the length of each answer, where a step has room for half of the drafts.

    The other requests sit out a step after they have drafted: asynchronous scheduling never sees those drafts.
    """
    num_requests = 16
    with engine(BEBOP, **OPTIONS | {"max_num_seqs": num_requests, "max_num_batched_tokens": 2 * num_requests}) as llm:
        crowd: dict[str, Any] = {"is_asynchronous": is_asynchronous(llm)}
        prompt, allowed = llm.get_tokenizer().encode(LAW_PROMPT)[-2:], grammar.allowed_tokens(llm)
        with grammar.unsuited_head(llm, prompt):
            drawn = grammar.sample(llm, prompt, 3 * num_requests, first_seed=0, max_tokens=MAX_TOKENS)
    forbidden = [token for tokens in drawn for token in tokens if token not in allowed]
    lengths = [len(tokens) for tokens in drawn]
    return {"crowd": crowd | {"forbidden": forbidden, "lengths": lengths}}


def assert_crowd_was_served(crowd: dict[str, Any]) -> None:
    """vLLM ends a request with an error at a token that its grammar forbids."""
    assert crowd["forbidden"] == [] and set(crowd["lengths"]) == {MAX_TOKENS}


def main() -> None:
    replace_what_cannot_run_without_a_gpu()
    print("RESULT", json.dumps(both_samplers() | without_asynchronous_scheduling()))


if __name__ == "__main__":
    main()
