"""Runs that are stopped at every step, and all that a run computed: for tests of going on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rto.config import Config
from rto.pipeline import run
from rto.pipeline.job import Job
from rto.pipeline.stop import Stop, Stopped


@contextmanager
def signalled() -> Iterator[pytest.MonkeyPatch]:
    """SIGTERM has come already, whenever a run looks."""

    def enter(stop: Stop) -> Stop:
        stop.wanted = "SIGTERM"
        return stop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stop, "__enter__", enter)
        yield patched


def run_cut(config: Config, last: str) -> int:
    """Run as if SIGTERM came in every single step until stage ``last`` is finished; the number of stops."""
    stops = 0
    with signalled() as patched:
        while True:
            try:
                run(config, quiet=True)
                return stops
            except Stopped as stopped:
                assert stopped.signal == "SIGTERM"
                stops += 1
                assert stops < 100
            if last in Job(config, True).finished():
                patched.undo()


def made(folder: Path) -> dict[str, object]:
    """Everything that a run computed: weights by file, metrics without timings, answers."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found[path.relative_to(folder).as_posix()] = {key: t.tolist() for key, t in load_file(path).items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]
    found["samples"] = (folder / "samples.jsonl").read_text()
    found["answers"] = {p.name: p.read_text() for p in sorted(folder.glob("evaluation/*.jsonl"))}
    return found
