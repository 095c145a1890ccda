"""Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.config import Positive
from rto.preferences.parts import per_token


def ipo(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_reference: Float[Tensor, " B"],
    rejected_reference: Float[Tensor, " B"],
    chosen_length: Float[Tensor, " B"],
    rejected_length: Float[Tensor, " B"],
    *,
    tau: Positive = 0.1,
    average: bool = True,
) -> Float[Tensor, " B"]:
    """(h - 1 / (2 tau))^2, with h = log-ratio of chosen - log-ratio of rejected.

    ``average``: of log-ratios a token (TRL, HALOs); else summed over the answer (the DPO repository, OpenRLHF). The two
    need different taus. Default of tau: TRL's beta.

    Raises:
        ValueError: tau is not positive.
    """
    if tau <= 0:
        raise ValueError(f"tau = {tau}: ipo needs a positive tau")
    above, below = chosen - chosen_reference, rejected - rejected_reference
    if average:
        above, below = per_token(above, chosen_length), per_token(below, rejected_length)
    return (above - below - 1 / (2 * tau)) ** 2
