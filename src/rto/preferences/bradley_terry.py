"""The sentence reward model (RTO paper Eq. 2.2)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(
    chosen_score: Float[Tensor, " B"],
    rejected_score: Float[Tensor, " B"],
    margin: Float[Tensor, " B"],
    *,
    use_margin: bool = False,
) -> Float[Tensor, " B"]:
    """-log sigma(r_chosen - r_rejected - m); the margin m counts only with ``use_margin``."""
    gap = chosen_score - rejected_score
    return -logsigmoid(gap - margin if use_margin else gap)
