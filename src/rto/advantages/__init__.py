"""Advantage estimators: token rewards in, advantages and returns out, all [B, T]. None of them sums the token rewards.

An estimator's positional parameters name what it reads, its keyword-only parameters are its options in a recipe:

    rewards  [B, T]  token rewards, the KL penalty inside where it is part of the reward
    values   [B, T]  the critic before each token: only estimators that read it need a critic
    mask     [B, T]  true on response tokens
    group    [B]     number of the prompt, the same for all answers to it
    penalty  [B, T]  the KL part of ``rewards``
    greedy   [B, T]  reward-to-go without KL of the greedy answer to the same prompt, see :func:`held`
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rto.advantages.gae import gae
from rto.advantages.group import grpo, rloo
from rto.advantages.reinforce import reinforce
from rto.advantages.remax import remax
from rto.advantages.returns import held, to_go


@dataclass(frozen=True)
class Advantage:
    """``whiten``: the published convention, used where the recipe names none. ``group``: the least answers a prompt."""

    function: Callable[..., tuple[Tensor, Tensor]]
    whiten: bool = False
    group: int = 1


ADVANTAGES = {
    "gae": Advantage(gae, whiten=True),
    "reinforce": Advantage(reinforce),
    "reinforce++": Advantage(reinforce, whiten=True),
    "rloo": Advantage(rloo, group=2),
    "grpo": Advantage(grpo, group=2),
    "remax": Advantage(remax),
}


def reads(function: Callable[..., object]) -> tuple[str, ...]:
    """What an estimator reads: the names of its positional parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY)


__all__ = [
    "ADVANTAGES",
    "Advantage",
    "gae",
    "grpo",
    "held",
    "reads",
    "reinforce",
    "remax",
    "rloo",
    "to_go",
]
