"""The log of one run folder: ``metrics.jsonl``, ``samples.jsonl`` and the live progress.

One JSON object a line, for example ``{"stage": "prefer", "step": 3, "loss": 0.61}``. JSON has no NaN: a
number that is not finite is written as null and its key is listed under ``nonfinite`` in the same row.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RESERVED = ("stage", "step", "nonfinite")
Row = dict[str, Any]

logger = logging.getLogger(__name__)


class RunLog:
    """Appends rows to the two files of a run folder. Only the main process of a run may hold one."""

    def __init__(self, folder: Path | str) -> None:
        """Makes the folder if needed and removes a line that an earlier run left half-written."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SAMPLES):
            _mend(self.folder / name)

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Adds one row of numbers. ValueError if a key is one of :data:`RESERVED`."""
        self._append(METRICS, stage, step, {key: float(value) for key, value in values.items()})

    def sample(self, stage: str, step: int, record: Row) -> None:
        """Adds one record, such as ``{"prompt": ..., "answer": ..., "score": ...}``, of JSON values."""
        self._append(SAMPLES, stage, step, record)

    def sync(self) -> None:
        """Every row so far is on the disk when this returns."""
        for name in (METRICS, SAMPLES):
            if (self.folder / name).exists():
                with open(self.folder / name, "rb") as file:
                    os.fsync(file.fileno())

    def drop_stage(self, stage: str) -> None:
        """Removes the rows of a stage that is started afresh."""
        self._keep(lambda row: row["stage"] != stage)

    def cut(self, stage: str, step: int) -> None:
        """Removes a stage's rows of steps later than ``step``: it continues from there, and logs those again.

        All other rows keep their bytes. ValueError names a broken line that is not the last one.
        """
        self._keep(lambda row: row["stage"] != stage or row["step"] <= step)

    def _keep(self, wanted: Callable[[Row], bool]) -> None:
        for name in (METRICS, SAMPLES):
            path = self.folder / name
            _mend(path)
            kept = [(line, wanted(row)) for line, row in _lines(path)]
            if not all(stays for _, stays in kept):
                _replace(path, b"".join(line + b"\n" for line, stays in kept if stays))

    def _append(self, name: str, stage: str, step: int, values: Row) -> None:
        taken = [key for key in values if key in RESERVED]
        if taken:
            raise ValueError(f"{name}, stage {stage!r}, step {step}: the key {taken[0]!r} is the log's own: rename it")
        nonfinite: list[str] = []
        row = {"stage": stage, "step": step, **{key: _finite(key, part, nonfinite) for key, part in values.items()}}
        if nonfinite:
            row["nonfinite"] = nonfinite
        try:
            with open(self.folder / name, "ab") as file:
                file.write(_line(row).encode())
        except OSError as error:
            place = self.folder / name
            said = f"{error.strerror}: {place} takes no more rows. Make room, then give the same command again"
            raise OSError(error.errno, said) from error


def read_metrics(folder: Path | str, stage: str | None = None) -> list[Row]:
    """The rows of ``metrics.jsonl`` in the order written (of one stage); empty when there is no file.

    A half-written last line is left out and logged; ValueError names any other line that is broken.
    """
    return _read(Path(folder) / METRICS, stage)


def read_samples(folder: Path | str, stage: str | None = None) -> list[Row]:
    """The rows of ``samples.jsonl``, as :func:`read_metrics`."""
    return _read(Path(folder) / SAMPLES, stage)


def _finite(key: str, value: Any, nonfinite: list[str]) -> Any:
    """``value`` with null for every number that is not finite; the dotted keys of those go to ``nonfinite``."""
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(key)
        return None
    if isinstance(value, dict):
        return {name: _finite(f"{key}.{name}", part, nonfinite) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(f"{key}.{index}", part, nonfinite) for index, part in enumerate(value)]
    return value


def _line(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8 form: its backslash escape is what JSON writes for it.
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _read(path: Path, stage: str | None = None) -> list[Row]:
    return [row for _, row in _lines(path) if stage is None or row["stage"] == stage]


def _lines(path: Path) -> Iterator[tuple[bytes, Row]]:
    """Each line without its end, and the row that it holds."""
    if not path.exists():
        return
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is None and number < len(lines):
            raise ValueError(f"{path}, line {number}: no JSON object with 'stage' and a whole 'step'. Delete the line.")
        if row is not None:
            yield line, row
        elif line:
            logger.warning("%s: the last line is half-written and was left out", path)


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # bad JSON, bad UTF-8, or nested deeper than the parser goes
        return None
    whole = isinstance(row, dict) and isinstance(row.get("stage"), str) and type(row.get("step")) is int
    return row if whole else None


def _mend(path: Path) -> None:
    """Ends the file with a whole line, so that the next row does not stick to a broken one."""
    data = path.read_bytes() if path.exists() else b""
    if not data or data.endswith(b"\n"):
        return
    whole, _, last = data.rpartition(b"\n")
    if _parse(last) is not None:
        _replace(path, data + b"\n")
    else:
        logger.warning("%s: removed the half-written last line", path)
        _replace(path, whole + b"\n" if whole else b"")


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut could leave the new name with nothing in it
    os.replace(temporary, path)


class Progress:
    """Live progress of the stages on standard error: a bar on a terminal, else a plain line a tenth of the steps.

    Use: ``with Progress(enabled) as p: p.start("sft", 200)``, then ``p.update(step, {"loss": 0.6})``. Steps
    are counted from 1; the metrics are shown in their order, ``tokens_per_second`` under its own name.
    """

    SHOWN = 4  # metrics beside the bar

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._bar: Any = None  # rich.progress.Progress on a terminal
        self._task: Any = None
        self._stage = ""
        self._total = self._first = self._printed = 0
        self._began = 0.0

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            self._bar = _rich_bar()
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, stage: str, total_steps: int, done: int = 0) -> None:
        """A new stage; ``done`` steps were made by an earlier run that this one continues."""
        self._stage, self._total, self._first, self._printed = stage, total_steps, done, done
        self._began = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.stop_task(self._task)
            self._task = self._bar.add_task(stage, total=total_steps, completed=done, metrics="")

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics="  ".join(_shown(metrics, self.SHOWN)))
        elif self.enabled and self._due(step):
            self._printed = step
            print("  ".join(self._plain(step, metrics)), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)

    def _due(self, step: int) -> bool:
        last = step >= self._total
        return step > self._printed and (last or 10 * step // self._total > 10 * self._printed // self._total)

    def _plain(self, step: int, metrics: dict[str, float]) -> Iterator[str]:
        elapsed = time.monotonic() - self._began
        left = elapsed / max(step - self._first, 1) * max(self._total - step, 0)
        yield f"{self._stage} {step}/{self._total}"
        yield from _shown(metrics, self.SHOWN)
        yield f"{_clock(elapsed)} elapsed"
        yield f"{_clock(left)} left"


def _shown(metrics: dict[str, float], count: int) -> list[str]:
    named = [f"{key} {value:.4g}" for key, value in metrics.items() if key != "tokens_per_second"][:count]
    if "tokens_per_second" in metrics:
        named.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return named


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
