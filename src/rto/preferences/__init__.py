"""Learning from demonstrations and from pairs: one file a loss, one loop for all.

A loss is a pure function. Its positional parameters name what it reads (see ``train.READABLE``), its
keyword-only parameters are its options in a recipe.
"""

from __future__ import annotations

from rto.preferences.bradley_terry import bradley_terry
from rto.preferences.dpo import dpo
from rto.preferences.sft import sft

PREFERENCE_LOSSES = {"dpo": dpo}
REWARD_LOSSES = {"bradley_terry": bradley_terry}

__all__ = ["PREFERENCE_LOSSES", "REWARD_LOSSES", "bradley_terry", "dpo", "sft"]
