"""Runs both sides of a case, each in a process of its own, one after the other and turn by turn: A B A B ..."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.case import Case
from benchmarks.speed.machine import environment

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3


class Failed(RuntimeError):
    """A side ended early."""


class Side:
    """A process that does its turns when it is asked to."""

    def __init__(self, side: str, python: str, case: Case, threads: int, variant: str) -> None:
        folder = Path(case.folder)
        self.name, self._log = side, folder / f"{case.name}-{side}-{variant}.log"
        file = folder / f"{case.name}.json"
        case.write(file)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.speed.worker", side, str(file)],
                cwd=ROOT,
                env=environment(threads, variant),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = "\n".join(self._log.read_text().splitlines()[-15:])
            raise Failed(f"the {self.name} side ended with code {self._process.wait()}; its last words:\n{said}")
        return json.loads(line)

    def turn(self, order: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(order, file=self._process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        """Nobody is waited for: there is nothing left to be written."""
        self._process.kill()
        self._process.communicate()


@dataclass
class Measured:
    """What one side did in one variant."""

    side: str
    variant: str
    settings: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)  # the timed ones
    checks: list[dict[str, float]] = field(default_factory=list)  # of all turns
    flops: int = 0  # of one turn; 0: not counted, because the turns differ

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


def measure(case: Case, variant: str, pythons: dict[str, str], threads: int, warmup: int) -> list[Measured]:
    """Both sides of a case; ``pythons`` names the interpreter of each. One side alone is measured alone.

    Raises:
        Failed: a side ended early.
    """
    alike = len(case.batches) == 1
    sides: list[tuple[Side, Measured]] = []
    try:
        for name, python in pythons.items():  # one after the other: loading is no part of anything
            side = Side(name, python, case, threads, variant)
            sides.append((side, Measured(name, variant)))
            sides[-1][1].settings = side.read()["settings"]
        for number in range(case.turns):
            for side, found in sides:
                result = side.turn("count" if alike and number == warmup - 1 else "go")
                found.checks.append(result["checks"])
                found.flops = found.flops or result["flops"]
                if number >= warmup:
                    found.turns.append(result)
    finally:
        for side, _ in sides:
            side.close()
    return [found for _, found in sides]


def differences(measured: Sequence[Measured]) -> list[str]:
    """Where two sides did not do the same work."""
    if len(measured) < 2:
        return []
    found = []
    for number, (one, other) in enumerate(zip(*(side.checks for side in measured), strict=True), 1):
        for name in one.keys() | other.keys():
            a, b = one.get(name), other.get(name)
            if a is None or b is None or not abs(a - b) <= TOLERANCE * max(1.0, abs(a)):
                found.append(f"turn {number}: {name} is {a} and {b}")
    return found
