"""REBEL on pairs that are there already (Gao et al. 2024, arXiv 2404.16767)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.config import Positive
from rto.preferences.parts import log_ratio_gap


def rebel(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_reference: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
    margin: Float[Tensor, " B"],
    *,
    eta: Positive = 1.0,
) -> Float[Tensor, " B"]:
    """(h - eta * margin)^2: the log-ratio gap regresses on the score gap.

    The scale of the official code, eta^2 times that of the paper; eta = 1 in all its scripts. The reference stands
    for the policy that wrote the answers. Data without scores have margin 0, and this pulls their h to 0.
    """
    return (log_ratio_gap(chosen, rejected, chosen_reference, rejected_reference) - eta * margin) ** 2
