"""The input embedding, with a gradient that is added to the weights' own where it stands.

torch makes a tensor of the whole table for every pass, zero but for a few hundred rows. Where a large vocabulary is
trained, most of the pages that a step touches anew are such tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rto.late import Late, own_gradient


class SummingEmbedding(nn.Embedding):
    """On a CPU. A GPU's way of adding rows has no fixed order, so there torch's own gradient stays."""

    def forward(self, input: Int[Tensor, "*rows"]) -> Tensor:
        trained = self.weight.requires_grad and torch.is_grad_enabled()
        if not trained or input.device.type != "cpu":
            return super().forward(input)
        return _Rows.apply(input, self.weight, self.padding_idx)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding  # itself: what is saved comes back as another tensor on its memory
        ctx.late = Late.now
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:  # as torch has it: this row is never trained
            gradient = gradient.masked_fill((ids == ctx.padding)[..., None], 0.0)
        rows = (ids.flatten(), gradient.flatten(0, -2))
        if ctx.late is not None:
            ctx.late.add(ctx.weight, _add_rows, *rows)
        else:
            _add_rows(ctx.weight, *rows)
        return None, None, None


def _add_rows(table: nn.Parameter, ids: Tensor, gradient: Tensor) -> None:
    whole, fresh = own_gradient(table)
    if fresh:
        whole.zero_()
    whole.index_add_(0, ids, gradient.to(whole.dtype))
    table.grad = whole


def sum_in_place(layer: nn.Module) -> None:
    """Change a plain embedding into :class:`SummingEmbedding`."""
    if type(layer) is nn.Embedding and layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse:
        layer.__class__ = SummingEmbedding
