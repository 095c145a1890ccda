"""What moves while a stage trains, between memory and its checkpoints: a stage that was cut goes on to the bit.

All randomness is derived from the seed and from names (:mod:`rto.seeds`), so there is no generator to keep: weights,
optimisers and a few numbers are the whole state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rto.models.runtime import Runtime
from rto.models.store import Checkpoint, Store


@runtime_checkable
class Resumable(Protocol):
    """An optimiser with its whole state (:class:`rto.optim.Optimizer`)."""

    step_count: int

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

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name; the optimisers' moments too."""
        found = {f"{name}/{i}": w.detach() for name, part in self.weights.items() for i, w in enumerate(part)}
        for name, optimizer in self.optimizers.items():
            found |= {f"{name}/optimizer/{key}": value for key, value in optimizer.tensors().items()}
        return found

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError: the checkpoint is of other models."""
        for name, part in self.weights.items():
            for i, weight in enumerate(part):
                saved = checkpoint.tensors.get(f"{name}/{i}")
                if saved is None or saved.shape != weight.shape:
                    raise ValueError(f"checkpoint of step {checkpoint.step}: weight {i} of {name} is of another model")
                weight.copy_(saved)
        for name, optimizer in self.optimizers.items():
            lead = f"{name}/optimizer/"
            own = {key.removeprefix(lead): t for key, t in checkpoint.tensors.items() if key.startswith(lead)}
            optimizer.restore(own, checkpoint.state["optimizers"][name])
        self.set_numbers(checkpoint.state["numbers"])


class Saver:
    """Saves a stage every ``every`` steps and where ``wanted`` says that the run is to stop, and raises then.

    ``made_from`` goes into every checkpoint: what the stage is made from, to be compared when it goes on. ``found`` is
    the checkpoint that it goes on from.
    """

    def __init__(
        self,
        store: Store,
        every: int,
        runtime: Runtime,
        made_from: dict[str, Any],
        wanted: Callable[[], str | None],
        stop: Callable[[str], Exception],
        found: Checkpoint | None = None,
    ) -> None:
        self.store, self.every, self.runtime, self.made_from = store, every, runtime, made_from
        self.wanted, self.stop = wanted, stop
        self.found = found

    def after(self, step: int, last: int, moving: Moving) -> None:
        """To be called after every step. The last one is not saved: the stage's model is, next.

        Raises:
            Exception: what ``stop`` makes of the signal, once everything is saved.
        """
        wanted = self._agreed()
        if step < last and (wanted is not None or step % self.every == 0):
            self.save(step, moving)
        if wanted is not None and step < last:
            raise self.stop(wanted)

    def save(self, step: int, moving: Moving) -> None:
        if self.runtime.main:
            counted = {name: optimizer.step_count for name, optimizer in moving.optimizers.items()}
            state = {"numbers": moving.numbers(), "optimizers": counted, "made_from": self.made_from}
            self.store.save(step, moving.tensors(), state)
        self.runtime.wait()

    def _agreed(self) -> str | None:
        """A signal that any process got counts for all, at the same step."""
        said = [name for name in self.runtime.gather_all(self.wanted()) if name is not None]
        return said[0] if said else None
