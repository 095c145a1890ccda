"""SimPO (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.config import Positive, Share
from rto.preferences.parts import logistic, per_token


def simpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_length: Float[Tensor, " B"],
    rejected_length: Float[Tensor, " B"],
    *,
    beta: Positive = 2.5,
    gamma: float | None = 0.5,
    ratio: float | None = None,
    label_smoothing: Share = 0.0,
    nll: float = 0.0,
) -> Float[Tensor, " B"]:
    """-log sigma(z), z = beta (a(chosen) - a(rejected)) - gamma, with a = log-prob a token. No reference.

    The official configuration gives ``ratio`` = gamma / beta, TRL and the RTO paper gamma itself: give one of the
    two. ``nll`` adds its weight * -a(chosen). Defaults: beta and gamma of the RTO paper's baseline.

    Raises:
        ValueError: gamma and ratio are both given, or neither is.
    """
    if gamma is not None and ratio is None:
        target = gamma
    elif ratio is not None and gamma is None:
        target = beta * ratio
    else:
        raise ValueError(
            f'gamma = {gamma} and ratio = {ratio}: simpo needs one of them; beside a ratio write gamma = "none"'
        )
    above, below = per_token(chosen, chosen_length), per_token(rejected, rejected_length)
    return logistic(beta * (above - below) - target, label_smoothing) - nll * above
