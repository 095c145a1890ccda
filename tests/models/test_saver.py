"""Saving beside training: the loop waits for a copy only, nothing is lost, the best step, and steps left out."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rto.config import Best, NonFinite
from rto.data.chat import AnswerRow
from rto.finite import Culprit, NotFinite
from rto.models.incidents import Incidents
from rto.models.runtime import Runtime
from rto.models.saver import Moving, Saver, best_of
from rto.models.store import Store
from rto.report.log import RunLog, read_metrics

ROW = AnswerRow(17, "ask", [1, 2], [3, 4, 5], True)
ERROR = NotFinite(Culprit("policy", "log-prob", "nan", 0, "answer", 1), [ROW])


@dataclass
class Adam:
    """As much of an optimiser as a saver sees."""

    step_count: int = 0
    scale: float = 1.0

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"0/step": torch.tensor(float(self.step_count))}

    def restore(self, tensors: dict[str, torch.Tensor], step_count: int) -> None:
        assert tensors["0/step"].item() == step_count
        self.step_count = step_count


def moving() -> Moving:
    return Moving({"role": [torch.zeros(3)], "beside": [torch.zeros(1)]}, {"role": Adam()})


def saver(folder: Path, **changes: Any) -> Saver:
    given: dict[str, Any] = {"every": 2, "runtime": Runtime("cpu"), "say": print, "log": RunLog(folder)}
    given |= {"incidents": Incidents(folder / "incidents", lambda ids: " ".join(f"w{i}" for i in ids))}
    return Saver("prefer", Store(folder / "checkpoints" / "prefer"), **{**given, **changes})


def fine() -> None:
    """The model says numbers."""


def train(keeper: Saver, state: Moving, first: int, last: int, scores: dict[int, float]) -> None:
    """Steps after ``first``, to ``last``: each sets the weights to its number, and is measured."""
    keeper.begin(0, last, state)
    for step in range(first + 1, last + 1):
        state.weights["role"][0].fill_(float(step))
        state.optimizers["role"].step_count = step
        keeper.consider(step, state, {"eval_x": scores[step]})
        keeper.after(step, last, state)
    assert keeper.finish(last, state, fine)


def test_a_write_does_not_hold_up_the_loop(tmp_path, monkeypatch):
    """The disk is slow: the next step changes the weights meanwhile, and what is written is the copy."""
    go, begun = threading.Event(), threading.Event()
    plain = Store.save

    def slow(self: Store, *given: Any) -> None:
        begun.set()
        assert go.wait(30)
        plain(self, *given)

    monkeypatch.setattr(Store, "save", slow)
    keeper, state = saver(tmp_path), moving()
    keeper.begin(0, 9, state)
    state.weights["role"][0].fill_(2.0)
    keeper.after(2, 9, state)
    assert begun.wait(30) and not list((tmp_path / "checkpoints").rglob("step-*"))
    state.weights["role"][0].fill_(3.0)
    keeper.after(3, 9, state)
    go.set()
    keeper.finish(9, state, fine)
    found = Store(tmp_path / "checkpoints" / "prefer").load()
    assert found is not None and found.step == 2 and found.tensors["role/0"].tolist() == [2.0] * 3


def test_a_write_that_fails_is_said_at_the_next_step(tmp_path, monkeypatch):
    def full(self: Store, *given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "save", full)
    keeper, state = saver(tmp_path), moving()
    keeper.begin(0, 9, state)
    keeper.after(2, 9, state)
    assert keeper.writer._thread is not None
    keeper.writer._thread.join()
    with pytest.raises(OSError, match="No space left"):
        keeper.after(3, 9, state)


def test_a_signal_waits_for_the_write(tmp_path):
    asked: list[str] = []
    keeper = saver(tmp_path, wanted=lambda: asked[0] if asked else None, stop=lambda name: KeyError(name))
    state = moving()
    keeper.begin(0, 9, state)
    keeper.after(1, 9, state)
    asked.append("SIGTERM")
    with pytest.raises(KeyError, match="SIGTERM"):
        keeper.after(3, 9, state)
    found = keeper.store.load()
    assert found is not None and found.step == 3


@pytest.mark.parametrize(("goal", "step"), [("max", 2), ("min", 5)])
def test_the_best_step_is_the_model(tmp_path, goal, step):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.9, 5: 0.05, 6: 0.3}
    keeper, state = saver(tmp_path, best=Best(metric="eval_x", goal=goal)), moving()
    train(keeper, state, 0, 6, scores)
    assert state.weights["role"][0].tolist() == [float(step)] * 3  # of 0.9 and 0.9 the first
    best_of(keeper.store).clear()
    assert not list((tmp_path / "checkpoints").glob("*.best"))


def test_the_best_step_survives_an_interruption(tmp_path):
    """Cut after step 5: the checkpoint of step 4 knows that step 3 was best; steps 5 and 6 are done anew."""
    scores = {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.1, 5: 0.3, 6: 0.4}
    best = Best(metric="eval_x")
    keeper, state = saver(tmp_path, best=best), moving()
    keeper.begin(0, 6, state)
    for step in range(1, 6):
        state.weights["role"][0].fill_(float(step))
        state.optimizers["role"].step_count = step
        keeper.consider(step, state, {"eval_x": scores[step]})
        keeper.after(step, 6, state)
    keeper.writer.wait()
    found = keeper.store.load()
    assert found is not None and found.step == 4
    again, state = saver(tmp_path, best=best, found=found), moving()
    train(again, state, 4, 6, scores)
    assert state.weights["role"][0].tolist() == [3.0] * 3


def test_a_metric_that_is_not_there_is_refused(tmp_path):
    keeper = saver(tmp_path, best=Best(metric="eval_los"))
    said = "best.metric = 'eval_los' is not measured in prefer; these are: eval_loss, loss"
    with pytest.raises(ValueError, match=said):
        keeper.consider(1, moving(), {"loss": 1.0, "eval_loss": 0.5})


def test_a_checkpoint_of_a_step_that_is_no_more(tmp_path):
    keeper, state = saver(tmp_path), moving()
    keeper.begin(0, 9, state)
    state.optimizers["role"].step_count = 8
    keeper.after(8, 9, state)
    keeper.writer.wait()
    again = saver(tmp_path, found=keeper.store.load())
    with pytest.raises(ValueError, match="its checkpoint is of step 8, the stage now ends with 4: give it more steps"):
        again.begin(0, 4, moving())


def test_steps_in_a_row_are_counted(tmp_path):
    keeper, state = saver(tmp_path, nonfinite=NonFinite(skip=2)), moving()
    for step in (1, 2, 2, 4, 5):  # two of step 2 are one, with one file; step 3 was good
        assert keeper.met(step, ERROR, state) is False
    said = (
        r"^prefer, step 6: the log-prob of the policy is nan \(data row 17, answer, token 1\), the token 'w4'; see .*"
        r"0005-prefer-step-6.json. Steps are left out up to nonfinite.skip = 2 in a row, and this is one more$"
    )
    with pytest.raises(NotFinite, match=said):
        keeper.met(6, ERROR, state)


def steps(keeper: Saver, state: Moving, first: int, last: int) -> None:
    for step in range(first, last + 1):
        state.weights["role"][0].fill_(float(step))
        state.optimizers["role"].step_count = step
        keeper.log.metrics("prefer", step, {"loss": 1.0})
        keeper.after(step, 99, state)


def test_back_to_the_checkpoint(tmp_path):
    rule = NonFinite(skip=0, then="rollback", rollbacks=1)
    keeper, state = saver(tmp_path, nonfinite=rule), moving()
    keeper.begin(0, 99, state)  # saved before the first step
    steps(keeper, state, 1, 3)
    state.weights["beside"][0].fill_(7.0)
    assert keeper.met(4, ERROR, state) is True
    assert state.weights["role"][0].tolist() == [2.0] * 3 and state.weights["beside"][0].tolist() == [0.0]
    assert state.optimizers["role"].scale == 0.5 and state.optimizers["role"].step_count == 2
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    keeper.writer.wait()
    found = keeper.store.load()
    assert found is not None and found.step == 2
    again, other = saver(tmp_path, nonfinite=rule, found=found), moving()
    again.begin(0, 99, other)
    assert other.optimizers["role"].scale == 0.5  # an interruption does not undo it
    fresh = moving()  # the next round of a stage has another optimiser
    again.begin(50, 99, fresh)
    assert fresh.optimizers["role"].scale == 0.5
    with pytest.raises(NotFinite, match="nonfinite.rollbacks = 1"):
        again.met(3, ERROR, other)


def test_a_checkpoint_that_no_good_step_came_after_is_not_gone_back_to(tmp_path):
    """The update of step 4 broke the weights: its checkpoint holds them."""
    rule = NonFinite(skip=1, then="rollback", rollbacks=1)
    keeper, state = saver(tmp_path, nonfinite=rule), moving()
    keeper.begin(0, 99, state)
    steps(keeper, state, 1, 4)
    assert keeper.met(5, ERROR, state) is False
    keeper.after(5, 99, state)
    keeper.writer.wait()
    assert keeper.store.steps() == [2, 4]
    assert keeper.met(6, ERROR, state) is True
    assert state.weights["role"][0].tolist() == [2.0] * 3
    keeper.writer.wait()
    assert keeper.store.steps() == [2]


def test_a_step_that_was_left_out_makes_no_checkpoint(tmp_path):
    keeper, state = saver(tmp_path, wanted=lambda: "SIGTERM", stop=KeyError), moving()
    keeper.begin(0, 99, state)
    assert keeper.met(2, ERROR, state) is False
    with pytest.raises(KeyError):
        keeper.after(2, 99, state)
    assert keeper.store.load() is None


def test_the_model_is_looked_at_after_its_last_step(tmp_path):
    def broken() -> None:
        raise ERROR

    keeper, state = saver(tmp_path), moving()
    keeper.begin(0, 99, state)
    steps(keeper, state, 8, 8)
    with pytest.raises(NotFinite, match="No good step came after the checkpoint of step 8: delete it if the same"):
        keeper.finish(8, state, broken)
    back, state = saver(tmp_path / "back", nonfinite=NonFinite(then="rollback")), moving()
    back.begin(0, 9, state)
    assert back.finish(9, state, broken) is False  # and the loop goes on from there
    back.writer.wait()


def test_an_error_without_a_row(tmp_path):
    keeper = saver(tmp_path)
    error = NotFinite(Culprit("policy", "gradient norm", "inf"), [ROW, replace(ROW, row=19)])
    assert keeper.met(1, error, moving()) is False
    (path,) = (tmp_path / "incidents").glob("*.json")
    text = path.read_text()
    assert '"text": "w3 w4 w5"' in text and '"row": 19' in text and "data rows 17, 19" in str(error)


def test_a_stage_whose_every_step_was_left_out_has_no_model(tmp_path):
    keeper, state = saver(tmp_path), moving()
    keeper.begin(0, 2, state)
    for step in (1, 2):
        assert keeper.met(step, ERROR, state) is False
        keeper.after(step, 2, state)
    with pytest.raises(ValueError, match="prefer: every step was left out, nothing was trained: see .*incidents"):
        keeper.finish(2, state, fine)


def test_what_is_no_number_is_not_the_best(tmp_path):
    keeper, state = saver(tmp_path, best=Best(metric="eval_x")), moving()
    train(keeper, state, 0, 3, {1: math.nan, 2: 0.5, 3: 0.25})
    assert state.weights["role"][0].tolist() == [2.0] * 3


def test_a_round_does_not_go_back_into_the_one_before(tmp_path):
    """Nothing good has come since the checkpoint that the round began with: still no older one is this round's."""
    keeper, state = saver(tmp_path, nonfinite=NonFinite(skip=0, then="rollback")), moving()
    keeper.begin(0, 3, state)
    steps(keeper, state, 1, 3)
    keeper.begin(3, 9, state)
    keeper.writer.wait()
    assert keeper.store.steps() == [2, 3]
    state.weights["role"][0].fill_(9.0)
    assert keeper.met(4, ERROR, state) is True
    assert state.weights["role"][0].tolist() == [3.0] * 3
    keeper.writer.wait()
    (keeper.store.folder / "step-00000003" / "tensors.safetensors").write_bytes(b"")
    said = (
        "no checkpoint from step 3 on, where this round began, is whole: give the same command again, .* from step 2$"
    )
    with pytest.raises(ValueError, match=said):
        keeper.met(4, ERROR, state)


def test_what_lies_beside_is_written_before_every_checkpoint(tmp_path):
    asked: list[list[int]] = []
    keeper, state = saver(tmp_path, nonfinite=NonFinite(skip=0, then="rollback")), moving()
    keeper.beside = lambda: asked.append(keeper.store.steps())
    keeper.begin(0, 99, state)
    assert asked == [[]]
    steps(keeper, state, 1, 3)
    assert len(asked) == 2
    assert keeper.met(4, ERROR, state) is True  # its checkpoint is written anew
    assert len(asked) == 3
    keeper.writer.wait()
