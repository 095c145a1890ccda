"""The clipped policy loss of PPO (Schulman et al. 2017, arXiv 1707.06347, Eq. 7)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rto.config import Positive


def ppo(
    logprobs: Float[Tensor, "B T"],
    old: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    clip: Positive = 0.2,
    clip_high: Positive | None = None,
    dual: float | None = None,
) -> Float[Tensor, "B T"]:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip_high) A) a token, with rho = exp(logprobs - old).

    ``clip_high`` None is ``clip``; a larger one is DAPO's "clip higher" (Yu et al. 2025, arXiv 2503.14476; from
    memory of the paper, not checked against its text). ``dual`` c bounds the loss of a token with A < 0 by c |A|,
    however likely it has become (Ye et al. 2020, arXiv 1912.09729; likewise from memory).

    Raises:
        ValueError: ``dual`` is not above 1.
    """
    if dual is not None and dual <= 1:
        raise ValueError(f"policy.loss.dual = {dual:g} must be above 1, for example 3.0, or none for no dual clip")
    ratio = ratios(logprobs, old)
    high = clip if clip_high is None else clip_high
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + high) * advantages)
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    return loss


def ratios(logprobs: Float[Tensor, "*S"], old: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """rho; the log-ratio is held within +-20 so that one wild token gives no infinity."""
    return (logprobs - old).clamp(-20, 20).exp()
