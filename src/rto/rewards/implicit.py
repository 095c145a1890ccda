"""The guide's token log-ratio: RTO's dense reward."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals


def implicit(signals: Signals, *, scale: float = 0.05, clip: float | None = 0.05) -> Float[Tensor, "B T"]:
    """clamp(scale * (log pi_guide - log pi_ref), +-clip) on every token (RTO paper Eq. 4.7).

    ``scale`` is the paper's beta_1: DPO's own beta does not multiply again. ``clip`` acts after scaling, as in
    the published code, so 0.05 and 0.05 cap the log-ratio at one nat a token; None is the paper's text, without it.
    """
    assert signals.guide is not None
    reward = scale * (signals.guide - signals.reference)
    if clip is not None:
        reward = reward.clamp(-clip, clip)
    return torch.where(signals.mask, reward, 0.0)
