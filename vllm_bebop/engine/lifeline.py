"""Ends an engine whose server is gone.

A server that is killed outright (SIGKILL, out of memory) cannot stop its engine, and vLLM's engine process does not
notice: it stays, with its memory. The process that reads the config leaves its id and the time of its start in the
environment, which its engine and worker processes inherit; each worker looks after it. Ray hands the environment to
other hosts and containers too, where that id is another process, started at another time, or none. Times are the
kernel's count since boot, which no setting of the clock moves; without /proc, nothing is done. A worker that ends takes
its engine core along, upstream's own rule. A worker that waits inside a driver or a collective call never gets to
handle SIGTERM, and is killed.
"""

import os
import signal
import threading
import time
from pathlib import Path

_SERVER = "_BEBOP_SERVER"  # PID:START
_INTERVAL_S = 2.0
_GRACE_S = 10.0


def announce_server() -> None:
    """Called in the process that owns the engine, before it starts any other."""
    os.environ[_SERVER] = f"{os.getpid()}:{_start_of(os.getpid())}"


def follow_server() -> None:
    """Called in a worker: end this process once the server has ended. Does nothing where both are one process."""
    server, _, start = os.environ.get(_SERVER, "").partition(":")
    if server in ("", str(os.getpid())) or _start_of(server) != start:
        return

    def watch() -> None:
        while _start_of(server) == start:
            time.sleep(_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="bebop-lifeline", daemon=True).start()


def _start_of(pid: int | str) -> str | None:
    """When a process of this host and container started, in clock ticks; None if it has ended, as a zombie has too."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()  # behind "PID (COMMAND) "
    except (OSError, ValueError):  # ValueError: it ended while it was read
        return None
    return None if state in "ZX" else rest[18]
