from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from rto.pipeline.lock import RunLock

FILE = Path(__file__).resolve().parents[2] / "src" / "rto" / "pipeline" / "lock.py"
# The file by its path: the package around it would import torch.
HEAD = f"import os, runpy, sys, time; RunLock = runpy.run_path({str(FILE)!r})['RunLock']\n"
HOLD = HEAD + "with RunLock(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
FORK = (
    HEAD
    + "with RunLock(sys.argv[1]):\n    child = os.fork()\n    if not child:\n        print(os.getpid(), flush=True)\n"
    + "    time.sleep(60)\n"
)


@contextmanager
def other(code: str, folder: Path):
    """Another process that has said its first line."""
    call = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            pipe.close()


def test_the_second_process_is_refused_and_told_who_holds_it(tmp_path):
    run = tmp_path / "runs" / "a"
    with other(HOLD, run) as (process, said):
        assert said == "held"
        found = rf"{re.escape(str(run))} is in use by process {process.pid} on \S+ since 20\d\d-\S+T.*--output"
        for _ in range(2):
            with pytest.raises(ValueError, match=found), RunLock(run):
                pass
        with RunLock(tmp_path / "runs" / "b"):  # another folder is free
            pass
        process.communicate(timeout=30)  # closes its standard input
        assert process.returncode == 0
    with RunLock(run), other(HOLD, run) as (process, said):
        assert said == "" and process.wait(30) == 1
    assert (run / ".lock").read_bytes() == b""


def test_a_second_lock_in_one_process_is_refused_too(tmp_path):
    lock = RunLock(tmp_path)
    with lock, pytest.raises(ValueError, match=f"process {os.getpid()} "), RunLock(tmp_path):
        pass
    with lock:  # and may be taken again
        pass


def test_an_error_inside_releases_it(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path):
        pass


def test_kill_9_releases_it(tmp_path):
    with other(HOLD, tmp_path) as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert str(process.pid) in (tmp_path / ".lock").read_text()  # what it says does not hold it
        with RunLock(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_kill_9_releases_it_though_a_forked_child_lives_on(tmp_path):
    with other(FORK, tmp_path) as (process, said):
        child = int(said)
        try:
            with pytest.raises(ValueError, match=f"process {process.pid} "), RunLock(tmp_path):
                pass  # what the child let go, its parent still has
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            os.kill(child, 0)  # it is there
            with RunLock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_of_many_processes_at_once_has_one_holder(tmp_path):
    code = HEAD + "with RunLock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    call = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(4)]
    try:
        end = time.monotonic() + 60
        while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert sorted(process.poll() or 0 for process in processes) == [0, 1, 1, 1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_unreadable_words_of_a_holder(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_bytes(b'{"pid": 1')
        with pytest.raises(ValueError, match="in use by another process"), RunLock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """There is none here, so the kernel's answer is put in its place."""
    import fcntl

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="file system without locks .* local disk"), RunLock(tmp_path):
        pass
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)
