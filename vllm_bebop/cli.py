"""The `bebop` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_bebop.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Lossless MTP speculative decoding for vLLM.")

# What vllm does not bring along, by command; and the extra that has it.
_NEEDED = {
    "bench": (("matplotlib",), "bench"),
    "train": (("datasets", "matplotlib", "tensorboard"), "train"),
    "eval": (("matplotlib",), "train"),
}


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Target checkpoint: a directory or a Hub id.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="Draft directory or Hub id; default: the target's own head.")
    ] = None,
) -> None:
    """Check the installation; with --model, also the head that would be served. Exit code 1 if anything is amiss."""
    from vllm_bebop import doctor as checks

    if draft is not None and model is None:
        raise typer.BadParameter("--draft needs --model: a head is checked against its target", param_hint="--draft")
    rows = checks.check_environment()
    if model is not None:
        rows += checks.check_draft(model, draft) if draft is not None else checks.check_model_head(model)
    _report(rows)


@app.command()
def selftest(
    device: Annotated[str | None, typer.Option(help='"cuda" or "cpu"; default: the GPU if there is one.')] = None,
) -> None:
    """Test the sampler on this device against the exact laws that it must follow. Exit code 1 if anything is amiss."""
    from vllm_bebop import selftest as checks

    _report(checks.run(device))


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="Target checkpoint: a directory or a Hub id.")],
    draft: Annotated[
        str | None, typer.Option(help="Draft directory or Hub id; default: the target's own head.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "stock_greedy,stock_probabilistic,bebop_target_only,bebop_rejection,bebop_block",
    gammas: Annotated[str, typer.Option(help="Values of num_speculative_tokens: 3, or 1,2,3, or 1..5.")] = "3",
    temperatures: Annotated[str, typer.Option(help="Comma-separated, above 0.")] = "0.3,0.7,1.0",
    top_k: Annotated[int | None, typer.Option(help="Of every request.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of every request.")] = None,
    domains: Annotated[
        str | None, typer.Option(help='Built-in texts: "code,prose" (default, unless --data is given).')
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]PATH of JSONL or Parquet, as for `bebop rollout`; may be repeated."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Per domain.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt; longer ones are cut.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated per prompt; end-of-text is ignored.")] = 64,
    seed: Annotated[int, typer.Option(help="For the choice of prompts and for the engine.")] = 0,
    expectation: Annotated[
        bool, typer.Option(help="Compare with the exact expectation; loads the model in Transformers, on one device.")
    ] = True,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Of the engine.")] = 1,
    engine: Annotated[
        str | None, typer.Option(help='More arguments of vllm.LLM, as JSON: {"gpu_memory_utilization": 0.8}.')
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON; the plot goes beside it. Default: benchmarks/results/acceptance_DEVICE.json."),
    ] = None,
) -> None:
    """Measure acceptance on the real engine by method, draft length, domain, temperature. Resumes where it stopped."""
    _need("bench")
    from vllm_bebop.bench import acceptance
    from vllm_bebop.bench.conditions import device_slug
    from vllm_bebop.bench.plot import plot_acceptance

    output = output or Path("benchmarks/results") / f"acceptance_{device_slug()}.json"
    files = _named_files(data or [])
    builtin = _words(domains) if domains is not None else () if files else ("code", "prose")
    with _errors("bench", UserError, resumes=True):
        sweep = acceptance.Sweep(
            model,
            acceptance.load_prompts(model, builtin, files, prompts, prompt_tokens, seed),
            draft,
            methods=_words(methods),
            gammas=_whole_numbers(gammas),
            temperatures=tuple(_number(word) for word in _words(temperatures)),
            top_k=top_k,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            expectation=expectation,
            tensor_parallel_size=tensor_parallel_size,
            engine=_json_object("--engine", engine),
        )
        results = acceptance.run(sweep, output)
    plot_acceptance(results, output.with_suffix(".png"))
    typer.echo(f"\nAcceptance length (exact expectation in brackets):\n\n{acceptance.table(results)}\n")
    typer.echo(f"{output} and {output.with_suffix('.png')} written")


@app.command()
def rollout(
    model: Annotated[str, typer.Option(help="The policy: a directory or a Hub id.")],
    data: Annotated[
        list[Path], typer.Option(help='JSONL or Parquet with "prompt_token_ids", "messages", "prompt" or "text".')
    ],
    out: Annotated[Path, typer.Option(help="JSONL; OUT.settings.json beside it records the settings.")],
    draft: Annotated[str | None, typer.Option(help="Draft directory or Hub id; default: the model's own head.")] = None,
    num_speculative_tokens: Annotated[int, typer.Option(min=0, help="Drafts by method bebop; 0 for none.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated per sample at most.")] = 1024,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    samples_per_prompt: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Texts are cut to it; other longer prompts are left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Every sample's own seed follows from it.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples generated and written together.")] = 256,
    executor: Annotated[str | None, typer.Option(help="vLLM's: mp, ray or uni.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1)] = 1,
    engine: Annotated[
        str | None, typer.Option(help='More arguments of vllm.LLM, as JSON: {"gpu_memory_utilization": 0.8}.')
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A bad line is an error.")] = False,
) -> None:
    """Generate on-policy training data with vLLM. Resumes where it stopped."""
    from vllm_bebop.generate import Sampling, run

    with _errors("rollout", UserError, resumes=True):
        count = run(
            *(model, data, out),
            Sampling(max_tokens, temperature, top_k, top_p, min_p, samples_per_prompt, seed),
            draft=draft,
            num_speculative_tokens=num_speculative_tokens,
            prompt_tokens=prompt_tokens,
            strict=strict,
            batch_size=batch_size,
            executor=executor,
            tensor_parallel_size=tensor_parallel_size,
            engine=_json_object("--engine", engine),
        )
    typer.echo(f"{out}: {count} samples")


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Target checkpoint: a directory or a Hub id.")],
    data: Annotated[list[str], typer.Option(help="JSONL or Parquet, as `bebop rollout` writes it; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Draft directory to create; OUT.training beside it holds checkpoints.")],
    loss: Annotated[
        str, typer.Option(help="e2e_tv, tv, ce, kl, reverse_kl, lk, lk_mix, e2e_corrected or log_prefix.")
    ] = "e2e_tv",
    steps: Annotated[int, typer.Option(help="Draft steps trained together: num_speculative_tokens or more.")] = 5,
    start: Annotated[
        str | None, typer.Option(help="Draft to start from; default: the checkpoint's own head, or its last layer.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Constant after the warm-up.")] = 3.5e-5,
    warmup: Annotated[float, typer.Option(help="Fraction of all updates.")] = 0.03,
    clip_norm: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    max_updates: Annotated[int | None, typer.Option(help="Stop after so many optimizer steps.")] = None,
    batch_rows: Annotated[int, typer.Option(help="Packed rows per update, over all processes.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens per packed row.")] = 4096,
    temperature: Annotated[float, typer.Option(help="That rollouts are sampled with.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="That rollouts are sampled with.")] = None,
    top_p: Annotated[float | None, typer.Option(help="That rollouts are sampled with.")] = None,
    min_p: Annotated[float | None, typer.Option(help="That rollouts are sampled with.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of rows.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Updates between checkpoints; also every 10 minutes.")] = 200,
    hidden_states: Annotated[
        Path | None,
        typer.Option(
            help="Directory that keeps the target's hidden states, for later epochs and for runs on the same data with "
            "the same --context and --steps."
        ),
    ] = None,
    vocabulary_parallel: Annotated[int, typer.Option(help="Processes that share lm_head out.")] = 1,
    strict: Annotated[bool, typer.Option("--strict", help="A bad line of data is an error.")] = False,
) -> None:
    """Train an MTP head for a frozen target. For 8 GPUs: torchrun --nproc-per-node 8 -m vllm_bebop.cli train ..."""
    _need("train")
    from vllm_bebop.train.loop import Settings
    from vllm_bebop.train.losses import SamplingPolicy
    from vllm_bebop.train.run import train_draft

    with _errors("train", UserError, OSError, resumes=True):
        draft = train_draft(
            *(model, data, out),
            Settings(
                *(loss, steps, learning_rate, warmup, clip_norm, epochs, max_updates, batch_rows, context, seed),
                policy=SamplingPolicy(temperature, top_k, top_p, min_p),
            ),
            start=start,
            save_every=save_every,
            hidden_states=hidden_states,
            vocabulary_parallel=vocabulary_parallel,
            strict=strict,
        )
    if draft is not None:
        serve = f'{{"method": "bebop", "num_speculative_tokens": 3, "model": "{out}"}}'
        typer.echo(f"{out} written; serve it with\n  vllm serve {model} --speculative-config '{serve}'")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Target checkpoint: a directory or a Hub id.")],
    data: Annotated[
        list[str], typer.Option(help="[NAME=]PATH of JSONL or Parquet, as for `bebop train`; may be repeated.")
    ],
    draft: Annotated[
        str | None, typer.Option(help="Draft directory or Hub id; default: the target's own head.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Draft tokens per round: num_speculative_tokens.")] = 3,
    temperature: Annotated[
        float | None, typer.Option(help="Of the sampling policy; default: the one that the draft was trained for.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="With --temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --temperature.")] = None,
    min_p: Annotated[float | None, typer.Option(help="With --temperature.")] = None,
    max_documents: Annotated[int | None, typer.Option(min=1, help="Of each file, from its beginning.")] = None,
    output: Annotated[Path, typer.Option(help="JSON; the plot goes beside it.")] = Path("evaluation.json"),
) -> None:
    """Predict acceptance on given text, by step, entropy, output position and domain, without an engine."""
    _need("eval")
    from vllm_bebop.train.evaluate import evaluate_files
    from vllm_bebop.train.evaluation_report import table, write_report
    from vllm_bebop.train.losses import SamplingPolicy

    if temperature is None and (top_k, top_p, min_p) != (None, None, None):
        raise typer.BadParameter("give the whole policy, with --temperature", param_hint="--top-k, --top-p, --min-p")
    files = _named_files(data)
    with _errors("eval", UserError, OSError):
        policy = None if temperature is None else SamplingPolicy(temperature, top_k, top_p, min_p)
        results = evaluate_files(model, draft, files, steps, policy, max_documents)
        write_report(results, output)
    typer.echo(f"\n{table(results)}\n\n{output} and {output.with_suffix('.png')} written")


@app.command()
def merge(
    model: Annotated[Path, typer.Option(help="The target's directory, with or without a head.")],
    draft: Annotated[Path, typer.Option(help="The draft's directory.")],
    out: Annotated[Path, typer.Option(help="The directory to create: a full checkpoint.")],
) -> None:
    """Stitch a draft into its target: a checkpoint that stock vLLM, SGLang and Transformers load."""
    from vllm_bebop import merge as merging

    with _errors("merge", UserError, OSError):
        merged = merging.merge(model, draft, out)
    for warning in merged.warnings:
        typer.echo(f"warning: {warning}", err=True)
    replaced = f", in place of {merged.num_replaced} of the target's own" if merged.num_replaced else ""
    typer.echo(f"{out} written: the target and {merged.num_head_tensors} tensors of the head{replaced}, all verified")


def _json_object(option: str, text: str | None) -> dict[str, Any] | None:
    try:
        value = None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{option}: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise typer.BadParameter(f'{option}: {text!r} is no JSON object, as {{"gpu_memory_utilization": 0.8}} is')
    return value


def _need(command: str) -> None:
    """Ends a command before any work where a package that it needs is missing."""
    needed, extra = _NEEDED[command]
    if missing := [name for name in needed if find_spec(name) is None]:
        typer.echo(f"{', '.join(missing)} missing: pip install 'vllm-bebop[{extra}]'", err=True)
        raise typer.Exit(code=1)


def _report(rows: Sequence[tuple[str, bool | None, str]]) -> None:
    """Print (name, passed, detail) of each check; None is a warning. Exit code 1 if any failed."""
    for name, passed, detail in rows:
        typer.echo(f"{'warn' if passed is None else 'ok  ' if passed else 'FAIL'}  {name}: {detail}")
    if not all(passed is None or passed for _, passed, _ in rows):
        raise typer.Exit(code=1)


@contextmanager
def _errors(command: str, *expected: type[Exception], resumes: bool = False) -> Iterator[None]:
    """What a user can mend is said in its own words, without a traceback; exit code 1, or 130 after Ctrl-C."""
    try:
        yield
    except expected as error:
        typer.echo(f"bebop {command}: {error}", err=True)
        raise typer.Exit(code=1) from None
    except KeyboardInterrupt:
        advice = "; the same command goes on where it stopped" if resumes else ""
        typer.echo(f"\nbebop {command}: interrupted{advice}", err=True)
        raise typer.Exit(code=130) from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise typer.BadParameter(f"{word!r} is not a number") from None


def _whole_numbers(text: str) -> tuple[int, ...]:
    """ "3", "1,2,3" or "1..5"."""
    try:
        if ".." in text:
            first, last = text.split("..")
            return tuple(range(int(first), int(last) + 1))
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not of the form 3, or 1,2,3, or 1..5") from None


def _named_files(entries: Sequence[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for name, path in map(_name_and_path, entries):
        if name in files:
            raise typer.BadParameter(f"{name!r} is {files[name]} and {path}: give NAME=PATH", param_hint="--data")
        files[name] = path
    return files


def _name_and_path(entry: str) -> tuple[str, str]:
    """Without a name, a file's own; a path may hold "=" too."""
    if "=" not in entry or Path(entry).exists():
        return Path(entry).stem, entry
    name, _, path = entry.partition("=")
    if not (name and path):
        raise typer.BadParameter(f"{entry!r} is not of the form NAME=PATH", param_hint="--data")
    return name, path


if __name__ == "__main__":
    sys.exit(app())
