"""Main memory for tensors that outlive what is computed around them, side by side in chunks that are used again.

In a heap of their own size they would lie between tensors that live for a moment and leave holes that nothing fits
into: with gradients and kept activations there, a training step takes up to twice the memory that it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CHUNK = 2**25  # bytes; from here on a block is the system's own (rto.models.runtime.MAPPED)
ALIGNED = 64


class Room:
    """Tensors of one purpose, which end together."""

    idle: list[Tensor] = []  # chunks of no room, of the whole process
    making = False  # a ghost

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._used = 0  # bytes of the last chunk
        self._ghosts: dict[int, Tensor] = {}  # by place

    def take(self, count: int, like: Tensor) -> Tensor:
        """[count] of ``like``'s kind, with any numbers in it."""
        if isinstance(like, FakeTensor):
            return self._ghost(count, like)
        size = -(-count * like.itemsize // ALIGNED) * ALIGNED
        if size > CHUNK:  # a block of the system's own, which nothing else lies beside
            return torch.empty(count, dtype=like.dtype)
        if not self._chunks or self._used + size > CHUNK:
            # One that somebody still looks at is not used again
            free = next((i for i, chunk in enumerate(Room.idle) if _uses(chunk) == _ALONE), None)
            self._chunks.append(torch.empty(CHUNK, dtype=torch.uint8) if free is None else Room.idle.pop(free))
            self._used = 0
        start, self._used = self._used, self._used + size
        return self._chunks[-1][start : start + count * like.itemsize].view(like.dtype)

    def _ghost(self, count: int, like: Tensor) -> Tensor:
        """For a rehearsal, which counts what is used of a chunk, and knows by ``making`` that it lies in no heap."""
        Room.making = True
        try:
            made = like.new_empty(count)
        finally:
            Room.making = False
        self._ghosts[made.untyped_storage()._cdata] = made
        return made

    def holds(self, tensor: Tensor) -> bool:
        place = tensor.untyped_storage()._cdata
        return place in self._ghosts or any(chunk.untyped_storage()._cdata == place for chunk in self._chunks)

    def end(self) -> None:
        """Nothing in it is needed any more."""
        Room.idle.extend(self._chunks)
        self._chunks.clear()
        self._ghosts.clear()
        self._used = 0


def _uses(chunk: Tensor) -> int:
    return torch._C._storage_Use_Count(chunk.untyped_storage()._cdata)  # type: ignore[attr-defined]


_ALONE = _uses(torch.empty(1))
