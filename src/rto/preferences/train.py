"""The one loop behind SFT, preference losses and reward models.

for step: rows of the global batch -> this process's share -> micro-batches -> loss, backward
          -> gradients summed over processes -> one optimiser step -> one row of metrics
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rto.config import Supervised
from rto.data.collate import micro_batches
from rto.finite import NotFinite
from rto.late import late_gradients
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime, release_memory
from rto.models.saver import Moving, Saver
from rto.optim import Optimizer
from rto.preferences.cache import ReferenceCache
from rto.preferences.groups import GroupObjective
from rto.preferences.objectives import Compared, Objective, PairObjective, SftObjective, Sums, reads
from rto.report.log import RunLog
from rto.seeds import shuffled

Row = TypeVar("Row")

logger = logging.getLogger(__name__)

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
    eval_every: int | None = None,
    before: int = 0,
    saver: Saver | None = None,
    beside: Moving | None = None,
) -> LoopState:
    """Train ``objective.role`` on ``rows``; metrics go to ``log``, their steps counted from ``before``.

    With a ``saver`` the stage goes on where a checkpoint of a step after ``before`` left it. ``beside`` is what a
    caller of several fits keeps in it too.

    The rows of every epoch are shuffled by (seed, kind of stage, epoch): "prefer/kto" sees the order of
    "prefer". The last batch may be smaller.

    A step whose loss or gradient is not finite is not taken; the saver decides how it goes on. ``held_out`` rows are
    evaluated after the last step, and every ``eval_every`` steps.

    Raises:
        NotFinite: without a saver, or where the saver gives up; it names role, data row and token.
        ValueError: the best step is wanted and there are no rows to tell by.
    """
    if saver is not None and saver.best is not None and not held_out:
        raise ValueError(f"{stage}: best needs held-out rows, and there are none: raise data.test")
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
        saver.begin(before, before + steps, moving)
    budget = Budget(training.micro_tokens, progress.say, runtime.gather_all)
    progress.start(stage, before + steps, before + state.step)

    def probe() -> None:
        state.optimizer.probe(_trained(objective), lambda: _backward_alone(objective, rows[order[0]]))

    while state.step < steps or not (saver is None or saver.finish(before + steps, moving, probe)):
        begun = time.perf_counter()
        batch = [rows[i] for i in order[state.rows_seen : state.rows_seen + training.batch]]
        try:
            loss, sums = gradients(objective, batch, budget, runtime, state.optimizer.forget)
            norm, rate = _step(state.optimizer, objective, batch, runtime)
        except NotFinite as error:
            state.optimizer.forget()
            if saver is None:
                raise
            if saver.met(before + state.step + 1, error, moving):
                continue  # from the last checkpoint
            values = {"skipped": 1.0}
        else:
            values = {"loss": loss, **{key: value / len(batch) for key, value in sums.items()}}
            values |= {"lr": rate, "grad_norm": norm}
        state.step += 1
        state.rows_seen += len(batch)
        values["epoch"] = state.rows_seen / len(rows)
        values["tokens_per_second"] = sum(map(objective.size, batch)) / (time.perf_counter() - begun)
        measured = state.step == steps or (eval_every is not None and state.step % eval_every == 0)
        if measured and held_out:
            release_memory()  # what lies ready for training is of no use to it
            try:
                found = evaluate(objective, held_out, training, runtime)
            except NotFinite as error:
                if saver is None:
                    raise
                saver.met(before + state.step, error, moving, may_skip=False)
                continue  # from the last checkpoint
            values |= {f"eval_{key}": value for key, value in found.items()}
            if saver is not None:
                saver.consider(before + state.step, moving, values)
        if state.step % training.log_every == 0 or measured or "skipped" in values:
            log.metrics(stage, before + state.step, values)
            runtime.track(stage, before + state.step, values)
        progress.update(before + state.step, values)
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


def _step(optimizer: Optimizer, objective: Objective[Row], batch: list[Row], runtime: Runtime) -> tuple[float, float]:
    """One optimiser step. Raises NotFinite that names the row whose gradient is not, where one alone is to blame."""

    def backward(i: int) -> None:
        _backward_alone(objective, batch[i])

    try:
        return optimizer.step()
    except NotFinite as error:
        role = _trained(objective)
        mine = runtime.share(list(range(len(batch))))
        raise optimizer.blame(role, error, mine, backward, runtime.gather_all).among(batch, range(len(batch))) from None


def _backward_alone(objective: Objective[Row], row: Row) -> None:
    """Leave the gradient of one row, as far as this process goes."""
    if isinstance(objective, Compared):
        objective.read_ahead([row], 1)
    objective.loss([row], 1.0)[0].backward()
    if isinstance(objective, Compared):
        objective.done()


def _trained(objective: Objective[Row]) -> str:
    return "policy" if objective.role.head is None else "scorer"


def gradients(
    objective: Objective[Row], batch: list[Row], budget: Budget, runtime: Runtime, forget: Callable[[], None]
) -> tuple[float, Sums]:
    """Leave the whole batch's gradient on the role's parameters. Returns its loss and the metrics' sums.

    ``forget`` drops a part of it (:meth:`~rto.optim.Optimizer.forget`), where memory was short for the next.
    """
    sums = _accumulate(objective, batch, budget, runtime, lambda loss: loss.backward(), forget)
    runtime.sum_gradients(objective.role.parameters())
    return sums.pop("loss"), sums


@torch.no_grad()
def evaluate(
    objective: Objective[Row], rows: Sequence[Row], training: Supervised, runtime: Runtime
) -> dict[str, float]:
    """Loss and mean metrics on rows that are not trained on."""
    budget = Budget(training.reading_tokens, logger.warning, runtime.gather_all, "reading")
    baseline = getattr(objective, "baseline", None)
    sums = _accumulate(objective, list(rows), budget, runtime, lambda loss: None)
    if baseline is not None:  # that of the training batch, which a last batch of one row keeps
        objective.baseline = baseline  # type: ignore[attr-defined]
    return {key: value if key == "loss" else value / len(rows) for key, value in sums.items()}


def _accumulate(
    objective: Objective[Row],
    batch: list[Row],
    budget: Budget,
    runtime: Runtime,
    each: Callable[[Tensor], None],
    undo: Callable[[], None] = lambda: None,
) -> Sums:
    """Loss and metrics of the whole batch, summed over micro-batches and processes."""
    total = sum(map(objective.weight, batch))
    if isinstance(objective, Compared):
        objective.prepare(batch, budget, runtime)
    mine = runtime.share(batch)

    def work(tokens: int) -> Sums:
        sums: Sums = {}
        with late_gradients():
            for index in micro_batches([objective.size(row) for row in mine], tokens):
                try:
                    loss, part = objective.loss([mine[i] for i in index], total)
                except NotFinite as error:
                    raise error.among(mine, index) from None
                each(loss)
                for key, value in {"loss": loss.item(), **part}.items():
                    sums[key] = sums.get(key, 0.0) + value
        return sums

    sums = budget.within(work, undo)
    if isinstance(objective, Compared):
        objective.done()
        if objective.cache is not None:
            objective.cache.share(runtime)  # the next epoch deals the rows to other processes
    return runtime.sum(sums)
