"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_reference: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """-(1 - eps) log sigma(z) - eps log sigma(-z), with z = beta (log-ratio chosen - log-ratio rejected).

    Inputs are log-probs summed over each response. ``label_smoothing`` eps > 0 is conservative DPO.
    """
    z = beta * ((chosen - chosen_reference) - (rejected - rejected_reference))
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
