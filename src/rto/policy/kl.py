"""KL estimators, and how the KL coefficient moves."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


def k1(difference: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """log pi - log pi_ref: unbiased for KL(pi, pi_ref) on the policy's samples, of either sign (Schulman 2020)."""
    return difference


def k2(difference: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """difference^2 / 2: biased, never negative; its gradient on-policy is that of the KL."""
    return 0.5 * difference**2


def k3(difference: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """exp(-difference) - 1 + difference: unbiased and never negative."""
    return (-difference).expm1() + difference


@dataclass
class KlController:
    """The coefficient of the KL penalty; ``target`` None keeps it fixed.

    Otherwise coef <- coef * (1 + clip(kl / target - 1, +-0.2) * n / horizon) after n samples (Ziegler et al.
    2019, arXiv 1909.08593, section 2.2). ``kl`` and ``target`` have the same unit: nats a sequence or a token.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, samples: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * samples / self.horizon
