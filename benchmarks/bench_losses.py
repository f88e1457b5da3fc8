r"""Which loss makes the better head: all of them on the tiny model, from the same start, with the same budget.

    python benchmarks/bench_losses.py                 all of it; goes on where the same command was cut short
    ... --updates 320 --losses kl tv e2e_tv --out benchmarks/results/losses_320.json
    ... --start kl_head --losses kl tv e2e_tv --out benchmarks/results/losses_from_kl.json     after:
    bebop train --model tiny_model/checkpoint --data .venv/tiny_draft/rollouts.jsonl --loss kl --steps 3 \
        --learning-rate 1e-3 --batch-rows 4 --context 512 --epochs 3 --out kl_head

1. The tiny model continues prompts, of its training texts to train on and of held-out ones to evaluate on.
2. Every loss starts from the checkpoint's own head (one step, cross-entropy), or --start's, and takes the same updates.
   Seed 0 tries every learning rate of one grid; the best on validation text is taken for all seeds. A seed orders the
   data.
3. The head is evaluated on the continuations of held-out prompts, as `bebop eval` does: acceptance length as an engine
   counts it, under rejection sampling and under target-only acceptance, by domain.

Writes benchmarks/results/losses.json, losses.md (the table) and losses.png, or others by --out. Runs in a file that was
measured with other code, versions or texts, or on another device, do not compare with today's: it is refused.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from vllm_bebop import generate
from vllm_bebop.bench.conditions import describe
from vllm_bebop.durable import write_json
from vllm_bebop.train.data import Documents, PackedRows, Row, load_documents
from vllm_bebop.train.evaluate import evaluate, texts
from vllm_bebop.train.heads import MTPHead, load_head
from vllm_bebop.train.loop import Settings, Trainer
from vllm_bebop.train.losses import LOSSES, SamplingPolicy
from vllm_bebop.train.objective import Rollout
from vllm_bebop.train.processes import Processes
from vllm_bebop.train.run import load_target

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tiny_model"))
import train_draft as tiny_draft  # noqa: E402

MODEL = tiny_draft.CHECKPOINT
RESULTS = ROOT / "benchmarks" / "results" / "losses.json"
DOMAINS = ("code", "prose", "math", "agent")
PURPOSES = ("validation", "held_out")  # of the text to evaluate on
START = "start"  # the head that every loss starts from

NUM_STEPS = 3  # draft steps, in training and in evaluation
RATES = (3e-4, 1e-3, 3e-3)
VALIDATION, HELD_OUT, NEW_TOKENS = 8, 24, 160  # documents per domain, and tokens of each
CONTEXT, BATCH_ROWS = 512, 2


def make_texts(directory: Path) -> None:
    """On-policy text to evaluate on, PURPOSE_DOMAIN.jsonl in `directory`: continuations of held-out prompts."""
    held_out = {d: (tiny_draft.HERE / "held_out" / f"{d}.jsonl").read_text().splitlines() for d in DOMAINS}
    prompts, samples = directory / "prompts.jsonl", directory / "evaluation.jsonl"
    with open(prompts, "w") as file:
        for domain, lines in held_out.items():
            for number, line in enumerate(lines[: VALIDATION + HELD_OUT]):
                purpose = "validation" if number < VALIDATION else "held_out"
                file.write(json.dumps({"id": f"{purpose}_{domain} {number}"} | json.loads(line)) + "\n")
    sampling = generate.Sampling(max_tokens=NEW_TOKENS)
    generate.run(
        *(str(MODEL), [prompts], samples, sampling),
        num_speculative_tokens=NUM_STEPS,
        prompt_tokens=tiny_draft.PROMPT_TOKENS,
    )
    by_file: dict[str, list[str]] = {}
    for line in samples.read_text().splitlines(keepends=True):
        by_file.setdefault(json.loads(line)["id"].split()[0], []).append(line)
    for name, lines in by_file.items():
        (directory / f"{name}.jsonl").write_text("".join(lines))


class CachingTrainer(Trainer):
    """Runs the frozen target once per row, not once per row and run."""

    cache: dict[bytes, tuple[Tensor, Tensor]] = {}

    def hidden_states(self, row: Row) -> tuple[Tensor, Tensor]:
        key = row.token_ids.numpy().tobytes()
        if key not in self.cache:
            self.cache[key] = super().hidden_states(row)
        return self.cache[key]


_worker: dict[str, Any] = {}


def _prepare(directory: Path, start: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    target = load_target(MODEL, torch.device("cpu"))

    def load(purpose: str) -> dict[str, Documents]:
        vocab_size = target.config.vocab_size
        return {
            d: load_documents([directory / f"{purpose}_{d}.jsonl"], tokenizer, vocab_size, NUM_STEPS) for d in DOMAINS
        }

    training = load_documents([tiny_draft.SCRATCH / "rollouts.jsonl"], tokenizer, target.config.vocab_size, NUM_STEPS)
    _worker.update(
        start=start, target=target, training=training, validation=load("validation"), held_out=load("held_out")
    )


def _measure(loss: str, rate: float, seed: int, updates: int) -> dict[str, Any]:
    """Train one head; its acceptance length by purpose, rule and domain."""
    target = _worker["target"]
    head = load_head(_worker["start"], target, dtype=torch.float32)
    if loss != START:
        rows = PackedRows(_worker["training"], CONTEXT, NUM_STEPS, seed)
        settings = Settings(
            loss,
            NUM_STEPS,
            learning_rate=rate,
            batch_rows=BATCH_ROWS,
            context=CONTEXT,
            epochs=100,
            max_updates=updates,
            seed=seed,
        )
        with tempfile.TemporaryDirectory() as run:
            trainer = CachingTrainer(target, Rollout(head), rows, settings, Path(run), Processes(torch.device("cpu")))
            head.load_state_dict(trainer.train())
    head.requires_grad_(False)
    return {purpose: _acceptance_length(head, purpose) for purpose in PURPOSES}


def _acceptance_length(head: MTPHead, purpose: str) -> dict[str, Any]:
    documents = {domain: texts(found) for domain, found in _worker[purpose].items()}
    report = evaluate(_worker["target"], head, documents, NUM_STEPS, SamplingPolicy())
    return {
        rule: {domain: section["acceptance_length"][rule]["mean"] for domain, section in report["domains"].items()}
        | {"mean": statistics.fmean(s["acceptance_length"][rule]["mean"] for s in report["domains"].values())}
        for rule in ("rejection_sampling", "target_only")
    }


def _key(loss: str, rate: float, seed: int) -> str:
    return f"{loss} rate={rate:g} seed={seed}"


def measured_with(start: Path, updates: int) -> dict[str, Any]:
    """All that a run depends on but its loss, rate and seed, and the texts (`text_digests`)."""
    return describe(str(MODEL), None if start == MODEL else str(start)) | {
        "num_steps": NUM_STEPS,
        "updates": updates,
        "rates": list(RATES),
        "tokens_per_update": BATCH_ROWS * CONTEXT,
        "held_out_documents_per_domain": HELD_OUT,
    }


def text_digests(directory: Path) -> dict[str, str]:
    """Of the text to train on, and of all the text to evaluate on."""
    evaluation = [directory / f"{purpose}_{domain}.jsonl" for purpose in PURPOSES for domain in DOMAINS]
    files = {"training": [tiny_draft.SCRATCH / "rollouts.jsonl"], "evaluation": evaluation}
    return {
        f"{use}_sha256": hashlib.sha256(b"".join(file.read_bytes() for file in each)).hexdigest()[:16]
        for use, each in files.items()
    }


def kept_runs(path: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """What the results file at `path` holds already; {} without one.

    Raises:
        SystemExit: it was measured under other conditions than these, or does not say under which.
    """
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    if changed := [name for name, value in conditions.items() if before["conditions"].get(name) != value]:
        raise SystemExit(f"{path} was measured with another {', '.join(changed)}: give another --out, or remove it")
    return before["runs"]


def run_all(
    directory: Path,
    path: Path,
    start: Path,
    conditions: dict[str, Any],
    losses: list[str],
    seeds: list[int],
    updates: int,
    workers: int,
) -> dict[str, Any]:
    """Every measurement that is not in the results file at `path` yet; it is written after each."""
    runs = kept_runs(path, conditions)
    results: dict[str, Any] = {"conditions": conditions, "runs": runs}

    def measure(wanted: list[tuple[str, float, int]], label: str) -> None:
        missing = [each for each in wanted if _key(*each) not in runs]
        futures = {pool.submit(_measure, *each, updates): each for each in missing}
        for future in tqdm(as_completed(futures), total=len(futures), desc=label, unit="run"):
            runs[_key(*futures[future])] = future.result()
            write_json(path, results)

    def validated(loss: str, rate: float) -> float:
        return runs[_key(loss, rate, seeds[0])]["validation"]["rejection_sampling"]["mean"]

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(directory, start)) as pool:
        measure(
            [(START, 0.0, 0)] + [(loss, rate, seeds[0]) for rate in RATES for loss in losses], "first seed, all rates"
        )
        best = {loss: max(RATES, key=lambda rate: validated(loss, rate)) for loss in losses}
        measure([(loss, best[loss], seed) for seed in seeds[1:] for loss in losses], "other seeds, best rate")

    def figures(rule: str, domain: str) -> dict[str, list[float]]:
        keys = {START: [_key(START, 0.0, 0)]} | {
            loss: [_key(loss, best[loss], seed) for seed in seeds] for loss in losses
        }
        return {loss: [runs[key]["held_out"][rule][domain] for key in each] for loss, each in keys.items()}

    results |= {
        "seeds": seeds,
        "best_rate": best,
        "acceptance_length": figures("rejection_sampling", "mean"),
        "target_only": figures("target_only", "mean"),
        "by_domain": {domain: figures("rejection_sampling", domain) for domain in DOMAINS},
    }
    write_json(path, results)
    return results


def table(results: dict[str, Any]) -> str:
    """Markdown: mean over seeds and, after ±, half the range between the lowest and the highest seed."""
    columns = {"rejection sampling": results["acceptance_length"], "target-only": results["target_only"]}
    columns |= results["by_domain"]
    lines = ["| loss | rate | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for loss in results["acceptance_length"]:
        cells = [_spread(column[loss]) for column in columns.values()]
        lines.append(f"| {loss} | {results['best_rate'].get(loss, '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """One dot per seed, by loss: acceptance length under both rules."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    names = sorted(results["acceptance_length"], key=lambda loss: statistics.fmean(results["acceptance_length"][loss]))
    for axis, key, title in zip(
        axes, ("acceptance_length", "target_only"), ("rejection sampling", "target-only"), strict=True
    ):
        for height, loss in enumerate(names):
            values = results[key][loss]
            axis.plot(values, [height] * len(values), "o", color="tab:blue", alpha=0.5)
            axis.plot(statistics.fmean(values), height, "|", color="black", markersize=14)
        axis.set(yticks=range(len(names)), yticklabels=names, title=title)
        axis.set_xlabel(f"acceptance length, {NUM_STEPS} draft tokens, temperature 1")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--start", type=Path, default=MODEL, help="the draft whose head all start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each")
    parser.add_argument("--texts", type=Path, default=ROOT / ".venv" / "losses", help="where generated text is kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON; table and plot go beside it")
    arguments = parser.parse_args()
    start, texts, out = (path.absolute() for path in (arguments.start, arguments.texts, arguments.out))
    os.chdir(ROOT)  # recorded paths are relative to it, wherever this was started
    conditions = measured_with(start, arguments.updates)
    kept_runs(out, conditions)  # refused, if it must be, before texts are made
    texts.mkdir(parents=True, exist_ok=True)
    tiny_draft.make_rollouts()
    make_texts(texts)
    results = run_all(
        *(texts, out, start, conditions | text_digests(texts)),
        *(arguments.losses, arguments.seeds, arguments.updates, arguments.workers),
    )
    out.with_suffix(".md").write_text(table(results))
    plot(results, out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
