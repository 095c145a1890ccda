"""Linear layers with a copy of their weights that is fast for few rows, while answers are sampled on a CPU.

oneDNN multiplies few rows faster by weights that lie in its own order. Adapters are folded into the copy,
W + scale B A, so that a step runs neither their products nor peft's code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rto.models.linear import is_linear
from rto.models.role import Role

STEPS = 32  # of sampling; fewer do not pay for the copies
NUMBERS = 2**19  # of a weight; smaller ones gain less than calling oneDNN's kernel costs more


class Prepacked:
    """Copies of a role's weights as they are now: made anew for each use, since training changes the weights."""

    def __init__(self, role: Role, steps: int) -> None:
        self._forwards = [(layer, _forward(layer, base, role.adapter)) for layer, base in copied(role, steps)]

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """The copies act in the place of the layers, for this role and without gradients."""
        assert not torch.is_grad_enabled(), "copies of weights have no gradients"
        try:
            for layer, forward in self._forwards:
                layer.forward = forward
            yield
        finally:
            for layer, _ in self._forwards:
                vars(layer).pop("forward", None)


def copied(role: Role, steps: int) -> list[tuple[nn.Module, nn.Linear]]:
    """The layers whose weights are copied for ``steps`` steps of sampling, and the linear layer in each: itself, or the
    one below an adapter. None on a GPU, and none in other precisions than float32."""
    backbone = role.backbone
    if steps < STEPS or backbone.device.type != "cpu" or backbone.compute != torch.float32:
        return []
    found: list[tuple[nn.Module, nn.Linear]] = []
    below: set[nn.Module] = set()
    for layer in backbone.network.modules():
        if layer in below:
            continue
        base: Any = getattr(layer, "base_layer", layer)  # peft's name for what its layers wrap
        if base is not layer:
            below.update(layer.modules())
        plain = is_linear(base) and base.weight.dtype == torch.float32 and "forward" not in vars(layer)
        if plain and (_packs(base) or _has(layer, role.adapter)):
            found.append((layer, base))
    return found


def _packs(base: nn.Linear) -> bool:
    return torch.backends.mkldnn.is_available() and base.weight.numel() >= NUMBERS


def _has(layer: nn.Module, adapter: str | None) -> bool:
    return adapter in getattr(layer, "lora_A", ())


def _forward(layer: nn.Module, base: nn.Linear, adapter: str | None) -> Callable[..., Tensor]:
    weight, bias = base.weight.detach(), base.bias
    if _has(layer, adapter):
        weight = weight + layer.get_delta_weight(adapter).detach()  # type: ignore[operator]
    if not _packs(base):
        return lambda x, *_, **__: linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, *_, **__: multiply(x, packed, bias, "none", [], "")
