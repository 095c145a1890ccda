"""Warnings while a stage trains: the doctor's, each once, also after the stage went on from a checkpoint."""

from __future__ import annotations

from rto.report.log import read_metrics
from rto.report.watch import WatchedLog


def hack(log: WatchedLog, steps: range) -> None:
    """Reward and length rise together while the oracle falls."""
    for step in steps:
        rising = {"reward/segment": 0.1 * step, "reward/kl": 0.0, "reward/total": 0.1 * step, "length": 10.0 + step}
        log.metrics("rl/x", step, {**rising, "oracle": -0.1 * step, "kl": 0.5 * step, "finished": 1.0})


def test_each_rule_is_said_once_a_stage(tmp_path):
    said: list[str] = []
    hack(WatchedLog(tmp_path, said.append), range(1, 31))
    assert any("reward-hacking in rl/x" in line for line in said)
    assert len({line.split(" in ")[0] for line in said}) == len(said)
    assert len(read_metrics(tmp_path)) == 30


def test_a_stage_that_goes_on_is_judged_with_its_earlier_rows(tmp_path):
    said: list[str] = []
    hack(WatchedLog(tmp_path, said.append), range(1, 3))
    assert not said  # two rows are no trend
    hack(WatchedLog(tmp_path, said.append), range(3, 31))
    assert any("reward-hacking" in line for line in said)


def test_a_healthy_stage_is_quiet(tmp_path):
    said: list[str] = []
    log = WatchedLog(tmp_path, said.append)
    for step in range(1, 30):
        log.metrics("sft", step, {"loss": 3.0 - 0.05 * step, "lr": 1e-4, "grad_norm": 0.5})
    assert not said
