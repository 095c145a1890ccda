from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rto.pipeline.stop import EXIT, Stop, Stopped

FILE = Path(__file__).resolve().parents[2] / "src" / "rto" / "pipeline" / "stop.py"
# The file by its path: the package around it would import torch.
LOOP = f"""
import runpy, sys, time
names = runpy.run_path({str(FILE)!r})
try:
    with names["Stop"]() as stop:
        print("ready", flush=True)
        for step in range(600):
            time.sleep(0.02)  # a step
            if sys.argv[1] != "deaf":
                print("step", step, flush=True)
                stop.check()
except names["Stopped"] as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.code)
"""
KINDS = ("SIGTERM", "SIGINT")


def loop(kind: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", LOOP, kind], stdout=pipe, stderr=pipe, text=True)
    while "ready" not in process.stdout.readline():
        pass
    return process


@pytest.mark.parametrize("name", KINDS)
def test_the_step_is_finished_and_the_exit_code_says_which(name):
    process = loop("hearing")
    process.send_signal(signal.Signals[name])
    said, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT[name]
    assert said.splitlines()[-1] == f"stopped by {name}; the same command continues"
    assert said.splitlines()[-2].startswith("step ")
    assert errors.startswith(f"{name}: stops after this step") and "Traceback" not in errors


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_a_second_signal_ends_at_once(first, second):
    process = loop("deaf")
    process.send_signal(signal.Signals[first])
    assert "Once more: ends at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.Signals[second])
    process.communicate(timeout=30)
    assert process.returncode == -signal.Signals[second]


def test_the_codes_are_distinct():
    assert EXIT == {"SIGTERM": 75, "SIGINT": 130}
    assert [(Stopped(name).signal, Stopped(name).code) for name in EXIT] == [*EXIT.items()]


@pytest.mark.parametrize("name", KINDS)
def test_wanted_check_and_the_handlers_of_before(name, capfd):
    def mine(number, frame):
        raise AssertionError

    before = {kind: signal.signal(signal.Signals[kind], mine) for kind in KINDS}
    try:
        with Stop() as stop:
            stop.check()
            assert stop.wanted is None
            os.kill(os.getpid(), signal.Signals[name])
            wait(lambda: stop.wanted)
            assert stop.wanted == name
            with pytest.raises(Stopped, match=name):
                stop.check()
        assert all(signal.getsignal(signal.Signals[kind]) is mine for kind in KINDS)
        with pytest.raises(KeyError), Stop():
            raise KeyError
        assert all(signal.getsignal(signal.Signals[kind]) is mine for kind in KINDS)
    finally:
        for kind, handler in before.items():
            signal.signal(signal.Signals[kind], handler)
    assert capfd.readouterr().err.count(name) == 1


def test_another_thread_installs_nothing():
    found = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Stop() as stop:
            stop.check()
            found.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


FORK = f"""
import os, runpy, signal, time
with runpy.run_path({str(FILE)!r})["Stop"]() as stop:
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.write(theirs, b"x")
        time.sleep(60)
        os._exit(1)
    os.read(ours, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    stop.check()
"""


def test_a_forked_worker_ends_as_before():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=30).returncode == 0


def wait(condition) -> None:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
