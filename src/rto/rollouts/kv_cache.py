"""A KV cache with room for the whole answer: a step writes its keys and values, and copies no others."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Full attention in place: ``room`` is how many positions there will be at most. ``dtype`` is the precision of
    attention: weights that are trained make keys in float32, which autocast would round again at every step.

    The prompt's keys and values [B, heads, P, width] are kept as they come; the room is taken at the first step after
    it, for as many rows as there are then.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.room, self.precision = room, dtype
        self._buffers: list[Tensor] = []  # of which keys and values are the part that is filled

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key_states, value_states = key_states.to(self.precision), value_states.to(self.precision)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if start == 0 or stop > self.room:
            self._buffers = []
            return super().update(key_states, value_states, *args, **kwargs)
        if not self._buffers:
            for part in (self.keys, self.values):
                rows, heads, _, width = part.shape
                self._buffers.append(part.new_empty(rows, heads, self.room, width))
                self._buffers[-1][:, :, :start] = part
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._buffers = []

    def move(self, sources: Int[Tensor, " N"], places: Int[Tensor, " N"], rows: int) -> None:
        """Put the rows ``sources`` at ``places``, then keep the first ``rows``."""
        filled = self.get_seq_length()
        for buffer in self._buffers:
            buffer[places, :, :filled] = buffer[sources, :, :filled]
        self._buffers = [buffer[:rows] for buffer in self._buffers]
        self.keys, self.values = self.keys[:rows], self.values[:rows]


def roomy_cache(config: PreTrainedConfig, room: int, dtype: torch.dtype) -> DynamicCache:
    """A cache for this model. Layers that are no plain full attention (sliding windows, states) stay transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room, dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keep_rows(cache: Cache, kept: Int[Tensor, " N"]) -> None:
    """Only the rows ``kept``, in this order. Rows that stay where they are cost nothing."""
    moved = (kept != torch.arange(len(kept), device=kept.device)).nonzero().squeeze(-1)
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if isinstance(layer, RoomyLayer) and layer._buffers:
            layer.move(kept[moved], moved, len(kept))
        else:
            layer.reorder_cache(kept)  # batch_select_indices forgets the states of recurrent layers
