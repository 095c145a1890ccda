"""Accelerated preference optimisation, APO (He, Yuan, Gu 2024): rounds with a moving reference and momentum.

From memory of the paper, not checked against its text. Not anchored preference optimisation, which has the same
initials. Round t trains a policy from pi_t, with pi_t as the reference, to pi^_{t+1}, and then goes on in the same
direction: pi_{t+1} ~ pi^_{t+1} (pi^_{t+1} / pi^_t)^a. For policies whose logits are linear in their weights this is
w_{t+1} = w^_{t+1} + a (w^_{t+1} - w^_t), which is what is done here. The paper samples new pairs from pi_t in every
round; here each round has its own part of the pairs that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rto.config import Rounds, Supervised
from rto.models.role import Role
from rto.models.saver import Moving, Saver
from rto.models.store import Checkpoint
from rto.preferences.objectives import Objective
from rto.preferences.train import fit

Row = TypeVar("Row")


def fit_rounds(
    stage: str,
    role: Role,
    reference: Role,
    follower: Callable[[], Role],
    objective: Callable[[Role], Objective[Row]],
    rows: Sequence[Row],
    training: Supervised,
    rounds: Rounds,
    saver: Saver | None = None,
    **settings: Any,
) -> int:
    """:func:`fit` once a round, on consecutive equal parts of ``rows``. Returns the steps of all rounds.

    ``reference`` is that of the first round. ``follower`` opens the role that the policy's weights are copied into, to
    be the reference of every later round: a further adapter on the policy's backbone, or in full training a model of
    the same architecture, which may be ``reference`` itself. ``objective`` makes a round's objective from its
    reference. ``settings`` are the rest of fit's. ``epochs``, ``max_steps`` and the schedule count within a round.

    Raises:
        ValueError: there are fewer rows than rounds.
    """
    if len(rows) < rounds.count:
        raise ValueError(f"prefer.rounds.count = {rounds.count}, but there are {len(rows)} rows: lower it")
    steps, first = 0, 0
    trained = snapshot(role) if rounds.extrapolation else []
    found = saver.found if saver is not None else None
    if found is not None:
        first, steps = found.state["numbers"]["round"], found.state["numbers"]["before"]
    for number in range(first, rounds.count):
        if number and number in (1, first):
            reference = follower()
        if number and number > first:
            copy_weights(role, reference)
        beside = _beside(number, steps, reference if number else None, trained)
        if number == first and found is not None:
            _restore(found, beside)
        part = rows[number * len(rows) // rounds.count : (number + 1) * len(rows) // rounds.count]
        made = objective(reference)
        steps += fit(stage, made, part, training, before=steps, saver=saver, beside=beside, **settings).step
        if rounds.extrapolation:
            reached = snapshot(role)
            extrapolate(role, trained, rounds.extrapolation)
            trained = reached
    return steps


def _beside(number: int, before: int, reference: Role | None, trained: list[Tensor]) -> Moving:
    """What a round keeps beside the policy in a checkpoint: where it began, its reference, the weights before it."""
    weights: dict[str, list[Tensor]] = {"trained": trained}
    if reference is not None:
        weights["reference"] = list(reference.parameters())
    return Moving(weights, {}, lambda: {"round": number, "before": before})


@torch.no_grad()
def _restore(found: Checkpoint, beside: Moving) -> None:
    for name, part in beside.weights.items():
        for i, weight in enumerate(part):
            weight.copy_(found.tensors[f"{name}/{i}"])


def snapshot(role: Role) -> list[Tensor]:
    """A copy of the weights that training changes."""
    return [p.detach().clone() for p in role.parameters()]


@torch.no_grad()
def extrapolate(role: Role, previous: list[Tensor], amount: float) -> None:
    """Weights w become w + amount * (w - previous).

    With LoRA the weights are the factors A and B. What acts is their product, which is not linear in them, so there
    the step is approximate: it holds to first order in the factors' change.
    """
    for p, before in zip(role.parameters(), previous, strict=True):
        p.add_(p - before, alpha=amount)


@torch.no_grad()
def copy_weights(role: Role, into: Role) -> None:
    """Give ``into``, which stays as frozen as it is, the weights that training has given ``role``."""
    for p, copy in zip(role.parameters(), into.parameters(), strict=True):
        copy.copy_(p)
