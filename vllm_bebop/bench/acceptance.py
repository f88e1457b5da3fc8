"""The acceptance benchmark: methods x draft lengths x domains x temperatures on the real engine, resumable.

Every (method, gamma) is one engine in a fresh process (`bench.measure`); what an engine has finished stays in the
results file and is not run again; a file of other conditions is refused.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_bebop.bench.conditions import MEND_CPU_NOTE, command_line, commit, describe
from vllm_bebop.bench.measure import ENGINE_ARGUMENTS, METHODS, Job, measure
from vllm_bebop.bench.prompts import builtin_texts
from vllm_bebop.durable import write_json
from vllm_bebop.errors import UserError
from vllm_bebop.train.records import BadLines, read_lines
from vllm_bebop.train.tokens import tokenise_prompt, tokenise_text, tokenizer_and_vocab_size

_LOG_TAIL_LINES = 40
_NOTES = (
    "acceptance_length: accepted drafts per round plus the one token that the target always adds, 1 .. gamma + 1.",
    "acceptance_per_position[i]: share of rounds that accepted at least i + 1 drafts.",
    "Rounds: only those that began with gamma + 1 tokens or more still to generate, so that the length limit cut none.",
    "tokens_per_target_step: every token over every target step of its request, prompts and cut rounds included.",
    "expected: exact expectation (Transformers, in the dtype served) over the same rounds on the text generated.",
    "top_k, top_p: of every request. bebop filters drafts as the target is filtered, stock vLLM does not.",
    "interval_95: bootstrap over requests.",
    "tok_s: all requests of a cell at once, prompts included; on a CPU it says nothing about a GPU.",
    MEND_CPU_NOTE,
)


class BenchError(UserError):
    """An engine failed, or a sweep asks for something that cannot be measured."""


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Args:
        model, draft: directory or Hub id; without a draft, the model's own head.
        prompts: token ids by domain.
        gammas: numbers of draft tokens.
        temperatures: above 0.
        top_k, top_p: of every request; None for no limit.
        max_tokens: generated per request; end-of-text is ignored.
        expectation: compare with the exact expectation, which loads the model in Transformers, on one device.
        tensor_parallel_size: of the engine.
        engine: further arguments of vllm.LLM, JSON-serialisable: gpu_memory_utilization, trust_remote_code, ...
    Raises:
        BenchError: an empty or impossible sweep.
    """

    model: str
    prompts: Mapping[str, Sequence[Sequence[int]]]
    draft: str | None = None
    methods: tuple[str, ...] = tuple(METHODS)
    gammas: tuple[int, ...] = (3,)
    temperatures: tuple[float, ...] = (0.3, 0.7, 1.0)
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int = 64
    seed: int = 0
    expectation: bool = True
    tensor_parallel_size: int = 1
    engine: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise BenchError(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
        if not (self.methods and self.gammas and self.temperatures and self.prompts):
            raise BenchError("nothing to measure: methods, gammas, temperatures and domains must not be empty")
        if min(self.temperatures) <= 0:
            raise BenchError("temperatures must be above 0: greedy requests accept the same under every method")
        if self.top_k is not None and self.top_k < 1:
            raise BenchError(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BenchError(f"top_p is {self.top_p}, expected a number in (0, 1]")
        if min(self.gammas) < 1 or self.max_tokens <= max(self.gammas) + 1:
            raise BenchError("gammas must be at least 1, and max_tokens above gamma + 1")
        if own := [key for key in self.engine or {} if key in ENGINE_ARGUMENTS]:
            raise BenchError(f"engine: {', '.join(own)} cannot be set there, the benchmark sets it itself")

    def conditions(self) -> dict[str, Any]:
        """All that a cell's numbers depend on, besides its own method, gamma, domain and temperature."""
        texts = json.dumps({domain: list(map(list, prompts)) for domain, prompts in self.prompts.items()})
        return (
            describe(self.model, self.draft)
            | {
                "domains": {domain: len(prompts) for domain, prompts in self.prompts.items()},
                "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest()[:16],
                "temperatures": list(self.temperatures),
                "top_k": self.top_k,
                "top_p": self.top_p,
                "max_tokens": self.max_tokens,
                "seed": self.seed,
                "expectation": self.expectation,
                "tensor_parallel_size": self.tensor_parallel_size,
            }
            | ({"engine": dict(self.engine)} if self.engine else {})
        )

    def jobs(self) -> list[Job]:
        """One per (method, gamma)."""
        prompts = {domain: [list(prompt) for prompt in each] for domain, each in self.prompts.items()}
        return [
            Job(
                method,
                gamma,
                self.model,
                self.draft,
                prompts,
                self.temperatures,
                self.top_k,
                self.top_p,
                self.max_tokens,
                self.seed,
                self.expectation,
                self.tensor_parallel_size,
                dict(self.engine or {}),
            )
            for gamma in self.gammas
            for method in self.methods
        ]


def load_prompts(
    model: str, domains: Sequence[str], data: Mapping[str, str], count: int, max_tokens: int, seed: int
) -> dict[str, list[list[int]]]:
    """Token ids by domain: built-in `domains`, then the JSONL or Parquet files of `data` (name -> path).

    Args:
        data: lines are in a form of `tokenise_prompt`.
        count: prompts per domain, of a file drawn at random by `seed` and kept in its order.
        max_tokens: longer ones are cut.
    Raises:
        PromptError: a domain is unknown. DataError: a file is missing, or a line is bad. UserError: no such model.
    """
    tokenizer, vocab_size = tokenizer_and_vocab_size(model)

    def parse(record: Mapping[str, Any]) -> list[int]:
        return tokenise_prompt(record, tokenizer, vocab_size)[1][:max_tokens]

    prompts = {
        domain: [tokenise_text(text, tokenizer)[:max_tokens] for text in builtin_texts(domain, count, seed)]
        for domain in domains
    }
    for name, path in data.items():
        found = [prompt for _, prompt in read_lines([path], parse, BadLines(), strict=True)]
        drawn = random.Random(f"{seed} {Path(path).name}").sample(range(len(found)), min(count, len(found)))
        prompts[name] = [found[index] for index in sorted(drawn)]
    return prompts


def run(
    sweep: Sweep, output: Path, run_job: Callable[[Job, Any], list[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """Measure what `output` does not hold yet; the file is written after every engine and also returned.

    Args:
        output: JSON; see its "notes" for the meaning of every number.
        run_job: measures one engine; tests put their own here.
    Raises:
        BenchError: `output` cannot be written, or holds something else; or an engine failed, and what had finished
            before is kept.
    """
    conditions, jobs = sweep.conditions(), sweep.jobs()
    results = _resume(output, conditions)
    try:
        write_json(output, results)
    except OSError as error:
        raise BenchError(f"{output} cannot be written ({error.strerror}): name another --output") from None
    done = {(engine["method"], engine["num_speculative_tokens"]) for engine in results["engines"]}
    waiting = [job for job in jobs if (job.method, job.num_speculative_tokens) not in done]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} engines are in {output} already")
    with tqdm(total=sum(job.num_ticks for job in waiting), unit="cell", disable=not waiting) as progress:
        for job in waiting:
            progress.set_description(f"{job.method}, gamma {job.num_speculative_tokens}")
            started = time.monotonic()
            cells = (run_job or _run_job)(job, progress)
            results["engines"].append(
                {
                    "method": job.method,
                    "num_speculative_tokens": job.num_speculative_tokens,
                    "command": command_line(),
                    "commit": commit(),
                    "wall_s": round(time.monotonic() - started, 1),
                    "cells": cells,
                }
            )
            write_json(output, results)
    return results


def _resume(output: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """The results so far, none without a file. Raises BenchError where they are not of the same conditions."""
    fresh = {"conditions": conditions, "notes": list(_NOTES), "engines": []}
    if not output.exists():
        return fresh
    try:
        found = json.loads(output.read_text())
        before, engines = found["conditions"], found["engines"]
    except (OSError, ValueError, TypeError, KeyError):
        raise BenchError(f"{output} is no result of `bebop bench`: name another --output") from None
    if not engines:  # the first one failed
        return fresh
    if changed := [key for key in conditions.keys() | before.keys() if conditions.get(key) != before.get(key)]:
        raise BenchError(
            f"{output} was measured under other conditions ({', '.join(sorted(changed))}): name another --output, or "
            "remove it"
        )
    return found


def _run_job(job: Job, progress: Any) -> list[dict[str, Any]]:
    """`measure` in a fresh process: an engine must not inherit another's environment, patches or memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = context.Process(target=measure, args=(job, sender, log.name))
        process.start()
        sender.close()  # the child's copy stays: its end is ours to see
        cells = None
        try:
            while cells is None:
                cells = receiver.recv()
                progress.update(cells is None)
        except EOFError:
            process.join()
            tail = "\n".join(Path(log.name).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
            raise BenchError(
                f"{job.method} with {job.num_speculative_tokens} draft tokens failed; the end of its log:\n{tail}"
            ) from None
        finally:
            if cells is None:
                process.terminate()
            process.join()
    return cells


def table(results: Mapping[str, Any]) -> str:
    """The acceptance lengths as text, the exact expectation in brackets, and how often the two agree."""
    temperatures = results["conditions"]["temperatures"]
    lines = [f"{'method':<22}{'gamma':>5}  {'domain':<12}" + "".join(f"{f'T = {t}':>16}" for t in temperatures)]
    agreeing = compared = 0
    for engine in results["engines"]:
        for domain in results["conditions"]["domains"]:
            cells = [cell for cell in engine["cells"] if cell["domain"] == domain]
            gamma = engine["num_speculative_tokens"]
            lines.append(f"{engine['method']:<22}{gamma:>5}  {domain:<12}" + "".join(f"{_shown(c):>16}" for c in cells))
            intervals = [cell["measured_minus_expected"]["interval_95"] for cell in cells if "expected" in cell]
            compared += sum(interval is not None for interval in intervals)
            agreeing += sum(interval is not None and interval[0] <= 0 <= interval[1] for interval in intervals)
    if compared:
        lines += ["", f"Measured and expected agree within the 95 % interval in {agreeing} of {compared} cells."]
    return "\n".join(lines)


def _shown(cell: Mapping[str, Any]) -> str:
    expected = f" ({cell['expected']['acceptance_length']:.3f})" if "expected" in cell else ""
    return f"{cell['acceptance_length']['mean']:.3f}{expected}"
