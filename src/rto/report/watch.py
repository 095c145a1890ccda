"""A run log that reads what it writes: the doctor's findings are said while a stage trains, each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rto.report.doctor import live
from rto.report.log import Row, RunLog, read_metrics


class WatchedLog(RunLog):
    """``say`` is told of each rule that strikes, once a stage."""

    def __init__(self, folder: Path | str, say: Callable[[str], None]) -> None:
        super().__init__(folder)
        self._say = say
        self._rows: list[Row] = []  # of the stage that is being trained
        self._said: set[str] = set()

    def _keep(self, wanted: Callable[[Row], bool]) -> None:
        super()._keep(wanted)
        self._rows = []  # read anew: some may be gone

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        super().metrics(stage, step, values)
        if not self._rows or self._rows[-1]["stage"] != stage:
            self._rows, self._said = read_metrics(self.folder, stage)[:-1], set()
        self._rows.append({"stage": stage, "step": step, **values})
        for finding in live(self._rows):
            if finding.rule not in self._said:
                self._said.add(finding.rule)
                self._say(str(finding))
