"""Pairwise PPO (Wu et al. 2023, arXiv 2310.00212); the formulas are those of its first author's code."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rto.config import Positive
from rto.policy.ppo import ratios


def p3o(
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
    version: Literal["joint", "separate"] = "joint",
    clip: Positive = 0.2,
    weight_clip: Positive = 10.0,
) -> Float[Tensor, " P"]:
    """A loss a pair of answers to one prompt, from summed log-probs (nats) and summed token rewards without KL.

    lr = log pi - log pi_ref, rho = exp(log pi - log pi_old), both of a whole answer, and without gradient
    q = r_1 - r_2 - kl_coef (lr_1 - lr_2), w(x) = clip(x, 1 / weight_clip, weight_clip). With D = lr_1 - lr_2:

    ``joint`` (V2): 1/2 max(-q w(rho_1 rho_2) D, -q w(rho_1 rho_2) clip(D, D_old - clip, D_old + clip)).
    ``separate`` (V1): 1/2 [max(-q w(rho_2) rho_1, -q w(rho_2) clip(rho_1, 1 +- clip))
    + max(q w(rho_1) rho_2, q w(rho_1) clip(rho_2, 1 +- clip))].

    Where nothing is clipped the gradient is -q w grad log(pi_1 / pi_2) / 2. A reward that is added to every answer
    of a prompt changes nothing. Which token earned the reward is lost: both answers count as wholes.

    Raises:
        ValueError: ``weight_clip`` is below 1.
    """
    if weight_clip < 1:
        raise ValueError(f"policy.loss.weight_clip = {weight_clip:g} must be at least 1 (1: no importance weights)")
    # Differences to the old policy first: they are small, while the sums of long answers are large.
    moved = (first - first_old) - (second - second_old)
    before = (first_old - first_reference) - (second_old - second_reference)
    q = first_reward - second_reward - kl_coef * (before + moved.detach())
    rho_1, rho_2 = ratios(first, first_old), ratios(second, second_old)

    def weight(ratio: Tensor) -> Tensor:
        return ratio.detach().clamp(1 / weight_clip, weight_clip)

    if version == "joint":
        push = q * weight(rho_1 * rho_2)
        return 0.5 * torch.maximum(-push * (before + moved), -push * (before + moved.clamp(-clip, clip)))
    push_1, push_2 = q * weight(rho_2), q * weight(rho_1)
    up = torch.maximum(-push_1 * rho_1, -push_1 * rho_1.clamp(1 - clip, 1 + clip))
    down = torch.maximum(push_2 * rho_2, push_2 * rho_2.clamp(1 - clip, 1 + clip))
    return 0.5 * (up + down)
