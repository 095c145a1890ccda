"""Trackers get every row of a run, and its recipe. Stand-ins of the packages record at their own interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType

from rto.cli import main
from rto.report.log import read_metrics

SHORT = ["--quiet", "--sft.max_steps", "2", "--prefer.max_steps", "2", "--reward.max_steps", "1"]
SHORT += ["--policy.max_steps", "1", "--stages", '["sft", "prefer", "reward", "rl"]']
ALL = ["--trackers", '["tensorboard", "wandb", "trackio"]']


class SummaryWriter:
    """torch.utils.tensorboard's: hyperparameters of any other type are a ValueError."""

    def __init__(self, folder: str) -> None:
        self.folder, self.scalars, self.hparams = folder, [], {}
        WRITERS.append(self)

    def add_hparams(self, hparam_dict: dict[str, Any], metric_dict: dict[str, float]) -> None:
        for value in hparam_dict.values():
            if not isinstance(value, int | float | str | bool):
                raise ValueError("value should be one of int, float, str, bool, or torch.Tensor")
        self.hparams = hparam_dict

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        self.scalars.append((tag, value, global_step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.folder = ""


class Run:
    """wandb's, which drops a row whose step is below the last one's, and trackio's, which keeps it."""

    def __init__(self, drops: bool) -> None:
        self.drops, self.step, self.rows, self.axes, self.finished = drops, 0, [], {}, False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        if step is not None and self.drops and step < self.step:
            return
        self.step = self.step if step is None else step
        self.rows.append((self.step, values))
        self.step += step is None

    def finish(self) -> None:
        self.finished = True


class Config(dict):
    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        super().update(values)


WRITERS: list[SummaryWriter] = []


def package(name: str, run: Run) -> ModuleType:
    module = ModuleType(name)
    module.config = Config()  # type: ignore[attr-defined]
    module.init = lambda project: run  # type: ignore[attr-defined]
    return module


@pytest.fixture
def installed(monkeypatch) -> dict[str, Run]:
    """All three, as far as accelerate can tell."""
    WRITERS.clear()
    runs = {"wandb": Run(drops=True), "trackio": Run(drops=False)}
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for name, run in runs.items():
        monkeypatch.setitem(sys.modules, name, package(name, run))
    have(monkeypatch, LoggerType.TENSORBOARD, LoggerType.WANDB, LoggerType.TRACKIO)
    return runs


def have(monkeypatch, *trackers: LoggerType) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", list(trackers))


def test_every_row_of_every_stage_arrives(installed, monkeypatch, world_recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", world_recipe, "--output", str(folder), *SHORT, *ALL]) == 0, capsys.readouterr().err
    logged = read_metrics(folder)
    stages = ["sft", "sft", "prefer", "prefer", "reward", "rl/ppo", "rl/rto"]
    assert [(row["stage"], row["step"]) for row in logged] == list(zip(stages, [1, 2, 1, 2, 1, 1, 1], strict=True))
    rows = [
        (row["step"], {f"{row['stage']}/{key}": value for key, value in row.items() if key not in ("stage", "step")})
        for row in logged
    ]
    (board,) = WRITERS
    assert board.scalars == [(key, value, step) for step, row in rows for key, value in row.items()]
    assert installed["trackio"].rows == rows
    wandb = installed["wandb"]
    kept = [row | {f"{stage}/step": step} for stage, (step, row) in zip(stages, rows, strict=True)]
    assert wandb.rows == list(enumerate(kept))
    assert wandb.axes == {key: f"{stage}/step" for stage, (_, row) in zip(stages, rows, strict=True) for key in row}
    assert wandb.finished and installed["trackio"].finished and board.folder == ""

    told = board.hparams
    assert told == sys.modules["wandb"].config == sys.modules["trackio"].config
    wanted = {"data.sft": 48, "sft.lr": 0.01, "model.packing": False, "device": "cpu", "model.lora": "null"}
    wanted |= {"trackers": '["tensorboard", "wandb", "trackio"]', "policy.kl.coef": 0.01, "baselines.ppo.method": "ppo"}
    assert {key: told.get(key) for key in wanted} == wanted

    have(monkeypatch)  # elsewhere
    assert main(["generate", str(folder), "--policy", "sft", "--limit", "1"]) == 0
    assert main(["rl", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("rto: trackers: 'tensorboard' is not installed")


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, world_recipe, tmp_path, capsys, verb):
    have(monkeypatch, LoggerType.TENSORBOARD)
    folder: Path = tmp_path / "run"
    assert main([verb, world_recipe, "--output", str(folder), *ALL]) == 2
    said = "rto: trackers: 'wandb' is not installed: pip install wandb, or take it out of the list\n"
    assert capsys.readouterr().err == said
    assert not folder.exists()
