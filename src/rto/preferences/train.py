"""The one loop behind SFT, preference losses and reward models.

for step: rows of the global batch -> this process's share -> micro-batches -> loss, backward
          -> gradients summed over processes -> one optimiser step -> one row of metrics
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rto.config import Supervised
from rto.data.collate import micro_batches
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.saver import Moving, Saver
from rto.optim import Optimizer
from rto.preferences.cache import ReferenceCache
from rto.preferences.groups import GroupObjective
from rto.preferences.objectives import Objective, PairObjective, Prepared, SftObjective, Sums, reads
from rto.report.log import RunLog
from rto.seeds import shuffled

Row = TypeVar("Row")

__all__ = ["Objective", "PairObjective", "SftObjective", "evaluate", "fit", "gradients", "objective_for"]


def objective_for(
    role: Role,
    loss: Callable[..., Tensor],
    options: dict[str, Any],
    pad: int,
    reference: Role | None = None,
    cache: ReferenceCache | None = None,
) -> PairObjective | GroupObjective:
    """The objective of pairs, or of groups for a loss that reads ``there``. A reference that the loss does not read is
    not used. Raises as they do."""
    kind = GroupObjective if reads_groups(loss) else PairObjective
    return kind(role, loss, options, pad, reference, cache)


def reads_groups(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss is about scored answers (:class:`rto.data.chat.ScoredRow`) and not about pairs."""
    return "there" in reads(loss)


@dataclass
class LoopState:
    """Everything that moves while a stage trains."""

    optimizer: Optimizer
    step: int = 0
    rows_seen: int = 0


def fit(
    stage: str,
    objective: Objective[Row],
    rows: Sequence[Row],
    training: Supervised,
    *,
    seed: int,
    runtime: Runtime,
    log: RunLog,
    progress: Any,
    held_out: Sequence[Row] = (),
    before: int = 0,
    saver: Saver | None = None,
    beside: Moving | None = None,
) -> LoopState:
    """Train ``objective.role`` on ``rows``; metrics go to ``log``, their steps counted from ``before``.

    With a ``saver`` the stage goes on where a checkpoint of a step after ``before`` left it. ``beside`` is what a
    caller of several fits keeps in it too.

    The rows of every epoch are shuffled by (seed, kind of stage, epoch): "prefer/kto" sees the order of
    "prefer". The last batch may be smaller.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the step is not taken, and the data rows are named.
    """
    wanted = max(1, round(training.epochs * len(rows)))
    if training.max_steps:
        wanted = min(wanted, training.max_steps * training.batch)
    steps = math.ceil(wanted / training.batch)
    kind = stage.partition("/")[0]
    order = [i for epoch in range(math.ceil(wanted / len(rows))) for i in shuffled(len(rows), seed, kind, epoch)]
    order = order[:wanted]
    state = LoopState(Optimizer(objective.role.parameters(), training, training.lr, steps))
    moving = _moving(objective, state, beside)
    if saver is not None:
        found = saver.found
        if found is not None and before < found.step <= before + steps:
            moving.restore(found)
    budget = Budget(training.micro_tokens, progress.say, alone=runtime.world == 1)
    progress.start(stage, steps)
    while state.step < steps:
        begun = time.perf_counter()
        batch = [rows[i] for i in order[state.rows_seen : state.rows_seen + training.batch]]
        loss, sums = budget.within(partial(_gradients_of, objective, batch, runtime), state.optimizer.forget)
        try:
            norm, rate = state.optimizer.step()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, in a batch with data rows {[_row(r) for r in batch]}") from error
        state.step += 1
        state.rows_seen += len(batch)
        tokens = sum(map(objective.size, batch))
        values = {"loss": loss, **{key: value / len(batch) for key, value in sums.items()}}
        values |= {"lr": rate, "grad_norm": norm, "epoch": state.rows_seen / len(rows)}
        values["tokens_per_second"] = tokens / (time.perf_counter() - begun)
        if state.step == steps and held_out:
            values |= {f"eval_{key}": value for key, value in evaluate(objective, held_out, training, runtime).items()}
        if state.step % training.log_every == 0 or state.step == steps:
            log.metrics(stage, before + state.step, values)
            runtime.track({f"{stage}/{key}": value for key, value in values.items()}, before + state.step)
        progress.update(state.step, values)
        if saver is not None:
            saver.after(before + state.step, before + steps, moving)
    return state


def _moving(objective: Objective[Row], state: LoopState, beside: Moving | None) -> Moving:
    """What a checkpoint of a fit holds."""

    def numbers() -> dict[str, Any]:
        own = {"step": state.step, "rows_seen": state.rows_seen, "baseline": getattr(objective, "baseline", None)}
        return own | (beside.numbers() if beside else {})

    def set_numbers(saved: dict[str, Any]) -> None:
        state.step, state.rows_seen = saved["step"], saved["rows_seen"]
        if hasattr(objective, "baseline"):
            objective.baseline = saved["baseline"]

    weights = {"role": objective.role.parameters(), **(beside.weights if beside else {})}
    return Moving(weights, {"role": state.optimizer}, numbers, set_numbers)


def _gradients_of(objective: Objective[Row], batch: list[Row], runtime: Runtime, budget: int) -> tuple[float, Sums]:
    return gradients(objective, batch, budget, runtime)


def gradients(objective: Objective[Row], batch: list[Row], budget: int, runtime: Runtime) -> tuple[float, Sums]:
    """Leave the whole batch's gradient on the role's parameters. Returns its loss and the metrics' sums."""
    sums = _accumulate(objective, batch, budget, runtime, lambda loss: loss.backward())
    runtime.sum_gradients(objective.role.parameters())
    return sums.pop("loss"), sums


@torch.no_grad()
def evaluate(
    objective: Objective[Row], rows: Sequence[Row], training: Supervised, runtime: Runtime
) -> dict[str, float]:
    """Loss and mean metrics on rows that are not trained on."""
    sums = _accumulate(objective, list(rows), training.reading_tokens, runtime, lambda loss: None)
    return {key: value if key == "loss" else value / len(rows) for key, value in sums.items()}


def _accumulate(
    objective: Objective[Row], batch: list[Row], budget: int, runtime: Runtime, each: Callable[[Tensor], None]
) -> Sums:
    """Loss and metrics of the whole batch, summed over micro-batches and processes."""
    total = sum(map(objective.weight, batch))
    if isinstance(objective, Prepared):
        objective.prepare(batch, budget, runtime)
    mine = runtime.share(batch)
    sums: Sums = {}
    for index in micro_batches([objective.size(row) for row in mine], budget):
        rows = [mine[i] for i in index]
        loss, part = objective.loss(rows, total)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} in a micro-batch with data rows {[_row(r) for r in rows]}"
            )
        each(loss)
        for key, value in {"loss": loss.item(), **part}.items():
            sums[key] = sums.get(key, 0.0) + value
    return runtime.sum(sums)


def _row(row: Any) -> Any:
    return getattr(row, "row", "?")
