"""Learning from demonstrations, from pairs and from scored answers: one file a loss, one loop for all.

A loss is a pure function. Its positional parameters name what it reads, its keyword-only parameters are its options
in a recipe. It returns one value a row, [B]. A pairwise loss reads what ``objectives.READABLE`` lists. A loss that
reads ``there`` is one of several scored answers a prompt and reads what ``groups.READABLE_GROUP`` lists.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rto.preferences.bradley_terry import bradley_terry
from rto.preferences.cpo import cpo
from rto.preferences.dpo import dpo
from rto.preferences.ipo import ipo
from rto.preferences.kto import kto
from rto.preferences.mpo import mpo
from rto.preferences.mppo import mppo
from rto.preferences.orpo import orpo
from rto.preferences.rdpo import rdpo
from rto.preferences.rebel import rebel
from rto.preferences.sft import sft
from rto.preferences.simpo import simpo
from rto.preferences.tdpo import tdpo1, tdpo2

PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "rdpo": rdpo,
    "simpo": simpo,
    "tdpo1": tdpo1,
    "tdpo2": tdpo2,
    "orpo": orpo,
    "cpo": cpo,
    "mpo": mpo,
    "rebel": rebel,
    "kto": kto,
    "mppo": mppo,
}
REWARD_LOSSES: dict[str, Callable[..., Tensor]] = {"bradley_terry": bradley_terry}

__all__ = [
    "PREFERENCE_LOSSES",
    "REWARD_LOSSES",
    "bradley_terry",
    "cpo",
    "dpo",
    "ipo",
    "kto",
    "mpo",
    "mppo",
    "orpo",
    "rdpo",
    "rebel",
    "sft",
    "simpo",
    "tdpo1",
    "tdpo2",
]
