"""What moves while a stage trains, between memory and its checkpoints: a stage that was cut goes on to the bit.

All randomness is derived from the seed and from names (:mod:`rto.seeds`), so there is no generator to keep: weights,
optimisers and a few numbers are the whole state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    good_step: int | None = None  # the last one that was
    rolled: int = 0
    best: float | None = None


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
    beside: Callable[[], None] = lambda: None  # called on every process before a checkpoint is made
    state: SaverState = field(init=False, default_factory=SaverState)
    first: int = field(init=False, default=0)  # of the loop: what was saved before it is of another one

    def begin(self, first: int, last: int, moving: Moving) -> None:
        """To be called before a loop over the steps after ``first``, to ``last``: it goes on from a checkpoint of one
        of them.

        Raises:
            ValueError: the checkpoint is of a step that the stage no longer has.
        """
        if self.found is not None and self.found.step > last:
            raise ValueError(
                f"{self.store.folder}: its checkpoint is of step {self.found.step}, the stage now ends with {last}: "
                "give it more steps, or delete that folder to begin it again"
            )
        self.first = first
        if self.found is not None and first <= self.found.step:
            moving.restore(self.found)
            self.state = SaverState(**self.found.state["saver"])
        elif self.nonfinite.then == "rollback":
            self._save(first, moving)  # there is something to go back to from the first step on
        self._slow_down(moving)

    def consider(self, step: int, moving: Moving, metrics: Mapping[str, float]) -> None:
        """To be called where ``metrics`` have been measured with the weights of ``step``: the best are kept.

        Raises:
            ValueError: the metric of ``best`` is not among them.
        """
        if self.best is None:
            return
        value, before, metric = metrics.get(self.best.metric), self.state.best, self.best.metric
        if value is None:
            raise ValueError(
                f"best.metric = {metric!r} is not measured in {self.stage}; these are: {', '.join(sorted(metrics))}"
            )
        if not math.isfinite(value):  # a user's oracle may say so; nothing would ever be better
            return
        if before is None or (value > before if self.best.goal == "max" else value < before):
            self.state.best = float(value)
            if self.runtime.main:
                self.writer.wait()
                copy = _copy(moving, [moving.trained])
                state = {"metric": metric, "value": float(value)}
                self._write(lambda: best_of(self.store).save(step, copy, state))

    def after(self, step: int, last: int, moving: Moving) -> None:
        """To be called after every step. The last one is not saved: the stage's model is, next. Neither is one that was
        left out, for the weights may be what is wrong.

        Raises:
            Exception: what ``stop`` makes of the signal, once everything is saved.
            OSError: the checkpoint before could not be written.
        """
        self.writer.check()
        good = self.state.bad_step != step
        if good:
            self.state.good_step = step
        wanted = self._agreed()
        if good and step < last and (wanted is not None or step % self.every == 0):
            self._save(step, moving)
        if wanted is not None and step < last:
            self.writer.wait()
            self.runtime.wait()
            raise self.stop(wanted)

    def finish(self, step: int, moving: Moving, probe: Callable[[], None]) -> bool:
        """To be called after the last step, which nothing has looked at: ``probe`` uses the trained role once more. The
        role then gets its best weights, where the recipe asks for them. False: everything was put back to a checkpoint.

        Raises:
            NotFinite: the model says no numbers.
            ValueError: the best weights are gone, or every step was left out.
        """
        if self.state.bad_step is not None and self.state.good_step is None:
            raise ValueError(f"{self.stage}: every step was left out, nothing was trained: see {self.incidents.folder}")
        try:
            probe()
        except NotFinite as error:
            return not self.met(step + 1, error, moving, may_skip=False)
        self.writer.wait()
        self.runtime.wait()
        if self.best is not None:
            found = self._read(best_of(self.store))
            if found is None:
                folder = self.store.folder
                raise ValueError(
                    f"{best_of(self.store).folder}: the best weights are gone: delete {folder} to begin again"
                )
            moving.restore_weights(found, [moving.trained])
            value, metric = found.state["value"], self.best.metric
            self.say(f"{self.stage}: the model is that of step {found.step}, the best by {metric} ({value:.4g})")
        return True

    def met(self, step: int, error: NotFinite, moving: Moving, may_skip: bool = True) -> bool:
        """A step was not finite. Returns whether everything was put back to a checkpoint; if not, the step is to be
        left out.

        Raises:
            NotFinite: the recipe says that this is one too many.
        """
        state, rule = self.state, self.nonfinite
        again = step == state.bad_step  # another optimiser step of the same iteration
        if not again:
            state.bad_run = state.bad_run + 1 if state.bad_step is not None and step == state.bad_step + 1 else 1
        state.bad_step = step
        token = self.incidents.place(error).get("token_text")
        said = f"{self.stage}, step {step}: {error}" + (f", the token {token!r}" if token is not None else "")
        if self.runtime.main and not again:
            said += f"; see {self.incidents.write(self.stage, step, error)}"
        if may_skip and state.bad_run <= rule.skip:
            if not again:
                self.say(f"{said}. The step is left out, {state.bad_run} in a row of {rule.skip} that may be")
            return False
        if rule.then == "rollback" and state.rolled < rule.rollbacks:
            state.rolled, state.bad_run, state.bad_step = state.rolled + 1, 0, None
            back = self._rewind(moving)
            self.say(f"{said}. Back to step {back}, with {rule.factor**state.rolled:g} of the learning rate")
            return True
        self.writer.wait()
        newest = max(self.store.steps(), default=None)
        if newest is not None and newest >= (state.good_step or 0):
            said += f". No good step came after the checkpoint of step {newest}: delete it if the same comes again"
        why = f"nonfinite.skip = {rule.skip} in a row" + (
            f" and nonfinite.rollbacks = {rule.rollbacks}" if rule.then == "rollback" else ""
        )
        raise error.told(f"{said}. Steps are left out up to {why}, and this is one more")

    def _save(self, step: int, moving: Moving) -> None:
        """Copies now, writes in the background: the loop waits for memory only, and for the write before."""
        self.beside()
        if not self.runtime.main:
            return
        counted = {name: optimizer.step_count for name, optimizer in moving.optimizers.items()}
        state = {"numbers": moving.numbers(), "optimizers": counted, "saver": asdict(self.state)}
        state["made_from"] = self.made_from
        self.writer.wait()  # before there is a second copy
        copy = _copy(moving, moving.weights) | _moments(moving)
        self._write(lambda: self.store.save(step, copy, state))

    def _write(self, work: Callable[[], None]) -> None:
        def write() -> None:
            self.log.sync()  # no checkpoint without the rows of its steps
            work()

        self.writer.start(write)

    def _rewind(self, moving: Moving) -> int:
        """To the newest checkpoint that a good step came after: an update may have spoilt the one that was saved right
        after it. Where this loop has no such, to its newest.

        Raises:
            ValueError: every checkpoint of this loop is damaged.
        """
        self.writer.wait()
        self.runtime.wait()
        if self.runtime.main:
            steps = self.store.steps()
            if any(self.first <= step < (self.state.good_step or 0) for step in steps):
                for step in steps:
                    if step >= (self.state.good_step or 0):
                        self.store.discard(step)
        found = self._read(self.store)
        assert found is not None  # begin saved one
        if found.step < self.first:
            raise ValueError(
                f"{self.store.folder}: no checkpoint from step {self.first} on, where this round began, is whole: give "
                f"the same command again, it goes on from step {found.step}"
            )
        moving.restore(found)
        self.state.good_step = found.step
        self._slow_down(moving)
        self.log.cut(self.stage, found.step)
        self._save(found.step, moving)  # with the smaller learning rate
        return found.step

    def _slow_down(self, moving: Moving) -> None:
        for optimizer in moving.optimizers.values():
            optimizer.scale = self.nonfinite.factor**self.state.rolled

    def _read(self, store: Store) -> Checkpoint | None:
        return read_by_all(store, self.runtime)

    def _agreed(self) -> str | None:
        """A signal that any process got counts for all, at the same step."""
        said = [name for name in self.runtime.gather_all(self.wanted()) if name is not None]
        return said[0] if said else None


def read_by_all(store: Store, runtime: Runtime) -> Checkpoint | None:
    """The newest good checkpoint on every process. The main one reads first and tidies; nobody writes before all have
    read."""
    found = store.load() if runtime.main else None
    runtime.wait()
    found = found if runtime.main else store.load(tidy=False)
    runtime.wait()
    return found


def _copy(moving: Moving, roles: Iterable[str]) -> dict[str, Tensor]:
    return {
        f"{name}/{i}": w.detach().to("cpu", copy=True) for name in roles for i, w in enumerate(moving.weights[name])
    }


def _moments(moving: Moving) -> dict[str, Tensor]:
    return {
        f"{name}/optimizer/{key}": value.to("cpu", copy=True)
        for name, optimizer in moving.optimizers.items()
        for key, value in optimizer.tensors().items()
    }


def best_of(store: Store) -> Store:
    """Where the best weights so far are kept beside the checkpoints. A dot is in no stage's name."""
    return Store(store.folder.with_name(f"{store.folder.name}.best"), 1, store.say)
