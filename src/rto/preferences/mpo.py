"""Maximum preference optimisation (Jiang et al. 2023, arXiv 2312.16430).

From memory of the paper, not checked against its text.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.preferences.parts import per_token


def mpo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_length: Float[Tensor, " B"],
    *,
    nll: float = 0.1,
) -> Float[Tensor, " B"]:
    """-sigma(log pi(chosen) - log pi(rejected)) - nll * (log-prob a token of chosen).

    The probability of the preference is the reward, so a pair that is very wrong gets almost no gradient. The paper
    regularises on demonstrations and on pre-training text; here the chosen answers stand for both, and the weight's
    default is ours.
    """
    return -(chosen - rejected).sigmoid() - nll * per_token(chosen, chosen_length)
