"""How the KL coefficient moves. The estimators are in ``rto.rewards.kl``."""

from __future__ import annotations

from dataclasses import dataclass


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
