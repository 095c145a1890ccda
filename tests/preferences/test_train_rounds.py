"""Rounds of accelerated preference optimisation: a moving reference, and weights that go on in their direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.config import Lora, NonFinite, Rounds, Supervised
from rto.finite import Culprit, NotFinite
from rto.models.incidents import Incidents
from rto.models.role import Role
from rto.models.saver import Saver
from rto.models.store import Store
from rto.preferences import dpo
from rto.preferences.rounds import copy_weights, extrapolate, fit_rounds, snapshot
from rto.preferences.train import PairObjective, fit
from rto.report.log import Progress, RunLog, read_metrics

TRAINING = Supervised(lr=1e-2, batch=4, eps=1e-4)


def weights(role: Role) -> list[Tensor]:
    return [p.detach().clone() for p in role.parameters()]


def open_roles(world, lora: bool) -> tuple[Role, Role, Callable[[], Role]]:
    """Policy, reference, and what opens the role that follows the policy."""
    shop = world.shop_of(lora=Lora(r=4, alpha=8)) if lora else world.shop
    role, reference = shop.new_policy("guide"), shop.reference()
    return role, reference, (lambda: shop.new_policy("previous")) if lora else (lambda: reference)


def train(world, folder, rounds: Rounds, lora: bool = False, rows: Any = None) -> tuple[Role, list[Role], list[Any]]:
    """The policy, each round's reference and the logged metrics."""
    role, reference, follower = open_roles(world, lora)
    references: list[Role] = []

    def objective(reference: Role) -> PairObjective:
        references.append(reference)
        return PairObjective(role, dpo, {}, world.pad, reference)

    rows = world.rows.pairs[:20] if rows is None else rows
    settings = {"seed": 0, "runtime": world.runtime, "log": RunLog(folder), "progress": Progress(enabled=False)}
    steps = fit_rounds("s", role, reference, follower, objective, rows, TRAINING, rounds, **settings)
    logged = read_metrics(folder)
    assert steps == logged[-1]["step"]
    return role, references, logged


def test_extrapolation_by_hand(world):
    """From 2 to 3 and on to 3.5; what did not move stays."""
    role = world.shop.new_policy("guide")
    first, *others = role.parameters()
    with torch.no_grad():
        first.fill_(2.0)
        before = snapshot(role)
        first.fill_(3.0)
    extrapolate(role, before, 0.5)
    assert (first == 3.5).all() and first.requires_grad
    assert (before[0] == 2.0).all()
    for p, same in zip(others, before[1:], strict=True):
        assert torch.equal(p, same)


@pytest.mark.parametrize("lora", [False, True])
def test_one_round_is_plain_training(world, tmp_path, lora):
    role, _, logged = train(world, tmp_path / "rounds", Rounds(count=1), lora)
    plain, reference, _ = open_roles(world, lora)
    goal = PairObjective(plain, dpo, {}, world.pad, reference)
    log, progress = RunLog(tmp_path / "plain"), Progress(enabled=False)
    fit("s", goal, world.rows.pairs[:20], TRAINING, seed=0, runtime=world.runtime, log=log, progress=progress)
    for a, b in zip(role.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(logged) == 5


@pytest.mark.parametrize("amount", [0.0, 0.5])
@pytest.mark.parametrize("lora", [False, True])
def test_each_round_starts_at_its_reference(world, tmp_path, lora, amount):
    _, references, logged = train(world, tmp_path, Rounds(count=3, extrapolation=amount), lora)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]  # 6 and 7 rows are two steps of at most four
    for first in logged[::2]:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["accuracy"] == 0.5
    assert all(row["loss"] != pytest.approx(math.log(2), abs=1e-5) for row in logged[1::2])
    assert len(references) == 3 and references[1] is references[2]
    if lora:
        assert references[0].adapter is None and references[1].adapter == "previous"
        assert not any(p.requires_grad for p in references[1].parameters())


def test_momentum_by_hand(world, tmp_path):
    """w1 = h1 + a (h1 - w0); h2 from w1; w2 = h2 + a (h2 - h1)."""
    role, _, _ = train(world, tmp_path / "rounds", Rounds(count=2, extrapolation=0.5))
    mine, reference, _ = open_roles(world, lora=False)
    start = weights(mine)
    reached = []
    for number, rows in enumerate((world.rows.pairs[:10], world.rows.pairs[10:20])):
        goal = PairObjective(mine, dpo, {}, world.pad, reference)
        log, progress = RunLog(tmp_path / str(number)), Progress(enabled=False)
        fit("s", goal, rows, TRAINING, seed=0, runtime=world.runtime, log=log, progress=progress)
        reached.append(weights(mine))
        before = reached[-2] if number else start
        with torch.no_grad():
            for p, now, then in zip(mine.parameters(), reached[-1], before, strict=True):
                p.copy_(1.5 * now - 0.5 * then)
            for p, copy in zip(mine.parameters(), reference.parameters(), strict=True):
                copy.copy_(p)
    for a, b in zip(role.parameters(), mine.parameters(), strict=True):
        assert_close(a, b, atol=2e-5, rtol=0)
    assert not torch.equal(reached[1][0], next(iter(role.parameters())))


@pytest.mark.parametrize("broken", [1, 2])
def test_a_round_whose_first_step_fails_begins_again(world, tmp_path, broken):
    """nonfinite.then = "rollback": back to where the round began, not into the one before."""
    role, reference, follower = open_roles(world, lora=False)
    read: list[list[int]] = []

    class Failing(PairObjective):
        failed = False

        def loss(self, rows, total):
            if len(read) == broken + 1 and not Failing.failed:
                Failing.failed = True
                raise NotFinite(Culprit("policy", "loss", "nan", 0))
            read[-1].append(len(rows))
            return super().loss(rows, total)

    def objective(reference: Role) -> PairObjective:
        read.append([])
        return Failing(role, dpo, {}, world.pad, reference)

    log = RunLog(tmp_path)
    settings = {"seed": 0, "runtime": world.runtime, "log": log, "progress": Progress(enabled=False)}
    incidents, rule = Incidents(tmp_path / "incidents", str), NonFinite(skip=0, then="rollback")
    store = Store(tmp_path / "checkpoints")
    settings["saver"] = saver = Saver("s", store, 1, world.runtime, log, print, incidents, nonfinite=rule)
    rows = world.rows.pairs[:24]
    assert fit_rounds("s", role, reference, follower, objective, rows, TRAINING, Rounds(count=3), **settings) == 6
    saver.writer.wait()
    assert Failing.failed and [sum(part) for part in read] == [8 + 1] * 3  # each row once, and the last probe
    logged = read_metrics(tmp_path)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[2 * broken]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_every_row_is_in_one_round(world, tmp_path):
    """Consecutive parts, as equal as can be."""
    role, reference, follower = open_roles(world, lora=False)
    parts: list[list[int]] = []

    class Listening(PairObjective):
        def loss(self, rows, total):
            parts[-1] += [row.row for row in rows]
            return super().loss(rows, total)

    def objective(reference: Role) -> PairObjective:
        parts.append([])
        return Listening(role, dpo, {}, world.pad, reference)

    rows = world.rows.pairs[:11]
    settings = {"seed": 0, "runtime": world.runtime, "log": RunLog(tmp_path), "progress": Progress(enabled=False)}
    fit_rounds("s", role, reference, follower, objective, rows, TRAINING, Rounds(count=3), **settings)
    numbers = [row.row for row in rows]
    assert [sorted(part) for part in parts] == [numbers[:3], numbers[3:7], numbers[7:]]


def test_copied_weights_are_a_copy(world, nudged):
    role, _, follower = open_roles(world, lora=True)
    nudged(role)
    into = follower()
    copy_weights(role, into)
    for a, b in zip(role.parameters(), into.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b and a.requires_grad and not b.requires_grad


def test_more_rounds_than_rows_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="prefer.rounds.count = 3, but there are 2 rows"):
        train(world, tmp_path, Rounds(count=3), rows=world.rows.pairs[:2])
