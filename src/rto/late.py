"""Gradients of the vocabulary's weights, made for the micro-batches of a batch together.

The table of a large vocabulary is the largest weight of most models. Its gradient is a product over all positions of
a batch: made at the end, it is written once, and is not there while a pass keeps what its own gradients need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rto.room import CHUNK, Room

SHARE = 16  # the rows that wait for a table are no more than this part of its own
FEWEST = 256  # or than these


class Late:
    """What waits, from the passes inside of :func:`late_gradients`."""

    now: Late | None = None

    def __init__(self) -> None:
        self._waiting: dict[tuple[Any, ...], _Waiting] = {}
        self._over = False

    def add(self, table: nn.Parameter, make: Callable[..., None], *columns: Tensor) -> None:
        """``make(table, *columns)`` before the end, on these rows and others: it adds to the gradient of ``table``.
        Columns are [N, ...], and what they are at this moment counts.

        A rehearsal knows two passes of a batch and not how many rows come to wait: it takes the room, and waits for
        nothing."""
        if self._over:
            raise RuntimeError("a pass began inside of late_gradients(), and its gradients were asked for after it")
        key = (id(table), make, *((column.dtype, column.shape[1:]) for column in columns))
        if key not in self._waiting:
            self._waiting[key] = _Waiting(table, make, columns)
        self._waiting[key].take(columns)
        if isinstance(table, FakeTensor):
            self._waiting[key].flush()

    def finish(self) -> None:
        if any(waiting.table.grad is None and waiting.table.nbytes > CHUNK for waiting in self._waiting.values()):
            Room.idle.clear()  # what passes kept makes room for the gradient
        for waiting in self._waiting.values():
            waiting.flush()

    def end(self) -> None:
        self._over = True
        self._waiting.clear()


class _Waiting:
    def __init__(self, table: nn.Parameter, make: Callable[..., None], columns: tuple[Tensor, ...]) -> None:
        self.table, self._make, self._count = table, make, 0
        self._most = max(FEWEST, len(table) // SHARE)
        self._columns = [column.new_empty((self._most, *column.shape[1:])) for column in columns]

    def take(self, columns: tuple[Tensor, ...]) -> None:
        stop = self._count + len(columns[0])
        if stop > self._most:
            self.flush()
            stop = len(columns[0])
        if stop > self._most:
            self._make(self.table, *columns)
            return
        for column, rows in zip(self._columns, columns, strict=True):
            column[self._count : stop] = rows
        self._count = stop

    def flush(self) -> None:
        if self._count:
            self._make(self.table, *(column[: self._count] for column in self._columns))
        self._count = 0


@contextmanager
def late_gradients() -> Iterator[None]:
    """The gradients that passes inside leave on a table are whole when it ends. None are left by an error."""
    late = Late.now = Late()
    try:
        yield
        late.finish()
    finally:
        Late.now = None
        late.end()


def own_gradient(weight: Tensor) -> tuple[Tensor, bool]:
    """The tensor that ``backward`` adds this weight's gradient to, and whether it was made just now: then it has any
    numbers in it. It becomes the weight's ``grad`` when it is whole: not where memory is short half-way."""
    return (torch.empty_like(weight), True) if weight.grad is None else (weight.grad, False)
