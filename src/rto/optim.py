"""One optimiser step, the same for every stage: schedule, clipping, and the whole of an optimiser's state."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rto.config import Training
from rto.finite import Culprit, NotFinite
from rto.room import CHUNK, Room


def learning_rate_factor(step: int, steps: int, warmup: float, floor: float, schedule: str) -> float:
    """Share of the learning rate at ``step`` (from 0) of ``steps``: linear warmup, then down to ``floor``."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    if schedule == "constant":
        return 1.0
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return floor + (1 - floor) * fall


class Optimizer:
    """Adam or AdamW with a schedule over ``steps`` steps and clipping by the global norm."""

    def __init__(self, parameters: Iterable[nn.Parameter], training: Training, lr: float, steps: int) -> None:
        self.parameters = [p for p in parameters]
        for p in self.parameters:
            p.requires_grad_(True)
        make = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
        self.inner = make(
            self.parameters,
            lr=lr,
            betas=training.betas,
            eps=training.eps,
            weight_decay=training.weight_decay,
            fused=True,  # one pass over the weights, and nothing of their size beside them
        )
        self.training, self.lr, self.steps, self.step_count = training, lr, steps, 0
        self.scale = 1.0  # of the learning rate, lowered after a rollback
        self._gradients = Room()
        _settle(self.parameters, self._gradients)

    def step(self) -> tuple[float, float]:
        """Apply the gradients that were summed up. Returns the gradient norm before clipping and the rate used.

        Raises:
            NotFinite: the norm is not; nothing was applied.
        """
        t = self.training
        rate = self.scale * self.lr * learning_rate_factor(self.step_count, self.steps, t.warmup, t.floor, t.schedule)
        for group in self.inner.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.parameters, t.max_norm, foreach=True)
        if not torch.isfinite(norm):
            raise NotFinite(Culprit("batch", "gradient norm", str(norm.item())))
        self.inner.step()
        self.forget()
        self.step_count += 1
        return norm.item(), rate

    def blame(
        self,
        role: str,
        error: NotFinite,
        rows: Sequence[int],
        backward: Callable[[int], None],
        gather: Callable[[Any], list[Any]],
    ) -> NotFinite:
        """``error`` of :meth:`step` with the first row whose gradient alone is not finite; without one where it is the
        sum that overflows. ``backward`` leaves the gradient of one row; ``rows`` are this process's."""
        mine = [row for row in rows if self._breaks(backward, row)]
        self.forget()
        heard = gather((mine, len(rows)))
        guilty = sorted(row for part, _ in heard for row in part)
        count = sum(tried for _, tried in heard)
        first = guilty[0] if guilty else None
        return NotFinite(replace(error.culprit, role=role, row=first, bad=len(guilty), rows=count))

    def _breaks(self, backward: Callable[[int], None], row: int) -> bool:
        self.forget()
        try:
            backward(row)
        except NotFinite:
            return True
        except (RuntimeError, MemoryError):  # not known; the others wait to hear of it
            return False
        return not all(p.grad is None or p.grad.isfinite().all() for p in self.parameters)

    def probe(self, role: str, backward: Callable[[], None]) -> None:
        """Raises NotFinite where ``backward``, on a row that once was good, leaves a gradient that is not."""
        self.forget()
        try:
            backward()
            if not all(p.grad is None or p.grad.isfinite().all() for p in self.parameters):
                raise NotFinite(Culprit(role, "gradient after the last step", "nan or inf"))
        finally:
            self.forget()

    def forget(self) -> None:
        """Drop the gradients that were summed up so far."""
        self.inner.zero_grad(set_to_none=True)
        self._gradients.end()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The moments of every weight that has been stepped, by "number/name"."""
        states = ((i, self.inner.state[p]) for i, p in enumerate(self.parameters) if p in self.inner.state)
        return {f"{i}/{key}": value for i, state in states for key, value in state.items()}

    def restore(self, tensors: dict[str, torch.Tensor], step_count: int) -> None:
        """Undo everything since :meth:`tensors` and ``step_count`` were taken."""
        self.inner.state.clear()
        for name, saved in tensors.items():
            number, _, key = name.partition("/")
            p = self.parameters[int(number)]
            self.inner.state[p][key] = saved.clone().to(p.device)
        self.step_count = step_count


def _settle(parameters: Sequence[nn.Parameter], room: Room) -> None:
    """Let gradients on a CPU lie in ``room`` from the moment they are made, and while it is there. Not those that are
    larger than its chunks, nor those of embeddings and output layers that are added in place."""
    known = weakref.ref(room)

    def move(parameter: Tensor) -> None:
        room, gradient = known(), parameter.grad
        if room is None or gradient is None or gradient.is_sparse:
            return
        if gradient.device.type == "cpu" and gradient.nbytes < CHUNK and not room.holds(gradient):
            parameter.grad = room.take(gradient.numel(), gradient).view_as(gradient).copy_(gradient)

    handles = [parameter.register_post_accumulate_grad_hook(move) for parameter in parameters]
    weakref.finalize(room, lambda: [handle.remove() for handle in handles]).atexit = False
