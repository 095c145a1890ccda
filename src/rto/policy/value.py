"""The clipped value loss of the published PPO code."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.numerics import masked_mean


def value_loss(
    values: Float[Tensor, "B T"],
    old: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    *,
    clip: float | None = 0.2,
) -> Float[Tensor, "B T"]:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2) a token; without a clip 0.5 (V - R)^2."""
    if clip is None:
        return 0.5 * (values - returns) ** 2
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def explained_variance(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """1 - Var(R - V) / Var(R) over all unmasked tokens; 0 when the returns do not vary."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    spread = variance(returns)
    return torch.where(spread > 1e-12, 1 - variance(returns - values) / spread.clamp(min=1e-12), 0.0)
