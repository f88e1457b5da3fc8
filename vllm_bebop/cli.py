"""The `bebop` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import sys
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


if __name__ == "__main__":
    sys.exit(app())
