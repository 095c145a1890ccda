"""Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.config import Positive
from rto.preferences.parts import logistic, per_token


def cpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_length: Float[Tensor, " B"],
    *,
    beta: Positive = 0.1,
    nll: float = 1.0,
) -> Float[Tensor, " B"]:
    """-log sigma(beta (log pi(chosen) - log pi(rejected))) - nll * (log-prob a token of chosen).

    DPO without a reference, held by the chosen answers' likelihood. Defaults: TRL's.
    """
    return logistic(beta * (chosen - rejected)) - nll * per_token(chosen, chosen_length)
