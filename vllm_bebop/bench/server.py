"""Runs `vllm serve` as a child and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_bebop.bench.conditions import engine_environment, engine_options
from vllm_bebop.bench.counters import Counters, parse_metrics
from vllm_bebop.config import forget_wishes

_GRACE_S = 15  # between the request to end and the order
_LOG_TAIL_LINES = 40
_LINE_EVERY_S = 15.0  # of progress, where there is no terminal


class ServerError(RuntimeError):
    """The server died or did not answer in time. The message ends with the last lines of its log."""


class Server:
    """A vLLM server on a free local port, for the length of a `with` block.

    Entering starts it and returns at once, so that several can start together; `wait_until_ready` then waits for one.
    Leaving ends its whole process group, whatever happened inside.

    Args:
        model: directory or Hub id.
        speculative_config: as `--speculative-config` takes it; None serves without speculation.
        name: what progress and error messages call it.
        arguments: further words of the command line.
        environment: further variables, on top of this process's and of what a machine without a GPU needs.
    """

    def __init__(
        self,
        model: str | Path,
        speculative_config: Mapping[str, Any] | None = None,
        *,
        name: str = "server",
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self.model = str(model)
        self.name = name
        self.port = _free_port()
        self._command = [str(Path(sys.executable).with_name("vllm")), "serve", self.model]
        # A checkpoint's generation_config.json would otherwise put its top-k and top-p into every request.
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), "--generation-config", "vllm"]
        self._command += _flags(engine_options())
        if speculative_config is not None:
            self._command += ["--speculative-config", json.dumps(dict(speculative_config))]
        self._command += arguments
        draft = None if speculative_config is None else speculative_config.get("model")
        inherited = dict(os.environ)
        forget_wishes(inherited)
        self._environment = {**inherited, **engine_environment(self.model, draft), **(environment or {})}

    @property
    def base_url(self) -> str:
        """Without the "/v1" of the OpenAI API."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its engine and worker processes share a group that is ours to end
        )
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        # Children may outlive the server, so the group is killed even where the server itself has ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def is_ready(self) -> bool:
        """True once it answers.

        Raises:
            ServerError: it has died.
        """
        if self._process.poll() is not None:
            raise ServerError(f"{self.name} ended with code {self._process.returncode}; {self._log_tail()}")
        try:
            self._get("/health")
        except (urllib.error.URLError, OSError):
            return False
        return True

    def metrics(self) -> Counters:
        """The counters of /metrics as they stand."""
        return parse_metrics(self._get("/metrics"))

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.base_url + path, timeout=10) as response:
            return response.read().decode()

    def _log_tail(self) -> str:
        # Read by position: the server writes at the file's own, which a seek would move.
        text = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")
        lines = text.splitlines()[-_LOG_TAIL_LINES:]
        return f"the end of its log ({' '.join(self._command)}):\n" + "\n".join(lines)


def wait_until_ready(servers: Iterable[Server], timeout_s: float = 300) -> None:
    """Wait until every server answers, with a line of progress.

    Raises:
        ServerError: one has died, or does not answer within `timeout_s`.
    """
    waiting, started, progress = list(servers), time.monotonic(), ProgressLine()
    while waiting := [server for server in waiting if not server.is_ready()]:
        elapsed_s = time.monotonic() - started
        names = ", ".join(server.name for server in waiting)
        if elapsed_s > timeout_s:
            raise ServerError(f"{names}: no answer within {timeout_s:.0f} s; {waiting[0]._log_tail()}")
        progress.show(f"starting {names} ... {elapsed_s:.0f} s")
        time.sleep(1)
    progress.clear()


class ProgressLine:
    """On a terminal, one line that is overwritten; elsewhere a line of a log now and then."""

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._last_line = -_LINE_EVERY_S

    def show(self, message: str) -> None:
        if self._on_terminal:
            print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            print(message, file=sys.stderr, flush=True)
            self._last_line = time.monotonic()

    def clear(self) -> None:
        if self._on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for key, value in options.items():
        flags.append(f"--{key.replace('_', '-')}")
        if value is not True:
            flags.append(str(value))
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
