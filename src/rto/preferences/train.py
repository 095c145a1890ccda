"""The one loop behind SFT, preference losses and reward models.

for step: rows of the global batch -> this process's share -> micro-batches -> loss, backward
          -> gradients summed over processes -> one optimiser step -> one row of metrics
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from rto.batch import Completions, Pairs
from rto.config import Supervised
from rto.data.chat import AnswerRow, PairRow
from rto.data.collate import collate_completions, collate_pairs, micro_batches
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.numerics import masked_sum, reduce
from rto.optim import Optimizer
from rto.preferences.sft import sft
from rto.report.log import RunLog
from rto.seeds import shuffled

Row = TypeVar("Row")
Sums = dict[str, float]

# What a loss may name as a positional parameter; all [B].
READABLE = {
    "chosen": "summed log-prob of the chosen answer",
    "rejected": "summed log-prob of the rejected answer",
    "chosen_reference": "the same under the reference",
    "rejected_reference": "the same under the reference",
    "chosen_score": "the scorer at the chosen answer's last token",
    "rejected_score": "the scorer at the rejected answer's last token",
    "margin": "how much better the chosen answer is, where the data say so, else 0",
}


@runtime_checkable
class Objective(Protocol[Row]):
    """What a stage minimises."""

    role: Role

    def size(self, row: Row) -> int:
        """Tokens that the row adds to a forward pass."""

    def weight(self, row: Row) -> int:
        """What the row adds to the denominator of the loss: tokens or rows."""

    def loss(self, rows: list[Row], total: float) -> tuple[Tensor, Sums]:
        """The rows' share of the loss, and sums over rows of what is worth logging."""


@dataclass
class SftObjective:
    """Token mean of -log pi over demonstrations."""

    role: Role
    pad: int

    def size(self, row: AnswerRow) -> int:
        return len(row.prompt) + len(row.answer)

    def weight(self, row: AnswerRow) -> int:
        return len(row.answer)

    def loss(self, rows: list[AnswerRow], total: float) -> tuple[Tensor, Sums]:
        batch = collate_completions(
            [r.prompt for r in rows], [r.answer for r in rows], [r.finished for r in rows], self.pad
        ).to(self.role.backbone.device)
        logprobs, _ = self.role.logprobs(batch)
        return reduce(sft(logprobs), batch.mask, "token", total), {}


class PairObjective:
    """A pairwise loss: of a policy against its reference, or of a scorer.

    The loss's positional parameters say what is computed for it; see ``READABLE``.
    """

    def __init__(
        self, role: Role, loss: Callable[..., Tensor], options: dict[str, Any], pad: int, reference: Role | None = None
    ) -> None:
        self.role, self.reference, self.pad = role, reference, pad
        self.function, self.options = loss, options
        kinds = inspect.signature(loss).parameters.values()
        self.wanted = [p.name for p in kinds if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert set(self.wanted) <= set(READABLE), f"{loss.__name__} reads what no pair has: {self.wanted}"

    def size(self, row: PairRow) -> int:
        return 2 * (len(row.prompt) + max(len(row.chosen), len(row.rejected)))

    def weight(self, row: PairRow) -> int:
        return 1

    def loss(self, rows: list[PairRow], total: float) -> tuple[Tensor, Sums]:
        pairs = collate_pairs(rows, self.pad).to(self.role.backbone.device)
        read = self._read(pairs)
        losses = self.function(*(read[name] for name in self.wanted), **self.options)
        return losses.sum() / total, self._sums(read)

    @torch.no_grad()
    def scores(self, rows: Sequence[PairRow], budget: int) -> tuple[Tensor, Tensor]:
        """The scorer's scores of all chosen and of all rejected answers, each [N], in the order of the rows."""
        chosen, rejected = torch.zeros(len(rows)), torch.zeros(len(rows))
        for index in micro_batches([self.size(row) for row in rows], budget):
            read = self._read(collate_pairs([rows[i] for i in index], self.pad).to(self.role.backbone.device))
            chosen[index], rejected[index] = read["chosen_score"].float().cpu(), read["rejected_score"].float().cpu()
        return chosen, rejected

    def _read(self, pairs: Pairs) -> dict[str, Tensor]:
        both = _both(pairs)
        read = {"margin": pairs.margin}
        if self.role.head is not None:
            read["chosen_score"], read["rejected_score"] = self.role.scores(both).chunk(2)
            return read
        if self.reference is not None:  # first, while no activations of the policy are held
            with torch.no_grad():
                frozen = masked_sum(self.reference.logprobs(both)[0], both.mask)
            read["chosen_reference"], read["rejected_reference"] = frozen.chunk(2)
        read["chosen"], read["rejected"] = masked_sum(self.role.logprobs(both)[0], both.mask).chunk(2)
        return read

    def _sums(self, read: dict[str, Tensor]) -> Sums:
        if self.role.head is not None:
            better, worse = read["chosen_score"], read["rejected_score"]
        else:
            beta = self.options.get("beta", 1.0)
            better = beta * (read["chosen"] - read.get("chosen_reference", 0.0))
            worse = beta * (read["rejected"] - read.get("rejected_reference", 0.0))
        return {
            "accuracy": (better > worse).sum().item() + 0.5 * (better == worse).sum().item(),  # a tie is a coin toss
            "margin": (better - worse).sum().item(),
            "chosen": better.sum().item(),
            "rejected": worse.sum().item(),
        }


def _both(pairs: Pairs) -> Completions:
    """Chosen above rejected, as one batch of 2B rows."""
    above, below = pairs.chosen, pairs.rejected

    def stack(read: Callable[[Completions], Tensor]) -> Tensor:
        return torch.cat([read(above), read(below)])

    prompt = type(above.prompt)(stack(lambda c: c.prompt.ids), stack(lambda c: c.prompt.mask))
    return Completions(prompt, stack(lambda c: c.ids), stack(lambda c: c.mask), stack(lambda c: c.finished))


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
) -> LoopState:
    """Train ``objective.role`` on ``rows``; metrics go to ``log``.

    The rows of every epoch are shuffled by (seed, stage, epoch). The last batch may be smaller.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the step is not taken, and the data rows are named.
    """
    wanted = max(1, round(training.epochs * len(rows)))
    if training.max_steps:
        wanted = min(wanted, training.max_steps * training.batch)
    steps = math.ceil(wanted / training.batch)
    order = [i for epoch in range(math.ceil(wanted / len(rows))) for i in shuffled(len(rows), seed, stage, epoch)]
    order = order[:wanted]
    state = LoopState(Optimizer(objective.role.parameters(), training, training.lr, steps))
    progress.start(stage, steps)
    while state.step < steps:
        begun = time.perf_counter()
        batch = [rows[i] for i in order[state.rows_seen : state.rows_seen + training.batch]]
        loss, sums = gradients(objective, batch, training.micro_tokens, runtime)
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
            log.metrics(stage, state.step, values)
            runtime.track({f"{stage}/{key}": value for key, value in values.items()}, state.step)
        progress.update(state.step, values)
    return state


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
