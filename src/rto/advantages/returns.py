"""The reward-to-go of every token, and how answers of different lengths are compared at one position."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def to_go(rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float = 1.0) -> Float[Tensor, "B T"]:
    """G_t = sum over s >= t of gamma^(s - t) r_s; zero outside the mask."""
    rewards = torch.where(mask, rewards, 0.0)
    found = torch.zeros_like(rewards)
    running = rewards.new_zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = rewards[:, t] + gamma * running
        found[:, t] = running
    return torch.where(mask, found, 0.0)


def held(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], width: int) -> Float[Tensor, "B W"]:
    """x at min(t, last token) for t < ``width``: an answer that has ended keeps its last value.

    So a reward-to-go can be the baseline of a longer answer. A row without tokens is 0 throughout.
    """
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    place = torch.minimum(torch.arange(width, device=mask.device), last)
    return torch.where(mask, x, 0.0).gather(1, place)
