"""SIGKILL at random moments of every stage, half of them inside a checkpoint write; the same command goes on.

The suite strikes a few times. ``make faults`` strikes 30 times, and 10 more where only one checkpoint is kept.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto.report.log import read_metrics

KILLS = int(os.environ.get("RTO_FAULT_KILLS", "0"))  # 0: a few, one a stage
# What there is of a write, in the order in which it comes to be: its folder, then its files.
SIGHTS = ("", "tensors.safetensors", "state.json", "manifest.json")
Timing = dict[str, tuple[int, float]]  # by stage: its steps, and the seconds of one


@dataclass
class Kill:
    run: int
    stage: str  # the one that was going
    step: int  # the last that had a row of metrics
    left: str  # of the write that was struck; "" outside of one
    survived: bool = False

    def __str__(self) -> str:
        place = f"run {self.run}, {self.stage} after step {self.step}"
        return f"{place}, inside a write: {self.left}" if self.left else place


def inside(kills: list[Kill]) -> int:
    return sum(bool(kill.left) for kill in kills)


def strike(run: Any, number: int, stage: str, write: bool, dice: random.Random, timing: Timing) -> Kill | None:
    """Start the run and kill it in ``stage``: inside one of its next writes, or at any moment of any of its steps.
    None: it ended before that."""
    steps, seconds = timing[stage]
    before = min(run.logged(stage), steps - 1)
    attempt = run.start()
    attempt.until(lambda: run.going() == stage)
    if write:
        attempt.until(lambda: run.written(stage) is None)  # what a kill before this one has left goes first
        which, sight = dice.randint(1, 3), dice.choice(SIGHTS)
        begun: set[Path] = set()

        def seen() -> bool:
            if (path := run.written(stage)) is None:
                return run.going() != stage
            begun.add(path)
            return len(begun) == which and (path / sight).exists()

        attempt.until(seen)
    else:
        done = dice.randrange(before, steps)
        attempt.until(lambda: run.logged(stage) >= done or run.going() != stage)
        attempt.lives(dice.uniform(0, seconds))
    attempt.strike(signal.SIGKILL)
    code, said = attempt.ended()
    if code == 0:
        return None
    assert code == -signal.SIGKILL, said
    struck, left = run.going() or "end", ""
    if write and (path := run.written(stage)) is not None:  # a write struck by chance is not counted
        files = ", ".join(f"{file.name} {file.stat().st_size:,} B" for file in sorted(path.iterdir()))
        left = f"{path.parent.name}/{path.name} ({files or 'empty'})"
    return Kill(number, struck, run.logged(struck), left)


def timing_of(whole: Path) -> Timing:
    stages = json.loads((whole / "stages.json").read_text())
    steps = Counter(row["stage"] for row in read_metrics(whole))
    return {stage: (steps[stage], record["seconds"] / steps[stage]) for stage, record in stages.items()}


def campaign(make: Callable[[Path], Any], folder: Path, plan: list[str], count: int, seed: int) -> list[Kill]:
    """``count`` kills, or more until half of ``count`` were inside a write, over as many runs as that takes. ``plan``:
    the stages to strike in one run, in order. After each kill the same command goes on; each run ends by itself and
    is compared with the one that was never cut."""
    dice = random.Random(seed)
    kills: list[Kill] = []
    found: list[str] = []
    runs = 0
    while len(kills) < count or 2 * inside(kills) < count:
        assert runs < count, "the kills miss"
        runs += 1
        run = make(folder / f"cut{runs}")
        timing = timing_of(run.whole)
        struck: list[Kill] = []
        for planned in plan:
            if len(kills) >= count and 2 * inside(kills) >= count:
                break
            # It may have ended before its kill.
            stage = max(planned, run.going() or planned, key=run.stages.index)
            kill = strike(run, runs, stage, 2 * inside(kills) <= len(kills), dice, timing)
            if kill is None:
                break
            kills.append(kill)
            struck.append(kill)
            print(f"kill {len(kills)}: {kill}")
        code, said = run.go_on()
        assert code == 0, said
        differs = run.differs()
        for kill in struck:
            kill.survived = not differs
        found += [f"run {runs}: {line}" for line in differs]
        print(f"run {runs}: {len(struck)} kills, " + ("; ".join(differs[:3]) or "equal to the bit"))
    where = ", ".join(f"{stage} {number}" for stage, number in Counter(kill.stage for kill in kills).items())
    print(f"{len(kills)} kills in {runs} runs, {inside(kills)} of them inside a checkpoint write; {where}")
    print(f"{sum(kill.survived for kill in kills)} of {len(kills)} survived")
    assert not found, found
    return kills


def test_the_same_command_goes_on_after_every_kill(run_in, stages, tmp_path):
    plan = [stage for stage in stages for _ in range(2)] if KILLS else stages
    kills = campaign(run_in, tmp_path, plan, KILLS or 5, seed=0)
    assert len({kill.stage for kill in kills}) >= (len(stages) if KILLS else 3)


def test_with_one_checkpoint_kept(run_in, stages, tmp_path):
    """The one that there is goes only when the next one is safe."""
    plan = stages if KILLS else ["reward", "rl/rto"]
    campaign(lambda folder: run_in(folder, "--checkpoints.keep", "1"), tmp_path, plan, KILLS // 3 or 2, seed=1)
