"""No room for a checkpoint: one clear line, the last good one intact; with room the same command goes on."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

STAGE = "rl/rto"  # the one in which `stopped` was left


def kept(folder: Path) -> dict[str, bytes]:
    """Every file there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def size(folder: Path) -> int:
    """Bytes of the tensors of a checkpoint there."""
    return max(path.stat().st_size for path in folder.rglob("tensors.safetensors"))


def fails(run, *, largest: int | None = None, reason: str) -> None:
    """The run ends with one line that says so, and every checkpoint is as it was."""
    before = kept(run.place(STAGE))
    code, said = run.go_on(largest)
    assert code == 1, said
    assert re.fullmatch(rf"rto: \[Errno \d+\] {reason}", said.splitlines()[-1]), said
    assert "Traceback" not in said
    assert kept(run.place(STAGE)) == before


def ends_well(run) -> None:
    code, said = run.go_on()
    assert code == 0, said
    assert not run.differs()


def full(run, reason: str) -> str:
    """What is said when a checkpoint has no room."""
    newest = run.steps(STAGE)[-1]
    return (
        rf"{reason}: the checkpoint of step {newest + 1} needs [\d,]+ bytes in \S+, where [\d,]+ are free \(a quota "
        rf"may allow less\)\. Step {newest} is the last one there, untouched\. Make room, then give the same command "
        "again"
    )


@contextlib.contextmanager
def room(disk: Path, free: int) -> Iterator[None]:
    """A disk on which no more than so many bytes are free."""
    ballast, now = disk / "ballast", os.statvfs(disk)
    ballast.write_bytes(bytes(now.f_bavail * now.f_frsize - free))
    try:
        yield
    finally:
        ballast.unlink()


def test_a_full_disk(launcher, run_in, stopped):
    """With room for half of a checkpoint, then with none at all."""
    if launcher.small is None:
        pytest.skip("no disk can be mounted here")
    disk = launcher.seen_here(launcher.small)
    run = run_in(launcher.small / "run")
    shutil.copytree(stopped, run.folder)
    with room(disk, size(run.place(STAGE)) // 2):
        fails(run, reason=full(run, "No space left on device"))
    with room(disk, 0):
        fails(run, reason="No space left on device.*")
    ends_well(run)


def test_a_disk_without_room_for_the_model(launcher, run_in, stopped, tmp_path):
    """The last step is done; its stage still has its checkpoints."""
    if launcher.small is None:
        pytest.skip("no disk can be mounted here")
    first = run_in(tmp_path / "run")
    shutil.copytree(stopped, first.folder)
    attempt = first.start()
    attempt.until(lambda: 5 in first.steps(STAGE))  # of 6; the last is not saved
    attempt.strike(signal.SIGKILL)
    assert attempt.ended()[0] == -signal.SIGKILL
    run = run_in(launcher.small / "last")
    shutil.copytree(first.folder, run.folder)
    before = kept(run.place(STAGE))
    with room(launcher.seen_here(launcher.small), 12_288):
        fails(run, reason="No space left on device.*")
    assert kept(run.place(STAGE)) == before
    ends_well(run)


def test_a_file_that_may_not_grow_so_large(run_in, stopped, tmp_path):
    """As by a quota: every write beyond the limit fails (EFBIG)."""
    run = run_in(tmp_path / "run")
    shutil.copytree(stopped, run.folder)
    fails(run, largest=size(run.place(STAGE)) // 2, reason=full(run, "File too large"))
    ends_well(run)
