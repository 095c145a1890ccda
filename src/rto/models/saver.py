"""What moves while a stage trains, between memory and its checkpoints: a stage that was cut goes on to the bit.

All randomness is derived from the seed and from names (:mod:`rto.seeds`), so there is no generator to keep: weights,
optimisers and a few numbers are the whole state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rto.config import Best, NonFinite
from rto.finite import NotFinite
from rto.models.incidents import Incidents
from rto.models.runtime import Runtime
from rto.models.store import Checkpoint, Store
from rto.models.writer import Writer


@runtime_checkable
class Resumable(Protocol):
    """An optimiser with its whole state (:class:`rto.optim.Optimizer`)."""

    step_count: int
    scale: float  # of the learning rate

    def tensors(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: dict[str, Tensor], step_count: int) -> None: ...


@dataclass
class Moving:
    """Everything of a loop that changes: weights by role, optimisers by role, and numbers for JSON.

    ``numbers`` reads them and ``set_numbers`` writes them back.
    """

    weights: Mapping[str, Sequence[Tensor]]
    optimizers: Mapping[str, Resumable]
    numbers: Callable[[], dict[str, Any]] = dict
    set_numbers: Callable[[dict[str, Any]], None] = field(default=lambda numbers: None)

    @property
    def trained(self) -> str:
        """The role that the stage is about: the first."""
        return next(iter(self.weights))

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name; the optimisers' moments too."""
        found = {f"{name}/{i}": w.detach() for name, part in self.weights.items() for i, w in enumerate(part)}
        for name, optimizer in self.optimizers.items():
            found |= {f"{name}/optimizer/{key}": value for key, value in optimizer.tensors().items()}
        return found

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError: the checkpoint is of other models."""
        self.restore_weights(checkpoint, list(self.weights))
        for name, optimizer in self.optimizers.items():
            lead = f"{name}/optimizer/"
            own = {key.removeprefix(lead): t for key, t in checkpoint.tensors.items() if key.startswith(lead)}
            optimizer.restore(own, checkpoint.state["optimizers"][name])
        self.set_numbers(checkpoint.state["numbers"])

    @torch.no_grad()
    def restore_weights(self, checkpoint: Checkpoint, roles: Sequence[str]) -> None:
        """Raises as :meth:`restore`."""
        for name in roles:
            for i, weight in enumerate(self.weights[name]):
                saved = checkpoint.tensors.get(f"{name}/{i}")
                if saved is None or saved.shape != weight.shape:
                    raise ValueError(f"checkpoint of step {checkpoint.step}: weight {i} of {name} is of another model")
                weight.copy_(saved)


@dataclass
class SaverState:
    """What a saver itself remembers, in every checkpoint."""

    bad_step: int | None = None  # the last step that was not finite, and how many there were in a row
    bad_run: int = 0
    rolled: int = 0
    best_step: int | None = None
    best_value: float | None = None


@dataclass
class Saver:
    """Keeps one stage from being lost: saves it, ends it where a signal asks for it, and says what becomes of a step
    that is not finite. Every process has one; the main one writes.

    ``made_from`` goes into every checkpoint: what the stage is made from, to be compared when it goes on. ``found`` is
    the checkpoint that it goes on from, ``wanted`` tells of a signal and ``stop`` makes an exception of its name.
    """

    stage: str
    store: Store
    every: int
    runtime: Runtime
    log: Any
    say: Callable[[str], None]
    incidents: Incidents
    made_from: dict[str, Any] = field(default_factory=dict)
    wanted: Callable[[], str | None] = lambda: None
    stop: Callable[[str], Exception] = RuntimeError
    nonfinite: NonFinite = field(default_factory=NonFinite)
    best: Best | None = None
    found: Checkpoint | None = None
    writer: Writer = field(default_factory=Writer)
    state: SaverState = field(init=False, default_factory=SaverState)

    def begin(self, first: int, last: int, moving: Moving) -> None:
        """To be called before a loop over the steps after ``first``, to ``last``: it goes on from a checkpoint of one
        of them."""
        if self.found is not None and first <= self.found.step <= last:
            moving.restore(self.found)
            self.state = SaverState(**self.found.state["saver"])
            self._slow_down(moving)
        elif self.nonfinite.then == "rollback":
            self._save(first, moving)  # there is something to go back to from the first step on

    def after(self, step: int, last: int, moving: Moving, metrics: Mapping[str, float]) -> None:
        """To be called after every step. The last one is not saved: the stage's model is, next.

        Raises:
            Exception: what ``stop`` makes of the signal, once everything is saved.
            OSError: the checkpoint before could not be written.
            ValueError: the metric of ``best`` is not among the metrics.
        """
        self.writer.check()
        better = self._better(step, metrics)
        wanted = self._agreed()
        due = step < last and (wanted is not None or step % self.every == 0)
        if due or better:
            self._save(step, moving, due, better)
        if wanted is not None and step < last:
            self.writer.wait()
            self.runtime.wait()
            raise self.stop(wanted)

    def finish(self, moving: Moving) -> None:
        """To be called after the last step: the trained role gets its best weights, where the recipe asks for them."""
        self.writer.wait()
        self.runtime.wait()
        if self.best is not None and self.state.best_step is not None:
            found = self._read(best_of(self.store))
            moving.restore_weights(found, [moving.trained])
            value, metric = self.state.best_value, self.best.metric
            self.say(f"{self.stage}: the model is that of step {found.step}, the best by {metric} ({value:.4g})")

    def met(self, step: int, error: NotFinite, moving: Moving) -> bool:
        """A step was not finite. Returns whether everything was put back to the last checkpoint; if not, the step is
        to be left out.

        Raises:
            NotFinite: the recipe says that this is one too many.
        """
        state, rule = self.state, self.nonfinite
        if step != state.bad_step:
            state.bad_run = state.bad_run + 1 if state.bad_step is not None and step == state.bad_step + 1 else 1
        state.bad_step = step
        word = self.incidents.place(error).get("token_text")
        said = f"{self.stage}, step {step}: {error}" + (f", the word {word!r}" if word is not None else "")
        if self.runtime.main:
            said += f"; see {self.incidents.write(self.stage, step, error)}"
        if state.bad_run <= rule.skip:
            self.say(f"{said}. The step is left out, {state.bad_run} in a row of {rule.skip} that may be")
            return False
        if rule.then == "rollback" and state.rolled < rule.rollbacks:
            state.rolled, state.bad_run, state.bad_step = state.rolled + 1, 0, None
            back = self._rewind(moving)
            self.say(f"{said}. Back to step {back}, with {rule.factor**state.rolled:g} of the learning rate")
            return True
        why = f"nonfinite.skip = {rule.skip} in a row" + (
            f" and nonfinite.rollbacks = {rule.rollbacks}" if rule.then == "rollback" else ""
        )
        raise error.told(f"{said}. Steps are left out up to {why}, and this is one more")

    def _save(self, step: int, moving: Moving, due: bool = True, better: bool = False) -> None:
        """Copies now, writes in the background: the loop waits for memory only, and for the write before."""
        if not self.runtime.main:
            return
        self.writer.wait()
        copy = {name: t.detach().to("cpu", copy=True) for name, t in moving.tensors().items()}
        counted = {name: optimizer.step_count for name, optimizer in moving.optimizers.items()}
        state = {"numbers": moving.numbers(), "optimizers": counted, "saver": asdict(self.state)}
        state["made_from"] = self.made_from

        def write() -> None:
            self.log.sync()  # no checkpoint without the rows of its steps
            if better:
                lead = f"{moving.trained}/"
                own = {name: t for name, t in copy.items() if name.startswith(lead) and "/optimizer/" not in name}
                best_of(self.store).save(step, own, {})
            if due:
                self.store.save(step, copy, state)

        self.writer.start(write)

    def _rewind(self, moving: Moving) -> int:
        self.writer.wait()
        self.runtime.wait()
        found = self._read(self.store)
        moving.restore(found)
        self._slow_down(moving)
        self.log.cut(self.stage, found.step)
        self._save(found.step, moving)  # with the smaller learning rate
        return found.step

    def _slow_down(self, moving: Moving) -> None:
        for optimizer in moving.optimizers.values():
            optimizer.scale = self.nonfinite.factor**self.state.rolled

    def _read(self, store: Store) -> Checkpoint:
        """The main process first: it also tidies."""
        found = store.load() if self.runtime.main else None
        self.runtime.wait()
        found = found if self.runtime.main else store.load()
        assert found is not None
        return found

    def _better(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether this step is the best so far, by the metric of the recipe."""
        if self.best is None or "skipped" in metrics:
            return False
        metric = self.best.metric
        if metric not in metrics:
            if not metric.startswith("eval_") or any(name.startswith("eval_") for name in metrics):
                known = ", ".join(sorted(metrics))
                raise ValueError(f"best.metric = {metric!r} is no metric of {self.stage}; it has {known}")
            return False
        value, before = float(metrics[metric]), self.state.best_value
        if not math.isfinite(value):
            return False
        better = before is None or (value > before if self.best.goal == "max" else value < before)
        if better:
            self.state.best_step, self.state.best_value = step, value
        return better

    def _agreed(self) -> str | None:
        """A signal that any process got counts for all, at the same step."""
        said = [name for name in self.runtime.gather_all(self.wanted()) if name is not None]
        return said[0] if said else None


def best_of(store: Store) -> Store:
    """Where the best weights so far are kept beside the checkpoints. A dot is in no stage's name."""
    return Store(store.folder.with_name(f"{store.folder.name}.best"), 1, store.say)
