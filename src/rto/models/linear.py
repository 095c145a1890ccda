"""Linear layers whose products, and those of their gradients, are :mod:`rto.products`'s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rto.products import bound_kernels, by_onednn, onednn_is_faster, product


class ProductLinear(nn.Linear):
    """On a CPU, in float32. Anything else, and what is too small to gain, is PyTorch's own."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as :func:`torch.nn.functional.linear`."""
    if not by_onednn(x, weight) or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        for_x = product(gradient, weight.T) if weight is not None else None
        for_weight = product(rows.T, x.flatten(0, -2).T) if x is not None else None
        return for_x, for_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def is_linear(layer: Any) -> bool:
    """Whether a layer is weights and a bias and nothing else."""
    return type(layer) in (nn.Linear, ProductLinear)


def use_products(network: nn.Module) -> None:
    """Change the plain linear layers of ``network``, where oneDNN is the faster library. To be called before a pass, as
    it also bounds what oneDNN keeps."""
    bound_kernels()
    if onednn_is_faster():
        for module in network.modules():
            if type(module) is nn.Linear:
                module.__class__ = ProductLinear
