"""What an RL iteration costs beside its model calls, where models cost least: 1.5 million parameters.

    python -m benchmarks.overhead --threads 2

64 prompts of 16 tokens, answers of 32, the method RTO, two passes of updates: the workload `ppo` of benchmarks/speed
with a small model, in full and with LoRA. Model calls are the network's body, its output layer, backward passes and the
optimisers' steps; all the rest of an iteration is overhead. Then the lines of rto in which that time is spent.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.speed.case import Case
from benchmarks.speed.cases import TINY as TINY_MODEL
from benchmarks.speed.cases import Base, scratch_base
from benchmarks.speed.machine import described, use_threads
from benchmarks.speed.turns import Turns

SMALL = {"hidden": 128, "layers": 6, "heads": 4, "intermediate": 512}  # 1.6 million parameters
TARGET = 0.15
LOOKED = 2  # iterations after the timed ones, in which the lines are looked at
PARTS = ("body", "output layer", "backward", "optimiser")
# Part -> module, class or none, functions. Names that a module does not have are an error: the table would be wrong.
CALLS: tuple[tuple[str, str, str | None, tuple[str, ...]], ...] = (
    ("body", "rto.models.role", "Backbone", ("states", "forked", "packed")),
    ("output layer", "rto.models.role", "Backbone", ("project",)),
    ("output layer", "rto.numerics", None, ("selected_logprobs",)),
    ("backward", "torch", "Tensor", ("backward",)),
)


Spent = dict[str, float]  # seconds by part


class Clock:
    """Seconds inside of model calls, by part. A call within a call belongs to the outer one."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.inside = False

    @contextlib.contextmanager
    def running(self, part: str) -> Iterator[None]:
        if self.inside:
            yield
            return
        self.inside, begun = True, time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] += time.perf_counter() - begun
            self.inside = False

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running(part):
                return work(*args, **kwargs)

        return timed


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Model calls run on the clock."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    with contextlib.ExitStack() as stack:
        for part, module, kind, names in CALLS:
            holder = importlib.import_module(module)
            holder = holder if kind is None else getattr(holder, kind)
            for name in names:
                plain = getattr(holder, name)
                setattr(holder, name, clock.around(part, plain))
                stack.callback(setattr, holder, name, plain)
        steps: list[contextlib.AbstractContextManager[None]] = []

        def begin(*_: Any) -> None:
            steps.append(clock.running("optimiser"))
            steps[-1].__enter__()

        def end(*_: Any) -> None:
            steps.pop().__exit__(None, None, None)

        for hook in (register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)):
            stack.callback(hook.remove)
        yield


class Lines:
    """Looks at the main thread every millisecond: in which line of ``below`` is it, when in no model call? Only while
    ``on``."""

    def __init__(self, clock: Clock, below: str) -> None:
        self.clock, self.below, self.on = clock, below, False
        self.seen: Counter[str] = Counter()
        self._main, self._over = threading.main_thread().ident, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Lines:
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)  # of Python's lock: else plain Python would be seen every 5 ms only
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        sys.setswitchinterval(self._interval)

    def _look(self) -> None:
        while not self._over.wait(1e-3):
            if self.on and not self.clock.inside and self._main is not None:
                self.seen[self._line(sys._current_frames().get(self._main))] += 1

    def _line(self, frame: FrameType | None) -> str:
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(self.below):
                return f"{file[len(self.below) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "elsewhere"


class Timed(Turns):
    """Takes all of its turns at once. ``took``: seconds of each, and of its model calls by part. After the first
    ``timed`` ones the lines are looked at."""

    def __init__(self, turns: int, timed: int, clock: Clock, lines: Lines) -> None:
        super().__init__(io.StringIO("go\n" * turns), io.StringIO())
        self.took: list[tuple[float, Spent]] = []
        self._timed, self._clock, self._lines = timed, clock, lines

    def begin(self) -> None:
        super().begin()
        self._clock.spent.clear()
        self._lines.on = self.number >= self._timed

    def stop(self) -> None:
        super().stop()
        self._lines.on = False
        self.took.append((self._seconds, dict(self._clock.spent)))


def make_case(base: Base, folder: Path, turns: int, lora: int | None, quick: bool) -> Case:
    """The workload of RL, at the default micro_tokens."""
    import random

    draw = random.Random(0)
    rows, asked, limit = (8, 4, 6) if quick else (64, 16, 32)
    prompts = [{"prompt": [draw.randrange(*base.words) for _ in range(asked)]} for _ in range(rows)]
    return Case(
        "overhead",
        "ppo",
        base.model,
        base.classifier,
        str(folder),
        base.pad,
        [prompts],
        turns,
        micro_tokens=16384,
        micro_rows=rows,
        lr=1e-6,
        limit=limit,
        lora=lora,
    )


def measure(case: Case, warmup: int, repeats: int) -> tuple[list[tuple[float, Spent]], Counter[str]]:
    """The timed iterations, and the lines of overhead in those after them, so that looking does not slow them."""
    from benchmarks.speed import ppo

    import rto
    from rto.policy import rollout, train

    clock = Clock()
    lines = Lines(clock, str(Path(rto.__file__).parent))
    turns = Timed(case.turns, warmup + repeats, clock, lines)
    plain = rollout.generate, train.update
    try:
        with watched(clock), lines:
            ppo.rto(case, turns)
    finally:
        rollout.generate, train.update = plain  # the workload puts a watch on them
    return turns.took[warmup : warmup + repeats], lines.seen


def table(name: str, took: list[tuple[float, Spent]]) -> tuple[str, float]:
    """A line, and the share of overhead: the median over iterations."""
    share = statistics.median(1 - sum(spent.values()) / seconds for seconds, spent in took)
    parts = [statistics.median(spent.get(part, 0.0) for _, spent in took) for part in PARTS]
    cells = [name, f"{statistics.median(seconds for seconds, _ in took):.3f}", *(f"{part:.3f}" for part in parts)]
    return f"| {' | '.join([*cells, f'{share:.1%}'])} |", share


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where the overhead is more than the target."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few tokens: its shares say nothing")
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lines", type=int, default=12, help="lines of overhead that are shown")
    known = parser.parse_args(arguments)
    use_threads(known.threads)
    print(described(known.threads), end="\n\n")
    heads = ["training", "seconds an iteration", *PARTS, "overhead"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    told, worst = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        base = scratch_base(Path(folder), **(TINY_MODEL if known.quick else SMALL))
        for name, lora in (("full models", None), ("LoRA, r 16", 16)):
            case = make_case(base, Path(folder), known.warmup + known.repeats + LOOKED, lora, known.quick)
            took, seen = measure(case, known.warmup, known.repeats)
            line, share = table(name, took)
            print(line, flush=True)
            worst = max(worst, share)
            total = max(1, sum(seen.values()))
            told += [f"\n{name}: lines of the overhead, by how often they were at work\n"]
            told += [f"- {count / total:.1%} {line}" for line, count in seen.most_common(known.lines)]
    print("\n".join(told))
    if not known.quick:
        print(f"\noverhead at most {worst:.1%}, target {TARGET:.0%}")
    return int(worst > TARGET and not known.quick)


if __name__ == "__main__":
    sys.exit(main())
