"""peft's LoRA layer with its product added in place.

peft makes W x, B A x, and two more tensors of that size on the way to W x + scale B A x. This one makes the first and
adds to it, and so it does with the gradient: less memory traffic, the same numbers but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rto.models.linear import is_linear
from rto.products import product


class AddingLinear(Linear):
    """Whatever is not one plain adapter in one precision is left to peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or not self._adds(x):
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        base: Any = self.get_base_layer()
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        flat = x.flatten(0, -2)
        out = _Adapted.apply(flat, base.weight, base.bias, down.weight, up.weight, self.scaling[name])
        return out.view(*x.shape[:-1], -1)

    def _adds(self, x: Tensor) -> bool:
        names = self.active_adapters
        base: Any = self.get_base_layer()
        if len(names) != 1 or names[0] not in self.lora_A or not is_linear(base):
            return False
        name = names[0]
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        alike = base.weight.dtype == down.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)
        plain = name not in self.lora_variant and isinstance(self.lora_dropout[name], nn.Identity)
        return alike and plain and up.bias is None


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T, with x [N, I], W [O, I], A [R, I] and B [O, R]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        low = product(x, down)
        ctx.save_for_backward(x, weight, down, up, low)
        ctx.scale = scale
        return product(x, weight, bias).addmm_(low, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, down, up, low = ctx.saved_tensors
        for_x, for_weight, for_bias, for_down, for_up, _ = ctx.needs_input_grad
        narrow = product(gradient, up.T).mul_(ctx.scale) if for_x or for_down else gradient
        return (
            product(gradient, weight.T).addmm_(narrow, down) if for_x else None,
            product(gradient.T, x.T) if for_weight else None,
            gradient.sum(0) if for_bias else None,
            product(narrow.T, x.T) if for_down else None,
            # As the transpose of [R, O]: the smaller one of two is copied
            product(low.T, gradient.T).mul_(ctx.scale).T if for_up else None,
            None,
        )


def add_in_place(layers: list[Any], autocast: bool = False) -> None:
    """Change peft's linear layers among ``layers`` into these. ``autocast``: passes run under it."""
    for layer in layers:
        # peft makes an adapter's input float32, as its weights are; autocast would change it back at once
        layer.cast_input_dtype_enabled = not autocast
        if type(layer) is Linear:
            layer.__class__ = AddingLinear
