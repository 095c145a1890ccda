"""The sentence reward shared out by attention: ABC."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals
from rto.config import NonNegative, Share
from rto.segments import last_token


def attention(
    signals: Signals,
    *,
    scale: float = 1.0,
    share: Share = 0.8,
    clip: NonNegative | None = 10.0,
    reader: Literal["scorer", "policy"] = "scorer",
    reading: Literal["last", "mean"] = "last",
) -> Float[Tensor, "B T"]:
    """scale * R * (share * a_t + (1 - share) * [t is last]), R = clamp(score, +-clip) (Chan et al. 2024, "Dense
    Reward for Free in RLHF", ABC; its code).

    ``share`` is the paper's beta. a is ``signals.attention``: it sums to 1 over an answer, so the term sums to
    scale * R, as :func:`terminal` does. ``reader`` (whose attention: ABC or ABC-D) and ``reading`` (paid by the last
    token, or by all later ones on average) are options of the signal: who computes it reads them, this
    function does not.
    """
    assert signals.scores is not None and signals.attention is not None
    scores = signals.scores if clip is None else signals.scores.clamp(-clip, clip)
    weight = share * signals.attention + torch.where(last_token(signals.mask), 1 - share, 0.0)
    return torch.where(signals.mask, scale * scores[:, None] * weight, 0.0)
