"""The `bebop` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Lossless MTP speculative decoding for vLLM.")


@app.callback()
def _main() -> None:
    """Keeps `bebop doctor` a subcommand even while it is the only one."""


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
    for name, passed, detail in rows:
        typer.echo(f"{'ok  ' if passed else 'FAIL'}  {name}: {detail}")
    if not all(passed for _, passed, _ in rows):
        raise typer.Exit(code=1)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="Target checkpoint: a directory or a Hub id.")],
    draft: Annotated[
        str | None, typer.Option(help="Draft directory or Hub id; default: the target's own head.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "stock_greedy,stock_probabilistic,bebop_target_only,bebop_rejection",
    gammas: Annotated[str, typer.Option(help="Numbers of draft tokens: 3, or 1,2,3, or 1..5.")] = "3",
    temperatures: Annotated[str, typer.Option(help="Comma-separated, above 0.")] = "0.3,0.7,1.0",
    domains: Annotated[
        str | None, typer.Option(help='Built-in texts: "code,prose" (default, unless --data is given).')
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help='NAME=PATH of a JSONL file with "text", "prompt" or "prompt_token_ids"; may be repeated.'),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Per domain.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt; longer texts are cut.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated per prompt; end-of-text is ignored.")] = 64,
    seed: Annotated[int, typer.Option(help="For the choice of prompts and for the engine.")] = 0,
    expectation: Annotated[
        bool, typer.Option(help="Compare with the exact expectation; loads the model in Transformers, in fp32.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON; the plot goes beside it. Default: benchmarks/results/acceptance_DEVICE.json."),
    ] = None,
) -> None:
    """Measure acceptance on the real engine by method, draft length, domain, temperature. Resumes where it stopped."""
    from vllm_bebop.bench import acceptance
    from vllm_bebop.bench.conditions import device_slug
    from vllm_bebop.bench.plot import plot_acceptance
    from vllm_bebop.bench.prompts import PromptError
    from vllm_bebop.tensor_files import CheckpointError

    output = output or Path("benchmarks/results") / f"acceptance_{device_slug()}.json"
    files = dict(_name_and_path(entry) for entry in data or [])
    builtin = _words(domains) if domains is not None else () if files else ("code", "prose")
    try:
        sweep = acceptance.Sweep(
            model,
            acceptance.load_prompts(model, builtin, files, prompts, prompt_tokens, seed),
            draft,
            methods=_words(methods),
            gammas=_whole_numbers(gammas),
            temperatures=tuple(_number(word) for word in _words(temperatures)),
            max_tokens=max_tokens,
            seed=seed,
            expectation=expectation,
        )
        results = acceptance.run(sweep, output)
    except (acceptance.BenchError, PromptError, CheckpointError) as error:
        typer.echo(f"bebop bench: {error}", err=True)
        raise typer.Exit(code=1) from None
    plot_acceptance(results, output.with_suffix(".png"))
    typer.echo(f"\nAcceptance length (exact expectation in brackets):\n\n{acceptance.table(results)}\n")
    typer.echo(f"{output} and {output.with_suffix('.png')} written")


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


def _name_and_path(entry: str) -> tuple[str, str]:
    name, separator, path = entry.partition("=")
    if not (name and separator and path):
        raise typer.BadParameter(f"{entry!r} is not of the form NAME=PATH", param_hint="--data")
    return name, path


if __name__ == "__main__":
    sys.exit(app())
