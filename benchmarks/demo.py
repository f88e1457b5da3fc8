"""Serve the shipped model three times over HTTP and see what speculation gains: `make demo`, two to three minutes.

No speculation, vLLM's own MTP (greedy drafts), and bebop answer the same prompts at temperature 1. All three return
text of the same distribution; they differ in how many tokens one step of the model yields. The latter two draft with
the same head, so that what differs between them is how drafts are chosen and accepted.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from openai import OpenAI

from vllm_bebop.bench.conditions import MEND_CPU, MEND_CPU_NOTE, command_line, commit, describe, on_cpu
from vllm_bebop.bench.prompts import BUILTIN_DOMAINS, builtin_texts
from vllm_bebop.bench.server import ProgressLine, Server, wait_until_ready
from vllm_bebop.durable import write_json
from vllm_bebop.train.tokens import tokenise_text

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tiny_model" / "checkpoint"
TRAINED_DRAFT = ROOT / "tiny_model" / "draft"
OUTPUT = ROOT / "benchmarks" / "results" / "demo.json"

NUM_SPECULATIVE_TOKENS = 3
TEMPERATURE = 1.0
PROMPTS_PER_DOMAIN = 16
PROMPT_TOKENS = 64
MAX_TOKENS = 64
CONCURRENCY = 8
LABELS = {
    "no_speculation": "no speculation",
    "stock_greedy": "vLLM's own MTP (greedy draft)",
    "bebop": "bebop (rejection sampling)",
}


def main() -> None:
    os.chdir(ROOT)
    if not (MODEL / "config.json").is_file():
        raise SystemExit(f"{MODEL.relative_to(ROOT)} is missing: check it out, or make it with tiny_model/build.py")
    started = time.monotonic()
    draft = str(TRAINED_DRAFT) if TRAINED_DRAFT.is_dir() else None
    prompts = load_prompts()
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(server) for name, server in make_servers(draft).items()}
        wait_until_ready(servers.values())
        for name, server in servers.items():
            results[name] = measure(server, prompts)
    print(table(results, draft))
    write_json(OUTPUT, results | {"conditions": conditions(draft, len(prompts))})
    print(f"\n{OUTPUT.relative_to(ROOT)} written; {time.monotonic() - started:.0f} s in all.")


def make_servers(draft: str | None) -> dict[str, Server]:
    """All three start at once: most of a start is waiting."""
    drafting: dict[str, Any] = {"num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
    if draft is not None:
        drafting["model"] = draft
    speculative_configs: dict[str, dict[str, Any] | None] = {
        "no_speculation": None,
        "stock_greedy": {"method": "mtp", **drafting},
        "bebop": {"method": "bebop", **drafting},
    }
    # Told how much to take: measured, each would count the others' memory as its own.
    shared_gpu = () if on_cpu() else ("--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**30))
    # Three engines on a CPU's few cores: more threads would only wait for each other.
    shared_cpu = {"OMP_NUM_THREADS": "1"} if on_cpu() else {}
    return {
        name: Server(
            MODEL,
            speculative_config,
            name=LABELS[name],
            arguments=shared_gpu,
            environment=shared_cpu | (MEND_CPU if name == "stock_greedy" else {}),
        )
        for name, speculative_config in speculative_configs.items()
    }


def load_prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [text for domain in BUILTIN_DOMAINS for text in builtin_texts(domain, PROMPTS_PER_DOMAIN)]
    return [tokenise_text(text, tokenizer)[:PROMPT_TOKENS] for text in texts]


def measure(server: Server, prompts: list[list[int]]) -> dict[str, Any]:
    """Answer every prompt, CONCURRENCY at a time, and read what the server's own counters say."""
    client = OpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0)

    def complete(prompt: list[int], max_tokens: int = MAX_TOKENS) -> None:
        client.completions.create(
            model=server.model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=TEMPERATURE,
            extra_body={"ignore_eos": True},
        )

    complete(prompts[0][: PROMPT_TOKENS // 2], 4)  # first-use costs
    before, started, progress = server.metrics(), time.perf_counter(), ProgressLine()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        for done, _ in enumerate(pool.map(complete, prompts), start=1):
            progress.show(f"{server.name}: {done} of {len(prompts)} answers")
    wall_s = time.perf_counter() - started
    progress.clear()
    counted = server.metrics() - before
    # A request's first step reads the prompt and yields a token; every other one is a round, or yields one token.
    steps = len(prompts) + counted.num_drafts if counted.num_drafts else counted.generation_tokens
    return {
        "acceptance_length": round(counted.acceptance_length, 4),
        "per_position": [round(share, 4) for share in counted.acceptance_per_position],
        "tokens_per_target_step": round(counted.generation_tokens / steps, 4),
        "generated_tokens": counted.generation_tokens,
        "num_rounds": counted.num_drafts,
        "wall_s": round(wall_s, 2),
    }


def conditions(draft: str | None, num_prompts: int) -> dict[str, Any]:
    return describe(str(MODEL), draft) | {
        "commit": commit(),
        "command": command_line(),
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "temperature": TEMPERATURE,
        "prompts": f"{num_prompts} of {PROMPT_TOKENS} tokens: Python's standard-library sources and documentation",
        "max_tokens": MAX_TOKENS,
        "concurrency": CONCURRENCY,
        "notes": [
            "acceptance_length: accepted drafts per round plus the one token that the target always adds.",
            "per_position[i]: share of rounds that accepted at least i + 1 drafts.",
            MEND_CPU_NOTE,
        ],
    }


def table(results: dict[str, Any], draft: str | None) -> str:
    lines = [
        f"{'':<30}{'acceptance':>11}{'accepted at position':>22}{'tokens per':>13}{'wall':>8}",
        f"{'':<30}{'length':>11}{'1 / 2 / 3':>22}{'target step':>13}{'time':>8}",
    ]
    for name, result in results.items():
        positions = " / ".join(f"{share:.2f}" for share in result["per_position"]) or "-"
        lines.append(
            f"{LABELS[name]:<30}{result['acceptance_length']:>11.2f}{positions:>22}"
            f"{result['tokens_per_target_step']:>13.2f}{result['wall_s']:>6.1f} s"
        )
    stock, bebop = results["stock_greedy"]["acceptance_length"], results["bebop"]["acceptance_length"]
    head = "the model's own" if draft is None else "trained for the model"
    lines += [
        "",
        f"With one and the same head ({head}), bebop keeps {bebop:.2f} tokens per verification",
        f"where vLLM's greedy drafts keep {stock:.2f}; the text has the same distribution in all three. Each",
        "verification is one step of the model, and on a large model the steps are what takes the time. On one as",
        "small as this, on a CPU, wall times are not the point.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
