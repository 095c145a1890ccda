"""peft's LoRA layer with its product added in place.

peft makes W x, B A x, and two more tensors of that size on the way to W x + scale B A x. This one makes the first and
adds to it: less memory traffic, the same numbers but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear


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
        low = linear(flat, down.weight)
        out = linear(flat, base.weight, base.bias)  # not kept for its own gradient, so it may be changed
        out.addmm_(low, up.weight.T, alpha=self.scaling[name])
        return out.view(*x.shape[:-1], -1)

    def _adds(self, x: Tensor) -> bool:
        names = self.active_adapters
        base: Any = self.get_base_layer()
        if len(names) != 1 or names[0] not in self.lora_A or type(base) is not nn.Linear:
            return False
        name = names[0]
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        alike = base.weight.dtype == down.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)
        plain = name not in self.lora_variant and isinstance(self.lora_dropout[name], nn.Identity)
        return alike and plain and up.bias is None


def add_in_place(layers: list[Any], autocast: bool = False) -> None:
    """Change peft's linear layers among ``layers`` into these. ``autocast``: passes run under it."""
    for layer in layers:
        # peft makes an adapter's input float32, as its weights are; autocast would change it back at once
        layer.cast_input_dtype_enabled = not autocast
        if type(layer) is Linear:
            layer.__class__ = AddingLinear
