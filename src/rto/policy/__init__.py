"""Policy optimisation: losses, KL, and the one RL loop."""

from __future__ import annotations

from rto.policy.ppo import ppo

LOSSES = {"ppo": ppo}

__all__ = ["LOSSES", "ppo"]
