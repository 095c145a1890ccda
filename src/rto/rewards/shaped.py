"""The implicit reward as pure shaping: RS-PPO's first summand."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals
from rto.config import NonNegative
from rto.rewards.implicit import implicit
from rto.segments import last_token


def shaped(signals: Signals, *, scale: float = 0.05, clip: NonNegative | None = 0.05) -> Float[Tensor, "B T"]:
    """:func:`implicit` on every token, minus its sum over the answer on the last one (RS-PPO in the RTO paper).

    The sum of an answer is 0. It is the clipped rewards that are taken back, so that this holds with a clip, too.
    """
    reward = implicit(signals, scale=scale, clip=clip)
    return reward - torch.where(last_token(signals.mask), reward.sum(-1, keepdim=True), 0.0)
