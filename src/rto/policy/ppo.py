"""The clipped policy loss of PPO (Schulman et al. 2017, arXiv 1707.06347, Eq. 7)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def ppo(
    logprobs: Float[Tensor, "B T"],
    old: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, "B T"]:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip) A) a token, with rho = exp(logprobs - old)."""
    ratio = ratios(logprobs, old)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def ratios(logprobs: Float[Tensor, "B T"], old: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """rho; the log-ratio is held within +-20 so that one wild token gives no infinity."""
    return (logprobs - old).clamp(-20, 20).exp()
