"""A checkpoint that was cut or changed on the disk: skipped with a word, and the one before it leads to the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

STAGE = "rl/rto"  # the one in which `stopped` was left


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        ("tensors.safetensors", cut, "tensors.safetensors has"),
        ("tensors.safetensors", flip, "tensors.safetensors is not what was written"),
        ("state.json", flip, "state.json is not what was written"),
        ("manifest.json", cut, "manifest.json is no manifest"),
    ],
)
def test_the_newest_is_skipped(run_in, stopped, tmp_path, file: str, harm: Callable[[Path], None], reason: str):
    run = run_in(tmp_path / "run")
    shutil.copytree(stopped, run.folder)
    older, newest = run.steps(STAGE)
    harm(run.place(STAGE) / f"step-{newest:08d}" / file)
    code, said = run.go_on()
    assert code == 0, said
    assert f"step-{newest:08d} is damaged and was skipped: {reason}" in said
    assert f"{STAGE}: goes on after step {older}" in said
    assert not run.differs()


def test_all_of_them(run_in, stopped, tmp_path):
    """The run is refused, and what the error says helps."""
    run = run_in(tmp_path / "run")
    shutil.copytree(stopped, run.folder)
    for harm, step in zip((cut, flip), run.steps(STAGE), strict=True):
        harm(run.place(STAGE) / f"step-{step:08d}" / "tensors.safetensors")
    code, said = run.go_on()
    assert code == 2, said
    error = said.splitlines()[-1]
    assert error.startswith(f"rto: {run.place(STAGE)}: every checkpoint is damaged") and "delete this folder" in error
    assert (
        all(f"step-{step:08d}: tensors.safetensors" in error for step in run.steps(STAGE)) and "Traceback" not in said
    )
    shutil.rmtree(run.place(STAGE))
    assert run.go_on()[0] == 0
    assert not run.differs()
