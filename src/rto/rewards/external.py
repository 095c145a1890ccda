"""Rewards that come from outside: a Python function, or a server.

Whoever computes the signal reads the options beside ``scale`` and ``clip``. A row without a reward is NaN in the
signal and is taken out before terms are evaluated: a failure is missing, never 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals
from rto.config import Count, NonNegative, Positive, Whole


def function(
    signals: Signals, *, function: str = "", scale: float = 1.0, clip: NonNegative | None = None
) -> Float[Tensor, "B T"]:
    """scale * clamp(what ``function`` ("module:name") said of each token, +-clip)."""
    assert signals.function is not None
    return _scaled(signals, signals.function, scale, clip)


def http(
    signals: Signals,
    *,
    url: str = "",
    scale: float = 1.0,
    clip: NonNegative | None = None,
    timeout: Positive = 30.0,
    retries: Whole = 3,
    batch: Count = 32,
) -> Float[Tensor, "B T"]:
    """scale * clamp(what the server at ``url`` said of each token, +-clip)."""
    assert signals.http is not None
    return _scaled(signals, signals.http, scale, clip)


def _scaled(signals: Signals, reward: Float[Tensor, "B T"], scale: float, clip: float | None) -> Float[Tensor, "B T"]:
    reward = reward if clip is None else reward.clamp(-clip, clip)
    return torch.where(signals.mask, scale * reward, 0.0)
