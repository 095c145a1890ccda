"""Advantage estimators: rewards and values in, advantages and returns out, all [B, T]."""

from __future__ import annotations

from rto.advantages.gae import gae

ADVANTAGES = {"gae": gae}

__all__ = ["ADVANTAGES", "gae"]
