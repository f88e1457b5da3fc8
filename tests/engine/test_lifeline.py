"""A worker whose server is gone ends, even one that cannot handle SIGTERM."""

import subprocess
import sys
import time

import psutil

from tests.support.engines import ROOT

# As one that waits inside a driver or a collective call.
_WORKER = """
import signal, time
from vllm_bebop.engine import lifeline
lifeline._INTERVAL_S, lifeline._GRACE_S = 0.1, 0.5
signal.signal(signal.SIGTERM, signal.SIG_IGN)
lifeline.follow_server()
print("ready", flush=True)
time.sleep(120)
"""
_SERVER = f"""
import subprocess, sys
from vllm_bebop.engine import lifeline
lifeline.announce_server()
worker = subprocess.Popen([sys.executable, "-c", {_WORKER!r}], stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
sys.stdin.readline()
"""


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_worker_that_ignores_sigterm_is_killed():
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = int(server.stdout.readline())
    time.sleep(1.0)
    assert _runs(worker), "it ended though its server lives"
    server.kill()
    server.wait()
    deadline = time.monotonic() + 30
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(worker)
