"""One side of one case, in a process of its own: ``python -m benchmarks.speed.worker rto case.json``."""

from __future__ import annotations

import importlib
import os
import sys

from benchmarks.speed.case import Case
from benchmarks.speed.turns import Turns


def main(side: str, file: str) -> None:
    # Libraries print: only what we say goes to the driver, the rest goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case = Case.read(file)
    serve(side, case, Turns(sys.stdin, answers, case.device))


def serve(side: str, case: Case, turns: Turns) -> None:
    """Load, then take turns until there are no more."""
    workload = importlib.import_module(f"benchmarks.speed.{case.workload}")
    {"rto": workload.rto, "peer": workload.peer}[side](case, turns)


if __name__ == "__main__":
    main(*sys.argv[1:])
