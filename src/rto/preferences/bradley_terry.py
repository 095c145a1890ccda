"""The sentence reward model (RTO paper Eq. 2.2)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.preferences.parts import logistic


def bradley_terry(
    chosen_score: Float[Tensor, " B"],
    rejected_score: Float[Tensor, " B"],
    margin: Float[Tensor, " B"],
    *,
    use_margin: bool = False,
    centre: float = 0.0,
) -> Float[Tensor, " B"]:
    """-log sigma(r_chosen - r_rejected - m) + centre * (r_chosen + r_rejected)^2.

    The margin m counts only with ``use_margin``. ``centre`` holds the scores near 0, which the first summand leaves
    free; TRL has it as ``center_rewards_coefficient``, and 0.01 is its example.
    """
    gap = chosen_score - rejected_score
    return logistic(gap - margin if use_margin else gap) + centre * (chosen_score + rejected_score) ** 2
