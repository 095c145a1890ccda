"""The KL penalty that every method adds to its reward."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def kl_penalty(
    logprobs: Float[Tensor, "B T"], reference: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], coef: float
) -> Float[Tensor, "B T"]:
    """-coef * (log pi - log pi_ref) on every token (k1; beta_2 of the RTO paper's Eq. 4.7)."""
    return torch.where(mask, -coef * (logprobs - reference), 0.0)
