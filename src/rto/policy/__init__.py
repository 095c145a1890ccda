"""Policy optimisation: losses, KL, and the one RL loop.

``LOSSES`` has a row a policy loss. Its positional parameters name what it reads. A tokenwise loss reads
``logprobs``, ``old`` and ``advantages`` [B, T] and gives a loss a token; a pairwise loss (its first parameter is
``first``) reads two answers to each prompt, with their token rewards summed, and gives a loss a pair.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from rto.policy.p3o import p3o
from rto.policy.ppo import ppo
from rto.policy.rebel import rebel

LOSSES: dict[str, Callable[..., Tensor]] = {"ppo": ppo, "p3o": p3o, "rebel": rebel}


def is_pairwise(function: Callable[..., object]) -> bool:
    """Whether a policy loss compares two answers to one prompt: it sums token rewards and needs no advantages."""
    return next(iter(inspect.signature(function).parameters)) == "first"


__all__ = ["LOSSES", "is_pairwise", "p3o", "ppo", "rebel"]
