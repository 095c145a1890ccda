"""What a pass on a CPU keeps for its gradients: in memory of its own, and not what is cheap to make again.

Tensors that live until the backward pass are copied side by side (:mod:`rto.room`); what is left in the heap is small
and stays in the processor's caches.

A linear layer keeps its input for the gradient of its weights or of its adapter. Where that is the output of a norm or
of a gate, it is made again from what these keep anyway.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rto.room import Room

# Outputs that a linear layer may still read: of a layer's norm, of those of its queries and keys, of its gate
NEWEST = 4


@dataclass(eq=False)
class _Again:
    """How to make a tensor again."""

    parts: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    versions: tuple[int | None, ...]  # of parts that are weights


class Kept(saved_tensors_hooks):
    """Of the passes inside. Its memory is free again once nothing of their graphs is left."""

    now: Kept | None = None

    def __init__(self, network: nn.Module) -> None:
        self._weights = {p.untyped_storage()._cdata for p in network.parameters()}
        self._room = Room()
        # By place. Weakly: once a tensor is gone, another one may come to lie where it lay
        self._copies: dict[int, tuple[weakref.ref[Any], int, Tensor]] = {}
        self._again: deque[tuple[weakref.ref[Tensor], int, _Again]] = deque(maxlen=NEWEST)
        self._made: tuple[_Again, Tensor] | None = None  # several layers read the same one
        weakref.finalize(self, self._room.end).atexit = False
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        super().__enter__()
        Kept.now = self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Kept.now = None
        self._copies.clear()
        self._again.clear()
        del self.pack_hook, self.unpack_hook  # they hold this object

    def make_again(self, out: Tensor, parts: tuple[Tensor, ...], make: Callable[..., Tensor]) -> None:
        if torch._C._autograd._top_saved_tensors_default_hooks(True)[0] != self.pack_hook:
            return  # a checkpointed layer keeps nothing
        if not out.is_contiguous():
            return  # what is made again would lie in another order
        versions = tuple(None if self._copies_of(part) else part._version for part in parts)
        again = _Again(tuple(self._part(part) for part in parts), make, versions)
        self._again.append((weakref.ref(out), out._version, again))

    def _pack(self, kept: Tensor) -> Tensor | tuple[_Again, torch.Size] | tuple[Tensor, int]:
        place = kept.untyped_storage()._cdata
        for known, version, again in self._again:
            out = known()
            if out is None or out.untyped_storage()._cdata != place or kept._version != version:
                continue
            if kept.numel() == out.numel() and kept.is_contiguous():
                return again, kept.shape
        return self._copy(kept) if self._copies_of(kept) else (kept.detach(), kept._version)

    def _unpack(self, kept: Tensor | tuple[Any, Any]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        what, more = kept
        if isinstance(what, Tensor):
            _require_unchanged(what, more)
            return what
        for part, version in zip(what.parts, what.versions, strict=True):
            _require_unchanged(part, version)
        if self._made is None or self._made[0] is not what:
            self._made = (what, what.make(*what.parts))
        return self._made[1].view(more)

    def _part(self, part: Tensor) -> Tensor:
        return self._copy(part) if self._copies_of(part) else part.detach()

    def _copies_of(self, kept: Tensor) -> bool:
        """Weights stay where they are, and so does what is not of numbers. Autocast's copies of weights are like any
        other tensor."""
        return kept.is_floating_point() and kept.untyped_storage()._cdata not in self._weights

    def _copy(self, kept: Tensor) -> Tensor:
        """As it is now."""
        storage = kept.untyped_storage()
        whole = storage.nbytes() // kept.itemsize
        if whole > 2 * kept.numel():  # a small part of something
            return self._room.take(kept.numel(), kept).copy_(kept.detach().flatten()).view(kept.shape)
        known, version, copy = self._copies.get(storage._cdata, (_nothing, 0, kept))
        if known() is not storage or version != kept._version:
            copy = self._room.take(whole, kept).copy_(kept.detach().as_strided((whole,), (1,), 0))
            self._copies[storage._cdata] = (weakref.ref(storage), kept._version, copy)
        return copy.as_strided(kept.shape, kept.stride(), copy.storage_offset() + kept.storage_offset())


def _require_unchanged(kept: Tensor, version: int | None) -> None:
    if version is not None and kept._version != version:
        raise RuntimeError("weights or indices were changed in place between a pass and its gradients")


def _nothing() -> None:
    return None


def make_again(out: Tensor, parts: tuple[Tensor, ...], make: Callable[..., Tensor]) -> None:
    """``out`` = make(*parts) need not be kept in the pass that runs now."""
    if Kept.now is not None:
        Kept.now.make_again(out, parts, make)
