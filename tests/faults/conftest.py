"""A tiny pipeline whose every stage saves every step, and processes that run it and may be struck at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rto.pipeline.resume_check import differences
from rto.report.log import read_metrics

RECIPE = """
device = "cpu"
stages = ["sft", "prefer", "reward", "rl"]
[data]
type = "world"
sft = 48
pairs = 48
prompts = 24
test = 8
max_response = 12
[model]
type = "scratch"
hidden = 16
layers = 1
heads = 2
intermediate = 16
[sft]
lr = 1e-2
batch = 8
[prefer]
lr = 1e-3
batch = 8
eval_every = 1
[prefer.best]
metric = "eval_loss"
goal = "min"
[reward]
lr = 1e-3
batch = 8
[policy]
lr = 1e-3
rollouts = 4
batch = 4
updates = 2
reward_scaling = "std"
[policy.best]
metric = "reward/total"
[policy.kl]
controller = "adaptive"
target = 0.01
ema = 0.9
[baselines.ppo]
method = "ppo"
[evaluation.oracle]
type = "world"
[checkpoints]
every = 1
rl_every = 1
"""
LAUNCHER = Path(__file__).with_name("launcher.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SECONDS = 120  # longer than any one attempt, on a busy machine too
# A small disk that only this command and its children see, and that goes when they end. Needs Linux, and root or
# user namespaces.
MOUNT = ("unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"')


class Launcher:
    """``launcher.py`` in a process of its own. ``small``: a disk of 4 MiB on which its runs may be; None: it cannot be
    had here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        words = [sys.executable, str(LAUNCHER)]
        self.small: Path | None = folder / "small"
        self.small.mkdir()
        if shutil.which("unshare") and not subprocess.run([*MOUNT, self.small, "true"], capture_output=True).returncode:
            words = [*MOUNT, str(self.small), *words]
        else:
            self.small = None
        pipe = subprocess.PIPE
        # Unbuffered: whether there is something to read is asked of the pipe itself.
        self.process = subprocess.Popen(words, env=ENVIRONMENT, stdin=pipe, stdout=pipe, bufsize=0)
        assert self.read() == "ready"

    def start(self, words: list[str], largest: int | None = None) -> Attempt:
        """``rto WORDS`` in a new process. One at a time."""
        self.count += 1
        said = self.folder / f"said{self.count}"
        said.touch()  # the process may be struck before it opens it
        order = {"words": words, "said": str(said), "largest": largest}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        return Attempt(self, int(self.read()), said)

    def quiet(self, seconds: float) -> bool:
        """Whether it says nothing for so long."""
        return not select.select([self.process.stdout], [], [], seconds)[0]

    def read(self) -> str:
        assert not self.quiet(SECONDS), "hangs"
        return self.process.stdout.readline().decode().strip()

    def seen_here(self, folder: Path) -> Path:
        """A folder of the small disk, as this process gets to it."""
        return Path(f"/proc/{self.process.pid}/root{folder}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(SECONDS)
        self.process.stdout.close()


@dataclass
class Attempt:
    """One process of a run."""

    launcher: Launcher
    pid: int
    said: Path

    def lives(self, seconds: float) -> bool:
        """Whether it still does after so many seconds."""
        return self.launcher.quiet(seconds)

    def until(self, seen: Callable[[], Any]) -> bool:
        """Looks every half millisecond. False: it ended before, or hangs."""
        end = time.monotonic() + SECONDS
        while self.lives(0.0005) and time.monotonic() < end:
            if seen():
                return True
        return False

    def strike(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    def ended(self) -> tuple[int, str]:
        """Exit code, or a signal as a negative number; and what it said."""
        with contextlib.ExitStack() as unread:
            unread.callback(self.strike, signal.SIGKILL)  # an attempt that hangs, or a test that is stopped
            code = int(self.launcher.read())
            unread.pop_all()
        return code, self.said.read_text()


@dataclass
class Run:
    """A run folder as it is seen here, and the command that starts and continues the run."""

    launcher: Launcher
    words: list[str]
    folder: Path
    whole: Path
    stages: list[str]

    def start(self, largest: int | None = None) -> Attempt:
        return self.launcher.start(self.words, largest)

    def go_on(self, largest: int | None = None) -> tuple[int, str]:
        return self.start(largest).ended()

    def going(self) -> str | None:
        """The first stage that is not finished."""
        path = self.folder / "stages.json"
        finished = json.loads(path.read_text()) if path.exists() else {}
        return next((stage for stage in self.stages if stage not in finished), None)

    def logged(self, stage: str) -> int:
        """The last step of a stage that has a row of metrics; 0: none."""
        return max((row["step"] for row in read_metrics(self.folder, stage)), default=0)

    def place(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints."""
        return self.folder / "checkpoints" / stage.replace("/", "_")

    def best(self, stage: str) -> Path:
        """Where it keeps its best weights so far."""
        return self.place(stage).with_name(f"{self.place(stage).name}.best")

    def steps(self, stage: str) -> list[int]:
        """The checkpoints that are there."""
        return sorted(int(path.name[5:]) for path in self.place(stage).glob("step-*"))

    def written(self, stage: str) -> Path | None:
        """The checkpoint that is being written, of the last or of the best weights. An old one that is being removed
        has such a name too, but not the highest number."""
        for place in (self.place(stage), self.best(stage)):
            there = sorted(int(path.name[5:]) for path in place.glob("step-*"))
            for path in place.glob(".tmp-step-*"):
                if int(path.name[10:]) > max(there, default=-1):
                    return path
        return None

    def differs(self) -> list[str]:
        """From the run that was never cut: weights to the bit, rows of metrics and answers; nothing is left over."""
        left = [f"{path} is left" for path in self.folder.glob("checkpoints/*/*")]
        return [*differences(self.whole, self.folder), *left]


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "faults.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def whole(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, by a process that nobody forked."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    words = [sys.executable, str(LAUNCHER), "run", str(recipe_file), "--output", str(folder), "--quiet"]
    ended = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="session")
def stages(whole: Path) -> list[str]:
    """In the order in which they are done."""
    return list(json.loads((whole / "stages.json").read_text()))


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with contextlib.closing(Launcher(tmp_path_factory.mktemp("said"))) as launcher:
        yield launcher


@pytest.fixture(scope="session")
def run_in(recipe_file: Path, whole: Path, stages: list[str], launcher: Launcher) -> Callable[..., Run]:
    """``run_in(folder, *more words)``."""

    def make(folder: Path, *more: str) -> Run:
        inside = launcher.small is not None and folder.is_relative_to(launcher.small)
        words = ["run", str(recipe_file), "--output", str(folder), *more]
        return Run(launcher, words, launcher.seen_here(folder) if inside else folder, whole, stages)

    return make


@pytest.fixture(scope="session")
def stopped(run_in: Callable[..., Run], stages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left in its last stage with two checkpoints. To be copied."""
    run = run_in(tmp_path_factory.mktemp("stopped") / "run")
    attempt = run.start()
    attempt.until(lambda: len(run.steps(stages[-1])) == 2)
    attempt.strike(signal.SIGTERM)
    code, said = attempt.ended()
    assert code == 75 and len(run.steps(stages[-1])) == 2, said
    return run.folder
