"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7) and two other shapes of its loss."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from rto.config import Positive, Share
from rto.preferences.parts import log_ratio_gap, logistic, per_token


def dpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_reference: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
    chosen_length: Float[Tensor, " B"],
    *,
    beta: Positive = 0.1,
    label_smoothing: Share = 0.0,
    variant: Literal["sigmoid", "hinge", "robust"] = "sigmoid",
    nll: float = 0.0,
) -> Float[Tensor, " B"]:
    """A falling function of z = beta h (``parts.log_ratio_gap``), plus ``nll`` * -(log-prob a token of chosen).

    ``sigmoid``: -(1 - eps) log sigma(z) - eps log sigma(-z); ``label_smoothing`` eps > 0 is conservative DPO (cDPO).
    ``robust``: [-(1 - eps) log sigma(z) + eps log sigma(-z)] / (1 - 2 eps), as TRL has it: unbiased when a share eps
    of the labels is flipped, and unbounded below for eps > 0.
    ``hinge``: max(0, 1 - z), the loss of SLiC on DPO's log-ratios.

    Raises:
        ValueError: label smoothing with the hinge, or of one half and more with ``robust``.
    """
    z = beta * log_ratio_gap(chosen, rejected, chosen_reference, rejected_reference)
    if variant == "sigmoid":
        loss = logistic(z, label_smoothing)
    elif variant == "robust":
        if label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing = {label_smoothing}: variant = 'robust' needs less than 0.5")
        flipped = (1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
        loss = -flipped / (1 - 2 * label_smoothing)
    else:
        if label_smoothing:
            raise ValueError(f"label_smoothing = {label_smoothing}: variant = 'hinge' has none, leave it out")
        loss = (1 - z).clamp(min=0)
    return loss - nll * per_token(chosen, chosen_length)
