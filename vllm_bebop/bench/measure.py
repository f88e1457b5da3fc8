"""One engine, in a process of its own: serve every domain and temperature, then compute what should have come out.

`measure` is the process's entry point; vLLM is imported only there, after its environment is set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from vllm_bebop.bench.conditions import MEND_CPU, engine_environment, engine_options, on_cpu
from vllm_bebop.bench.counters import Counters, from_llm
from vllm_bebop.bench.rounds import (
    Generation,
    accepted_at_least,
    check_against_counters,
    ratio_with_interval,
)
from vllm_bebop.config import forget_wishes

if TYPE_CHECKING:
    import torch
    from vllm import LLM


@dataclass(frozen=True)
class Method:
    """How to draft and accept: vLLM's speculative config, and which of `expectation.SURVIVAL` it must agree with."""

    speculative_config: dict[str, Any]
    acceptance: str

    @property
    def is_stock(self) -> bool:
        return self.speculative_config["method"] != "bebop"


METHODS = {
    "stock_greedy": Method({"method": "mtp"}, "target_only"),
    "stock_probabilistic": Method({"method": "mtp", "draft_sample_method": "probabilistic"}, "rejection"),
    "bebop_target_only": Method({"method": "bebop", "acceptance": "target_only"}, "target_only"),
    "bebop_rejection": Method({"method": "bebop"}, "rejection"),
    "bebop_block": Method({"method": "bebop", "acceptance": "block"}, "block"),
}


# Arguments of `vllm.LLM` that are the sweep's own.
ENGINE_ARGUMENTS = (
    *("model", "speculative_config", "skip_tokenizer_init", "disable_log_stats", "enable_prefix_caching"),
    *("max_model_len", "seed", "tensor_parallel_size"),
)


@dataclass(frozen=True)
class Job:
    """One engine's work.

    prompts: token ids by domain; max_tokens: generated per request, end-of-text ignored; engine: see `Sweep`.
    """

    method: str
    num_speculative_tokens: int
    model: str
    draft: str | None
    prompts: dict[str, list[list[int]]]
    temperatures: tuple[float, ...]
    top_k: int | None
    top_p: float | None
    max_tokens: int
    seed: int
    expectation: bool
    tensor_parallel_size: int
    engine: dict[str, Any]

    @property
    def num_ticks(self) -> int:
        """How many times `measure` reports progress."""
        return len(self.prompts) * len(self.temperatures) * (2 if self.expectation else 1)

    def sampling(self, temperature: float) -> dict[str, Any]:
        """The policy of all requests at this temperature, by names that vLLM and `SamplingPolicy` share."""
        limits = {"temperature": temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def draft_sampling(self, temperature: float) -> dict[str, Any]:
        """What drafts follow of it: all under bebop, the temperature alone under stock vLLM.

        In vLLM 0.32, runner V1, `llm_base_proposer.compute_probs_and_sample_next_token` draws from softmax(z / T) and
        keeps that as q, while `rejection_sampler.apply_sampling_constraints` filters p; V2's speculator does the same.
        To a greedy draft it makes no difference.
        """
        return {"temperature": temperature} if METHODS[self.method].is_stock else self.sampling(temperature)


@dataclass(frozen=True)
class _Served:
    domain: str
    temperature: float
    generations: list[Generation]
    wall_s: float
    dtype: torch.dtype  # that the engine computes in


def measure(job: Job, results: Connection, log_path: str) -> None:
    """Run the job; sends None for each unit of progress, then the list of finished cells. Output goes to `log_path`."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    forget_wishes(os.environ)
    os.environ.update(engine_environment(job.model, job.draft))
    if METHODS[job.method].is_stock and on_cpu():
        os.environ.update(MEND_CPU)

    served = []
    for cell in _serve(job):
        served.append(cell)
        results.send(None)
    expected: list[list[Any] | None] = [None] * len(served)
    if job.expectation:
        for index, survival in enumerate(_expect(job, served)):
            expected[index] = survival
            results.send(None)
    results.send([_summary(job, cell, survival) for cell, survival in zip(served, expected, strict=True)])


def _serve(job: Job) -> Iterator[_Served]:
    from vllm import LLM

    longest = max(len(prompt) for prompts in job.prompts.values() for prompt in prompts)
    speculation = METHODS[job.method].speculative_config | {"num_speculative_tokens": job.num_speculative_tokens}
    if job.draft is not None:
        speculation["model"] = job.draft
    llm = LLM(
        job.model,
        speculative_config=speculation,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        enable_prefix_caching=False,  # the same prompts come again at every temperature; each time counts alike
        # Room for the drafts being verified and for the next ones: as soon as one request lacks it, model runner V1
        # drafts for none of the batch, and counts what it verifies all the same.
        max_model_len=longest + job.max_tokens + 2 * (job.num_speculative_tokens + 1),
        seed=job.seed,
        tensor_parallel_size=job.tensor_parallel_size,
        **engine_options() | job.engine,
    )
    # First-use costs, kept out of the times.
    _generate(llm, [next(iter(job.prompts.values()))[0]], 4, job.sampling(1.0))
    for domain, prompts in job.prompts.items():
        for temperature in job.temperatures:
            before = from_llm(llm.get_metrics())
            started = time.perf_counter()
            generations = _generate(llm, prompts, job.max_tokens, job.sampling(temperature))
            wall_s = time.perf_counter() - started
            counted: Counters = from_llm(llm.get_metrics()) - before
            check_against_counters(generations, counted, job.num_speculative_tokens)
            yield _Served(domain, temperature, generations, wall_s, llm.model_config.dtype)
    llm.llm_engine.engine_core.shutdown()  # frees the GPU for the expectation


def _generate(llm: LLM, prompts: list[list[int]], max_tokens: int, sampling: Mapping[str, Any]) -> list[Generation]:
    """All prompts at once, step by step: each engine step hands out what one target step of a request gave."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        **sampling,
        max_tokens=max_tokens,
        ignore_eos=True,  # a fixed length, so that what a round drew does not decide whether it counts
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    generations = {str(index): Generation(prompt, []) for index, prompt in enumerate(prompts)}
    for request_id, generation in generations.items():
        llm.llm_engine.add_request(request_id, {"prompt_token_ids": generation.prompt_token_ids}, params)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if token_ids := list(output.outputs[0].token_ids):
                generations[output.request_id].steps.append(token_ids)
    return list(generations.values())


def _expect(job: Job, served: list[_Served]) -> Iterator[list[Any]]:
    """For each cell, by request: expected survival of its rounds, [num_speculative_tokens, rounds]."""
    import torch

    from vllm_bebop.bench.expectation import expected_survival
    from vllm_bebop.draft import resolve_draft
    from vllm_bebop.train.heads import load_head
    from vllm_bebop.train.losses import SamplingPolicy
    from vllm_bebop.train.target import find_checkpoint, load_target

    download_dir = job.engine.get("download_dir")
    directory = find_checkpoint(job.model, job.engine.get("revision"), download_dir)
    model = load_target(directory, torch.device("cpu" if on_cpu() else "cuda"), served[0].dtype)
    head = load_head(directory if job.draft is None else resolve_draft(job.draft, None, download_dir), model)
    for cell in served:
        policy = SamplingPolicy(**job.sampling(cell.temperature))
        draft_policy = SamplingPolicy(**job.draft_sampling(cell.temperature))
        yield [
            expected_survival(
                model,
                head,
                generation.token_ids,
                [generation.anchor(round_) for round_ in generation.rounds(job.num_speculative_tokens)],
                job.num_speculative_tokens,
                policy,
                draft_policy,
                METHODS[job.method].acceptance,
            ).numpy()
            for generation in cell.generations
        ]


def _summary(job: Job, cell: _Served, expected: list[Any] | None) -> dict[str, Any]:
    """One cell of the results; every average is over rounds, every interval over requests."""
    rounds = [generation.rounds(job.num_speculative_tokens) for generation in cell.generations]
    counts = [len(each) for each in rounds]
    accepted = [accepted_at_least(each, job.num_speculative_tokens).sum(1) for each in rounds]
    num_generated = sum(generation.num_generated for generation in cell.generations)
    summary = {
        "domain": cell.domain,
        "temperature": cell.temperature,
        "num_requests": len(counts),
        "num_rounds": sum(counts),
        "acceptance_length": ratio_with_interval(
            [1 * n + a.sum() for n, a in zip(counts, accepted, strict=True)], counts
        ),
        "acceptance_per_position": ratio_with_interval(accepted, counts),
        "tokens_per_target_step": round(num_generated / sum(len(each.steps) for each in cell.generations), 4),
        "tok_s": round(num_generated / cell.wall_s, 1),
    }
    if expected is not None:
        chances = [each.sum(1) for each in expected]
        summary["expected"] = {
            "acceptance_length": round(1 + float(sum(c.sum() for c in chances)) / sum(counts), 5),
            "acceptance_per_position": ratio_with_interval(chances, counts)["mean"],
        }
        summary["measured_minus_expected"] = ratio_with_interval(
            [float((a - c).sum()) for a, c in zip(accepted, chances, strict=True)], counts
        )
    return summary
