"""The sentence reward on the last token: PPO's reward, and the last summand of RTO's."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals
from rto.config import NonNegative
from rto.segments import last_token


def terminal(signals: Signals, *, scale: float = 1.0, clip: NonNegative | None = 10.0) -> Float[Tensor, "B T"]:
    """scale * clamp(score, +-clip) on each answer's last token (RTO paper Eq. 2.3, and beta_3 in Eq. 4.7).

    ``clip`` follows the published code, which clamps the scorer's part before KL is added.
    """
    assert signals.scores is not None
    scores = signals.scores if clip is None else signals.scores.clamp(-clip, clip)
    return torch.where(last_token(signals.mask), scale * scores[:, None], 0.0)
