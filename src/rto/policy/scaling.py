"""Reward scaling by running moments, as in PPO-max (Zheng et al. 2023, arXiv 2307.04964; MOSS-RLHF code)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.numerics import masked_sum


@dataclass
class RunningMoments:
    """Mean and spread of all numbers seen so far. The fields are plain numbers: saved, they are the whole state."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0  # sum of squared deviations from the mean

    def update(self, values: Float[Tensor, " N"]) -> None:
        """Merge a batch (Chan et al. 1983)."""
        if not len(values):
            return
        values = values.detach().double()
        count, mean = len(values), values.mean().item()
        gap, total = mean - self.mean, self.count + count
        self.m2 += ((values - mean) ** 2).sum().item() + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    @property
    def std(self) -> float | None:
        """Unbiased, None before the second number."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else None


def scale_rewards(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    moments: RunningMoments,
    mode: Literal["std", "standardize"] | None,
    clip: float | None,
) -> Float[Tensor, "B T"]:
    """Token rewards without KL, scaled and then clamped to +-clip a token; zero outside the mask.

    ``moments`` first takes in this batch's answers (their summed rewards). ``std`` divides every token by the
    moments' std; ``standardize`` also takes the mean, so scaled, off the last token, so that an answer's sum is
    (sum - mean) / std. A dense reward keeps its shape. Where there is no std (one answer so far) the rewards stay as
    they are; where it is below 1e-8 (all answers alike) nothing is divided, for that would make rewards of 1e8.
    """
    rewards = torch.where(mask, rewards, 0.0)
    if mode is not None:
        moments.update(masked_sum(rewards, mask)[mask.any(-1)])
        std = moments.std
        if std is not None:
            unit = std if std >= 1e-8 else 1.0
            rewards = rewards / unit
            if mode == "standardize":
                later = torch.nn.functional.pad(mask[:, 1:], (0, 1))
                rewards = rewards - torch.where(mask & ~later, moments.mean / unit, 0.0)
    return rewards if clip is None else rewards.clamp(-clip, clip)
