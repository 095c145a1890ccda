"""Learning from demonstrations, from pairs and from scored answers: one file a loss, one loop for all.

A loss is a pure function. Its positional parameters name what it reads, its keyword-only parameters are its options
in a recipe. What a loss may read, all float32 (``there``: bool):

A pairwise loss, [B]: ``chosen``, ``rejected``, ``chosen_reference``, ``rejected_reference`` (log-probs summed over
each answer, nats), ``chosen_length``, ``rejected_length`` (tokens, end of sequence included), ``chosen_kl``,
``rejected_kl`` (sum over response positions of KL(pi_ref || pi) over the vocabulary), ``margin`` (score gap; 0:
unknown); of a scorer ``chosen_score``, ``rejected_score``, ``margin``.

A group loss, [B, N], one prompt with up to N answers a row: ``logprobs``, ``reference`` (summed), ``lengths``,
``scores``, ``there`` (true where the row has that answer), and ``baseline`` [B] (batch mean of log pi - log pi_ref
over mismatched prompts and answers, without gradient). It is known by reading ``there``.

Both return one value a row, [B].
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
