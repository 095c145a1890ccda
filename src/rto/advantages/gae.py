"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, Eq. 16)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.config import Share


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: Share = 1.0,
    lam: Share = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V.

    V is 0 after the last response token, also for an answer that was cut: its truncation is the end of the
    episode, as in the published code. Advantages and returns are zero outside the mask.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    after = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], -1)
    delta = rewards + gamma * after - values
    advantages = torch.zeros_like(delta)
    running = delta.new_zeros(len(delta))
    for t in range(delta.shape[1] - 1, -1, -1):
        running = torch.where(mask[:, t], delta[:, t] + gamma * lam * running, 0.0)
        advantages[:, t] = running
    return advantages, torch.where(mask, advantages + values, 0.0)
