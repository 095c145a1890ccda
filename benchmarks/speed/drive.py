"""Runs the sides of a piece of work, each in a process of its own, one after the other: A B C A B C ..."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.speed.case import Case
from benchmarks.speed.machine import environment
from benchmarks.speed.runs import Entry

ROOT = Path(__file__).resolve().parents[2]
# By the precision of the passes. In bfloat16 the mean margin of 32 pairs is off by 0.02 to 0.04 by rounding alone
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Failed(RuntimeError):
    """A side ended early."""


class Side:
    """A process that does its turns when it is asked to."""

    def __init__(self, entry: Entry, python: str, case: Case, threads: int) -> None:
        folder = Path(case.folder) / f"{entry.work}-{entry.side}-{entry.setup}"
        folder.mkdir(exist_ok=True)
        replace(case, folder=str(folder), setup=entry.setup).write(folder / "case.json")
        self.entry, self._log = entry, folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.speed.worker", entry.side, str(folder / "case.json")],
                cwd=ROOT,
                env=environment(threads, entry.setup, case.device),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def read(self) -> dict[str, Any]:
        """Raises Failed where the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = "\n".join(self._log.read_text().splitlines()[-15:])
            raise Failed(f"the {self.entry.side} side ended with code {self._process.wait()}; its last words:\n{said}")
        return json.loads(line)

    def turn(self, order: str) -> dict[str, Any]:
        """Raises Failed where the process has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended between two turns: `read` says how
            print(order, file=self._process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        """Nobody is waited for: there is nothing left to be written."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # an order that nobody has read
                pipe.close()


@dataclass
class Measured:
    """What one side did."""

    entry: Entry
    settings: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)  # the timed ones
    checks: list[dict[str, float]] = field(default_factory=list)  # of all turns
    flops: int = 0  # of one turn; 0: not counted, because the turns differ
    phase_flops: dict[str, int] = field(default_factory=dict)
    failed: str = ""  # why it ended early

    @property
    def seconds(self) -> list[float]:
        return [turn["seconds"] for turn in self.turns]

    @property
    def memory_mb(self) -> float:
        return self.turns[-1]["memory_mb"]

    def phases(self) -> dict[str, float]:
        """Median seconds of each."""
        return {
            name: statistics.median(turn["phases"][name] for turn in self.turns) for name in self.turns[0]["phases"]
        }


def measure(
    entries: Sequence[Entry],
    cases: Mapping[str, Case],
    python: Callable[[Entry], str],
    threads: int,
    warmup: int,
    tell: Callable[[Entry, dict[str, Any]], None],
) -> list[Measured]:
    """All sides of one run. They load at once and work in turn. A side that ends early drops out, the others go on.

    ``tell`` hears of everything at the moment it is known: settings, turns, failures.
    """
    found = [Measured(entry) for entry in entries]
    sides: list[Side] = []

    def attempt(measured: Measured, work: Callable[[], dict[str, Any]], **more: Any) -> dict[str, Any]:
        try:
            result = work()
        except Failed as error:
            measured.failed = str(error)
            tell(measured.entry, {"failed": measured.failed})
            return {}
        tell(measured.entry, {**more, **result})
        return result

    try:
        for entry in entries:
            sides.append(Side(entry, python(entry), cases[entry.work], threads))
        for side, measured in zip(sides, found, strict=True):
            measured.settings = attempt(measured, side.read).get("settings", {})
        last = cases[entries[0].work].turns - 1
        for number in range(last + 1):
            for side, measured in zip(sides, found, strict=True):
                alike, timed = len(cases[measured.entry.work].batches) == 1, warmup <= number < last
                if measured.failed or (number == last and not alike):
                    continue
                # Counting takes memory: it comes when the memory of the timed turns is known.
                order = "count" if number == last else "go"
                result = attempt(measured, lambda: side.turn(order), turn=number + 1, timed=timed)  # noqa: B023
                if not result:
                    continue
                measured.checks.append(result["checks"])
                if result["flops"]:
                    measured.flops, measured.phase_flops = result["flops"], result["phase_flops"]
                if timed:
                    measured.turns.append(result)
    finally:
        for side in sides:
            side.close()
    return found


def differences(one: Measured, other: Measured) -> list[str]:
    """Where two sides did not do the same work."""
    found = []
    tolerance = TOLERANCE[one.settings.get("dtype", "float32")]
    for number, (first, second) in enumerate(zip(one.checks, other.checks, strict=True), 1):
        for name in sorted(first.keys() | second.keys()):
            a, b = first.get(name), second.get(name)
            if a is None or b is None or not abs(a - b) <= tolerance * max(1.0, abs(a)):
                found.append(f"turn {number}: {name} is {a} and {b}")
    return found
