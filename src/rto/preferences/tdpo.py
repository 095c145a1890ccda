"""Token-level DPO (Zeng et al. 2024, arXiv 2404.11999): sequential KL beside the log-ratios."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.config import Positive
from rto.preferences.parts import log_ratio_gap, logistic


def tdpo1(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_reference: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
    chosen_kl: Float[Tensor, " B"],
    rejected_kl: Float[Tensor, " B"],
    *,
    beta: Positive = 0.1,
) -> Float[Tensor, " B"]:
    """-log sigma(beta (h - (K(rejected) - K(chosen)))).

    K is the sum over response positions of KL(pi_ref || pi), reference first, over the whole vocabulary. Gradients
    flow through both.
    """
    h = log_ratio_gap(chosen, rejected, chosen_reference, rejected_reference)
    return logistic(beta * (h - (rejected_kl - chosen_kl)))


def tdpo2(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_reference: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
    chosen_kl: Float[Tensor, " B"],
    rejected_kl: Float[Tensor, " B"],
    *,
    beta: Positive = 0.1,
    alpha: float = 0.5,
) -> Float[Tensor, " B"]:
    """-log sigma(beta (h - alpha (K(rejected) - stop[K(chosen)]))); no gradient through the chosen K, and only there.

    Default of alpha: the official code. The RTO paper used 0.2.
    """
    h = log_ratio_gap(chosen, rejected, chosen_reference, rejected_reference)
    return logistic(beta * (h - alpha * (rejected_kl - chosen_kl.detach())))
