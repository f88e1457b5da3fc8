"""Runs `vllm serve` once per argument list and records how each ended: for starts that must be refused.

python -m tests.support.serve_many CASES.json RESULTS.json

Importing vLLM takes seconds, so each case is a fork of one process that has imported it. The cases are those of
`vllm serve`'s own main function, environment included: {"name": {"argv": [...], "env": {...}}}.
"""

import json
import os
import sys
import traceback
from pathlib import Path

_SECONDS = 120


def _serve(argv: list[str], environ: dict[str, str]) -> None:
    import signal

    from vllm.entrypoints.cli.main import main

    signal.alarm(_SECONDS)  # a start that is not refused would go on for ever
    os.environ.update(environ)
    sys.argv = ["vllm", "serve", *argv]
    main()


def main() -> None:
    import vllm.entrypoints.cli.main
    import vllm.entrypoints.openai.api_server  # noqa: F401

    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, case in cases.items():
        log = Path(sys.argv[2]).with_suffix(f".{len(results)}.log")
        pid = os.fork()
        if pid == 0:
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = 0
            try:
                _serve(case["argv"], case.get("env", {}))
            except SystemExit as exit_:
                code = exit_.code if isinstance(exit_.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        results[name] = {"exit_code": os.waitstatus_to_exitcode(status), "log": log.read_text()}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
