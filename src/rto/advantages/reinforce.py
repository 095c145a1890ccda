"""REINFORCE (Williams 1992) on token rewards."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from rto.advantages.returns import to_go
from rto.config import Share


def reinforce(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: Share = 1.0
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """A_t = G_t, the reward-to-go. Returns are the same numbers.

    Whitened over all tokens of the rollouts it is REINFORCE++ (Hu 2025, arXiv 2501.03262; from memory of the
    paper, not checked against its text), as published code has it.
    """
    returns = to_go(rewards, mask, gamma)
    return returns, returns
