"""REBEL on the policy's own answers (Gao et al. 2024, arXiv 2404.16767); the scaling is that of its code."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.config import Positive


def rebel(
    first: Float[Tensor, " P"],
    second: Float[Tensor, " P"],
    first_old: Float[Tensor, " P"],
    second_old: Float[Tensor, " P"],
    first_reference: Float[Tensor, " P"],
    second_reference: Float[Tensor, " P"],
    first_reward: Float[Tensor, " P"],
    second_reward: Float[Tensor, " P"],
    kl_coef: Float[Tensor, ""],
    *,
    eta: Positive = 1.0,
) -> Float[Tensor, " P"]:
    """((delta_1 - delta_2) - eta (r_1 - r_2))^2 a pair of answers to one prompt.

    delta = log pi - log pi_old of a whole answer, against the policy that wrote it and not the reference.
    r = reward - kl_coef (log pi_old - log pi_ref), with the token rewards of the answer summed: which token earned
    them is lost. Log-probs are sums, in nats. The paper's loss is this one divided by eta^2. A reward that is added
    to every answer of a prompt changes nothing.
    """
    moved = (first - first_old) - (second - second_old)
    before = (first_old - first_reference) - (second_old - second_reference)
    return (moved - eta * (first_reward - second_reward - kl_coef * before)) ** 2
