"""ReMax (Li et al. 2023, arXiv 2310.10505): the greedy answer to the same prompt is the baseline."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, where

from rto.advantages.returns import to_go
from rto.config import NonNegative


def remax(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    penalty: Float[Tensor, "B T"],
    greedy: Float[Tensor, "B T"],
    *,
    clip: NonNegative | None = 5.0,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """A_t = clip(G'_t - greedy_t, +-clip) + penalty_t, with G' the reward-to-go of ``rewards - penalty``.

    Only a token's own KL counts and not that of later tokens, gamma is 1, and the difference is clipped at 5, as
    in the published code; None does not clip. Published is the sum of the reward; here both answers are read at
    the same position, so that token rewards keep their places. Returns are the reward-to-go of ``rewards``.
    """
    difference = to_go(rewards - penalty, mask) - greedy
    if clip is not None:
        difference = difference.clamp(-clip, clip)
    return where(mask, difference + penalty, 0.0), to_go(rewards, mask)
