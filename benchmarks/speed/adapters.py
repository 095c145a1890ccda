"""Fresh LoRA adapters that are the same on both sides: else their losses would part after the first step."""

from __future__ import annotations

from typing import Any


def start_alike(network: Any, seed: int) -> None:
    """A as peft draws it, uniform in +-1 / sqrt(inputs), from a generator of each layer. B is zero as it is."""
    import torch

    found = sorted((name, p) for name, p in network.named_parameters() if ".lora_A." in name)
    for number, (_, parameter) in enumerate(found):
        noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed + number))
        with torch.no_grad():
            parameter.copy_((2 * noise - 1) * parameter.shape[1] ** -0.5)
