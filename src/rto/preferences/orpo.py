"""Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.preferences.parts import log_complement, logistic, per_token


def orpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_length: Float[Tensor, " B"],
    rejected_length: Float[Tensor, " B"],
    *,
    weight: float = 0.1,
) -> Float[Tensor, " B"]:
    """-a(chosen) - weight * log sigma(log odds(chosen) - log odds(rejected)), with a = log-prob a token.

    odds = p / (1 - p) with p = exp(a). No reference. Default of the weight: TRL's beta. The first summand is the
    token mean of the pair's chosen answer, without its prompt.
    """
    above, below = per_token(chosen, chosen_length), per_token(rejected, rejected_length)
    gap = (above - log_complement(above)) - (below - log_complement(below))
    return -above + weight * logistic(gap)
