"""Length-regularised DPO, R-DPO (Park et al. 2024, arXiv 2403.19159, Eq. 9)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.config import Positive
from rto.preferences.parts import log_ratio_gap, logistic


def rdpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_reference: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
    chosen_length: Float[Tensor, " B"],
    rejected_length: Float[Tensor, " B"],
    *,
    beta: Positive = 0.1,
    alpha: float = 0.001,
) -> Float[Tensor, " B"]:
    """-log sigma(beta h + alpha (|chosen| - |rejected|)), lengths in tokens; alpha is not multiplied by beta.

    The sign is a plus: a chosen answer that is longer already needs less of a push. Defaults: the RTO paper.
    """
    h = log_ratio_gap(chosen, rejected, chosen_reference, rejected_reference)
    return logistic(beta * h + alpha * (chosen_length - rejected_length))
