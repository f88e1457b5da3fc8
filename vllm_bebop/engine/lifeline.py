"""Ends an engine whose server is gone.

A server that is killed outright (SIGKILL, out of memory) cannot stop its engine, and vLLM's engine process does not
notice: it stays, with its memory. The process that reads the config leaves its id in the environment, which its engine
and worker processes inherit; each worker looks after it. A worker that ends takes its engine core along, upstream's own
rule. A worker that waits inside a driver or a collective call never gets to handle SIGTERM, and is killed.
"""

import os
import signal
import threading
import time

import psutil

_SERVER_PID = "_BEBOP_SERVER_PID"
_INTERVAL_S = 2.0
_GRACE_S = 10.0


def announce_server() -> None:
    """Called in the process that owns the engine, before it starts any other."""
    os.environ[_SERVER_PID] = str(os.getpid())


def follow_server() -> None:
    """Called in a worker: end this process once the server has ended. Does nothing where both are one process."""
    pid = int(os.environ.get(_SERVER_PID, os.getpid()))
    if pid == os.getpid() or not psutil.pid_exists(pid):  # in one process, or on another host (Ray)
        return
    server = psutil.Process(pid)

    def watch() -> None:
        while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="bebop-lifeline", daemon=True).start()
