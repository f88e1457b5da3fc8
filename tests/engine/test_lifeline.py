"""A worker whose server is gone ends, even one that cannot handle SIGTERM."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from tests.support.engines import ROOT
from vllm_bebop.engine import lifeline

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
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


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


@pytest.fixture
def unrelated():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_only_the_process_announced_is_followed(unrelated, monkeypatch):
    """On another host or in another container, Ray's worker finds someone else under the server's id, or nobody."""
    monkeypatch.setenv(lifeline._SERVER, "")  # and put back what was there
    lifeline.announce_server()
    pid, start = os.environ[lifeline._SERVER].split(":")
    followed = []
    monkeypatch.setattr(lifeline.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: followed.append(True)))
    for process in (f"{unrelated.pid}:{start}", f"{unrelated.pid}", f"{2**22 + 1}:{start}", f"{pid}:{start}"):
        monkeypatch.setenv(lifeline._SERVER, process)
        lifeline.follow_server()
        assert not followed
    monkeypatch.setenv(lifeline._SERVER, f"{unrelated.pid}:{lifeline._start_of(unrelated.pid)}")
    lifeline.follow_server()
    assert followed


def test_a_process_started_when_the_kernel_says(unrelated):
    """In ticks since boot, to which psutil adds when that was."""
    since_boot = psutil.Process(unrelated.pid).create_time() - psutil.boot_time()
    assert int(lifeline._start_of(unrelated.pid)) / os.sysconf("SC_CLK_TCK") == pytest.approx(since_boot, abs=2)


def test_a_process_that_has_ended_has_no_start(unrelated):
    unrelated.kill()
    deadline = time.monotonic() + 10
    while psutil.Process(unrelated.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lifeline._start_of(unrelated.pid) is None
    unrelated.wait()
    assert lifeline._start_of(unrelated.pid) is None
