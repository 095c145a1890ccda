"""The loop of SFT, DPO and reward models: cutting a batch changes nothing, every row counts once, NaN stops it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rto.config import Supervised
from rto.finite import NotFinite
from rto.models.memory import Budget
from rto.optim import Optimizer
from rto.preferences import bradley_terry, dpo
from rto.preferences.train import PairObjective, SftObjective, evaluate, fit, gradients
from rto.report.log import Progress, RunLog, read_metrics
from rto.seeds import shuffled

KINDS = ["sft", "dpo", "bradley_terry"]
WHOLE, ALONE = 1_000_000, 1  # micro_tokens: the batch in one pass, and a row a pass


def objective(world, kind: str, **options) -> Any:
    """A fresh objective: the same weights every time."""
    if kind == "sft":
        return SftObjective(world.shop.new_policy("sft"), world.pad)
    if kind == "dpo":
        return PairObjective(world.shop.new_policy("guide"), dpo, options, world.pad, world.shop.reference())
    return PairObjective(world.shop.new_scorer("scorer", None), bradley_terry, options, world.pad)


def rows_of(world, kind: str) -> list[Any]:
    return world.rows.answers if kind == "sft" else world.rows.pairs


def train(world, goal, rows, folder, **settings) -> list[dict[str, Any]]:
    """The logged metrics of one training."""
    training = Supervised.model_validate({"lr": 1e-3, "batch": 8, **settings})
    runtime = world.runtime
    fit("s", goal, rows, training, seed=0, runtime=runtime, log=RunLog(folder), progress=Progress(enabled=False))
    return read_metrics(folder)


def weights(goal) -> list[torch.Tensor]:
    return [p.detach().clone() for p in goal.role.parameters()]


def test_a_step_that_lacks_memory_holds_one_set_of_gradients(world, tmp_path, monkeypatch):
    """The second micro-batch does not fit, again and again: the gradients of the first are dropped each time."""
    found = []
    for rooms in (8, 1):  # rows that fit
        goal = objective(world, "dpo")
        taken: list[int] = []
        plain_loss, plain_step = goal.loss, Optimizer.step
        goal.loss = lambda rows, total, fits=rooms, loss=plain_loss: _fits(loss, rows, total, fits)

        def step(self, plain=plain_step, taken=taken):
            taken.append(self._gradients._used)
            return plain(self)

        with monkeypatch.context() as patch:
            patch.setattr(Optimizer, "step", step)
            train(world, goal, rows_of(world, "dpo"), tmp_path / str(rooms), micro_tokens=WHOLE, max_steps=2, eps=1e-4)
        found.append((taken, weights(goal)))
    (whole, after), (scarce, after_scarce) = found
    assert scarce == whole and whole[0] > 0
    for a, b in zip(after, after_scarce, strict=True):
        assert_close(a, b, atol=1e-5, rtol=0)


def _fits(loss, rows, total, most):
    """Some rows fit at first, and their gradients are there when memory ends."""
    if len(rows) > most and torch.is_grad_enabled():
        value, measured = loss(rows[:1], total)
        value.backward()
        raise torch.OutOfMemoryError("out of memory")
    return loss(rows, total)


# --- cutting and padding ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_of_eight_equals_eight_of_one(world, kind, tmp_path):
    rows = rows_of(world, kind)
    assert len({objective(world, kind).size(row) for row in rows[:8]}) > 1  # lengths differ, so one batch has padding

    whole, alone = objective(world, kind), objective(world, kind)
    loss, sums = gradients(whole, rows[:8], Budget(WHOLE, print), world.runtime, whole.role.backbone.network.zero_grad)
    loss_alone, sums_alone = gradients(
        alone, rows[:8], Budget(ALONE, print), world.runtime, alone.role.backbone.network.zero_grad
    )
    assert loss_alone == pytest.approx(loss, abs=1e-6)
    assert sums_alone == pytest.approx(sums, abs=1e-5)
    for a, b in zip(whole.role.parameters(), alone.role.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)

    whole, alone = objective(world, kind), objective(world, kind)
    # eps = 1e-4: without it Adam blows the rounding of gradients that are zero in truth up to whole steps.
    logged = train(world, whole, rows, tmp_path / "whole", micro_tokens=WHOLE, eps=1e-4)
    logged_alone = train(world, alone, rows, tmp_path / "alone", micro_tokens=ALONE, eps=1e-4)
    assert len(logged) == 3
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in logged_alone] == pytest.approx([row[key] for row in logged], abs=1e-5)
    assert len({row["loss"] for row in logged}) == 3
    for a, b in zip(weights(whole), weights(alone), strict=True):
        assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_adds_nothing(world, kind):
    goal = objective(world, kind)
    ordered = sorted(rows_of(world, kind), key=goal.size)
    short, long = ordered[0], ordered[-1]
    assert goal.size(short) < goal.size(long)
    with torch.no_grad():
        both = goal.loss([short, long], 2)[0]
        apart = goal.loss([short], 2)[0] + goal.loss([long], 2)[0]
        assert_close(both, apart)
        goal.pad = 7  # what stands in the padding is never read
        assert torch.equal(goal.loss([short, long], 2)[0], both)


def test_scores_keep_the_order_of_the_rows(world):
    goal, rows = objective(world, "bradley_terry"), world.rows.pairs[:7]
    chosen, rejected = goal.scores(rows, Budget(60, print))
    for i, row in enumerate(rows):
        alone = goal.scores([row], Budget(1, print))
        assert_close(torch.stack([chosen[i], rejected[i]]), torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_batch_is_a_mean_over_its_own_rows(world, kind, tmp_path):
    rows = rows_of(world, kind)[:10]
    settings = {"lr": 1e-12, "epochs": 1}  # so small that the weights stay: every loss is that of the start
    logged = train(world, objective(world, kind), rows, tmp_path, **settings)
    assert [row["epoch"] for row in logged] == [0.8, 1.0]
    goal, training = objective(world, kind), Supervised()
    first, last = (row["loss"] for row in logged)
    mean = evaluate(goal, rows, training, world.runtime)["loss"]
    if kind == "sft":
        tokens = sum(len(row.answer) for row in rows)
        late = sum(len(rows[i].answer) for i in shuffled(10, 0, "s", 0)[8:])
        assert ((tokens - late) * first + late * last) / tokens == pytest.approx(mean, abs=1e-5)
    else:
        assert (8 * first + 2 * last) / 10 == pytest.approx(mean, abs=1e-6)
        accuracy = evaluate(goal, rows, training, world.runtime)["accuracy"]
        assert (8 * logged[0]["accuracy"] + 2 * logged[1]["accuracy"]) / 10 == pytest.approx(accuracy)


# --- what the losses say at the start -----------------------------------------------------------------


def test_dpo_starts_at_log_2(world, tmp_path):
    first = train(world, objective(world, "dpo", beta=0.1), world.rows.pairs, tmp_path, max_steps=1)[0]
    assert first["loss"] == torch.tensor(math.log(2)).item()
    assert first["margin"] == first["chosen"] == first["rejected"] == 0.0
    assert first["accuracy"] == 0.5  # all are ties
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("kind", ["dpo", "bradley_terry"])
def test_training_learns_its_rows(world, kind, tmp_path):
    logged = train(world, objective(world, kind), world.rows.pairs[:8], tmp_path, lr=3e-2, epochs=30)
    assert logged[-1]["loss"] < 0.1
    assert logged[-1]["accuracy"] == 1.0
    assert logged[-1]["margin"] == pytest.approx(logged[-1]["chosen"] - logged[-1]["rejected"], abs=1e-4) != 0


# --- what is not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_before_the_step(world, kind, tmp_path):
    goal, rows = objective(world, kind), rows_of(world, kind)[:8]
    with torch.no_grad():
        next(iter(goal.role.parameters()))[0] = math.nan
        next(iter(goal.role.parameters()))[:] *= math.inf
    before = weights(goal)
    said = r"^the (log-prob|score) of the (policy|scorer) is nan \(data row \d+, (answer|chosen), token 0(, .*)?\)$"
    with pytest.raises(NotFinite, match=said):
        train(world, goal, rows, tmp_path)
    assert_close(weights(goal), before, equal_nan=True, rtol=0, atol=0)
    assert read_metrics(tmp_path) == []


def test_the_row_that_is_not_finite_is_named(world, tmp_path):
    rows = list(world.rows.pairs[:8])
    rows[5] = replace(rows[5], margin=math.nan)
    goal = objective(world, "bradley_terry", use_margin=True)
    before = weights(goal)
    with pytest.raises(NotFinite, match=rf"^the loss of the scorer is nan \(data row {rows[5].row}\)$"):
        train(world, goal, rows, tmp_path, micro_tokens=ALONE)
    assert_close(weights(goal), before, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_before_the_step(world, tmp_path):
    goal = objective(world, "bradley_terry")
    goal.function = lambda chosen, rejected, margin: (chosen - chosen).abs().sqrt()  # value 0, slope 0 * inf
    before = weights(goal)
    with pytest.raises(
        NotFinite,
        match=r"^the gradient norm of the scorer is nan \(data row \d+, 8 of 8 rows: the weights are suspect\)$",
    ):
        train(world, goal, world.rows.pairs[:8], tmp_path)
    assert_close(weights(goal), before, rtol=0, atol=0)


# --- the stream of rows -------------------------------------------------------------------------------


@dataclass
class Recorder:
    """An objective of one weight that writes down which rows every batch holds."""

    batches: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.only = nn.Parameter(torch.ones(1))
        self.role = SimpleNamespace(parameters=lambda: [self.only])

    def size(self, row: int) -> int:
        return 1

    def weight(self, row: int) -> int:
        return 1

    def loss(self, rows: list[int], total: float) -> tuple[torch.Tensor, dict[str, float]]:
        self.batches.append(sorted(rows))
        return (self.only * len(rows) / total).sum(), {}


def stream(world, folder, count: int = 10, **settings) -> list[list[int]]:
    goal = Recorder()
    logged = train(world, goal, list(range(count)), folder, batch=4, **settings)
    assert len(logged) == len(goal.batches)
    return goal.batches


def test_every_row_once_an_epoch(world, tmp_path):
    seen = [i for batch in stream(world, tmp_path, count=8, epochs=3) for i in batch]
    epochs = [seen[:8], seen[8:16], seen[16:]]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # each in an order of its own


def test_a_batch_may_cross_into_the_next_epoch(world, tmp_path):
    batches = stream(world, tmp_path, epochs=2)  # 10 rows in fours: the third batch has two of each epoch
    assert list(map(len, batches)) == [4, 4, 4, 4, 4]
    assert Counter(i for batch in batches for i in batch) == dict.fromkeys(range(10), 2)
    assert sorted(batches[0] + batches[1]) == sorted(set(batches[0] + batches[1]))


@pytest.mark.parametrize(("epochs", "sizes"), [(0.5, [4, 1]), (1, [4, 4, 2]), (2.5, [4] * 6 + [1]), (0.01, [1])])
def test_epochs_count_rows(world, tmp_path, epochs, sizes):
    batches = stream(world, tmp_path, epochs=epochs)
    assert list(map(len, batches)) == sizes
    counts = Counter(i for batch in batches for i in batch)
    assert set(counts.values()) <= {math.floor(epochs), math.ceil(epochs)}


def test_max_steps_cuts_the_same_stream(world, tmp_path):
    whole = stream(world, tmp_path / "whole", epochs=1)
    assert stream(world, tmp_path / "cut", epochs=1, max_steps=2) == whole[:2]
    assert stream(world, tmp_path / "more", epochs=1, max_steps=9) == whole


def test_the_stream_depends_on_the_seed_and_nothing_else(world, tmp_path):
    first = stream(world, tmp_path / "a", epochs=1)
    assert stream(world, tmp_path / "b", epochs=1, lr=1.0, schedule="constant") == first
    goal = Recorder()
    training = Supervised(batch=4)
    log = RunLog(tmp_path / "c")
    runtime = world.runtime
    fit("s", goal, range(10), training, seed=1, runtime=runtime, log=log, progress=Progress(enabled=False))
    assert goal.batches != first
