"""`bebop bench` on the shipped model and its held-out texts: `make bench`. Every option of `bebop bench` may follow."""

import os
import sys
from pathlib import Path

from vllm_bebop.cli import app

ROOT = Path(__file__).parent.parent


def main() -> None:
    os.chdir(ROOT)
    given = sys.argv[1:]
    defaults: list[str] = []
    if "--model" not in given:
        defaults += ["--model", "tiny_model/checkpoint"]
        held_out = sorted(Path("tiny_model/held_out").glob("*.jsonl"))
        if "--data" not in given and "--domains" not in given:
            defaults += [word for path in held_out for word in ("--data", f"{path.stem}={path}")]
        if "--draft" not in given and Path("tiny_model/draft").is_dir():
            defaults += ["--draft", "tiny_model/draft"]
    app(["bench", *defaults, *given])


if __name__ == "__main__":
    main()
