"""The guide's token log-ratio: RTO's dense reward, and where it is placed."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals
from rto.config import NonNegative
from rto.segments import to_ends


def implicit(
    signals: Signals,
    *,
    scale: float = 0.05,
    clip: NonNegative | None = 0.05,
    placement: Literal["token", "sentence", "end"] = "token",
) -> Float[Tensor, "B T"]:
    """clamp(scale * (log pi_guide - log pi_ref), +-clip) on every token (RTO paper Eq. 4.7).

    ``scale`` is the paper's beta_1: DPO's own beta does not multiply again. ``clip`` acts after scaling, as in
    the published code, so 0.05 and 0.05 cap the log-ratio at one nat a token; None is the paper's text, without it.

    ``placement`` moves the clipped rewards of the tokens and keeps their sum: to the end of their sentence
    (Semi-RTO) or of the answer (DDPO; Eq. 5.1 of the paper's first version, DPPO).
    """
    assert signals.guide is not None
    reward = scale * (signals.guide - signals.reference)
    if clip is not None:
        reward = reward.clamp(-clip, clip)
    reward = torch.where(signals.mask, reward, 0.0)
    if placement == "token":
        return reward
    if placement == "end":
        return to_ends(reward, torch.zeros_like(signals.mask), signals.mask)
    assert signals.sentence_ends is not None
    return to_ends(reward, signals.sentence_ends, signals.mask)
