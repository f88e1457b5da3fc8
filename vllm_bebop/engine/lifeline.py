"""Ends an engine whose server is gone.

A server that is killed outright (SIGKILL, out of memory) cannot stop its engine, and vLLM's engine process does not
notice: it stays, with its memory. The process that reads the config leaves its id and the time of its start in the
environment, which its engine and worker processes inherit; each worker looks after it. Ray hands the environment to
other hosts and containers too, where that id is another process, started at another time, or none. A worker that ends
takes its engine core along, upstream's own rule. A worker that waits inside a driver or a collective call never gets to
handle SIGTERM, and is killed.
"""

import os
import signal
import threading
import time

import psutil

_SERVER = "_BEBOP_SERVER"  # PID:START
_INTERVAL_S = 2.0
_GRACE_S = 10.0


def announce_server() -> None:
    """Called in the process that owns the engine, before it starts any other."""
    server = psutil.Process()
    os.environ[_SERVER] = f"{server.pid}:{server.create_time()!r}"


def follow_server() -> None:
    """Called in a worker: end this process once the server has ended. Does nothing where both are one process."""
    server = _announced()
    if server is None or server.pid == os.getpid():
        return

    def watch() -> None:
        while _lives(server):
            time.sleep(_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="bebop-lifeline", daemon=True).start()


def _announced() -> psutil.Process | None:
    """The server, if it runs on this host and in this container."""
    pid, _, start = os.environ.get(_SERVER, "").partition(":")
    try:
        server = psutil.Process(int(pid))
        return server if abs(server.create_time() - float(start)) < 0.01 else None
    except (ValueError, psutil.Error):
        return None


def _lives(server: psutil.Process) -> bool:
    try:
        return server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended in between
        return False
