"""KL estimators on sampled tokens, and the KL penalty that every method adds to its reward.

``difference`` is log pi - log pi_ref of the sampled tokens, nats (Schulman 2020, "Approximating KL divergence").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
LINEAR_FROM = 20.0  # nats; the range in which PPO's log-ratio is held, too


def k1(difference: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """log pi - log pi_ref: unbiased for KL(pi, pi_ref) on the policy's samples, of either sign."""
    return difference


def k2(difference: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """difference^2 / 2: biased, never negative; its gradient on-policy is that of the KL."""
    return 0.5 * difference**2


def k3(difference: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """exp(-difference) - 1 + difference: unbiased and never negative.

    Where the policy is more than e^20 times less likely than the reference the exponential goes on as its
    tangent, which keeps value and gradient finite and of the right sign.
    """
    power = (-difference).clamp(max=LINEAR_FROM)
    beyond = (-difference - LINEAR_FROM).clamp(min=0)
    return power.expm1() + power.exp() * beyond + difference


ESTIMATORS: dict[Estimator, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_penalty(
    logprobs: Float[Tensor, "B T"],
    reference: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    coef: float,
    estimator: Estimator = "k1",
) -> Float[Tensor, "B T"]:
    """-coef * k(log pi - log pi_ref) on every token (k1: beta_2 of the RTO paper's Eq. 4.7)."""
    return torch.where(mask, -coef * ESTIMATORS[estimator](logprobs - reference), 0.0)
