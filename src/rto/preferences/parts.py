"""What several preference losses share."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

NEAREST = -1e-6  # log p at which p counts as certain: closer to 0, float32 holds rounding only


def log_ratio_gap(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_reference: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """h = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected), of sums over each answer, nats."""
    return (chosen - chosen_reference) - (rejected - rejected_reference)


def per_token(logprobs: Float[Tensor, "*S"], lengths: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Log-prob a token from log-probs summed over each answer; 0 for an answer without a token."""
    return logprobs / lengths.clamp(min=1)


def logistic(z: Float[Tensor, " B"], label_smoothing: float = 0.0) -> Float[Tensor, " B"]:
    """-(1 - eps) log sigma(z) - eps log sigma(-z)."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def log_complement(logp: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """log(1 - p) from log p, finite for p = 1 too: log p is cut at -1e-6, with gradient 0 beyond."""
    return (-logp.clamp(max=NEAREST).expm1()).log()
