"""Token rewards: a sum of terms, each ``Signals -> r [B, T]``, zero outside the mask.

``TERMS`` has a row a term: its function, which signals it needs, and whether its sum over the answer equals
the sentence reward (``keeps``). ``METHODS`` has a row a published method: its list of terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals
from rto.config import Spec
from rto.rewards.implicit import implicit
from rto.rewards.kl import kl_penalty
from rto.rewards.terminal import terminal


@dataclass(frozen=True)
class Term:
    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    keeps: bool


TERMS = {
    "terminal": Term(terminal, needs=("scores",), keeps=True),
    "implicit": Term(implicit, needs=("guide",), keeps=False),
}

METHODS: dict[str, list[Spec]] = {
    "ppo": [{"type": "terminal"}],
    "rto": [{"type": "implicit"}, {"type": "terminal"}],
    "rto-v1": [{"type": "implicit", "scale": 0.1, "clip": None}],  # Eq. 4.6 of the paper's first version
}


def live(terms: list[Spec]) -> list[Spec]:
    """The terms that act: scale 0 means off, and what is off costs no model pass."""
    return [term for term in terms if term.get("scale", 1.0) != 0]


def named(terms: list[Spec]) -> dict[str, Spec]:
    """The live terms by name: their type, and for a second one of a type its number too."""
    names: dict[str, Spec] = {}
    for term in live(terms):
        kind = term["type"]
        names[kind if kind not in names else f"{kind}_{len(names)}"] = term
    return names


def evaluate(term: Spec, signals: Signals, **changed: Any) -> Float[Tensor, "B T"]:
    """One term's reward, with some of its options changed."""
    options = {key: value for key, value in term.items() if key != "type"} | changed
    return TERMS[term["type"]].function(signals, **options)


def needs(terms: list[Spec]) -> set[str]:
    """The fields of :class:`~rto.batch.Signals` that these terms read."""
    return {need for term in live(terms) for need in TERMS[term["type"]].needs}


def total(
    terms: list[Spec], signals: Signals, kl_coef: float
) -> tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]:
    """The reward of every token, and each term's part of it by name (``kl`` is the penalty)."""
    parts: dict[str, Any] = {name: evaluate(term, signals) for name, term in named(terms).items()}
    parts["kl"] = kl_penalty(signals.logprobs, signals.reference, signals.mask, kl_coef)
    return sum(parts.values()), parts


__all__ = [
    "METHODS",
    "TERMS",
    "Term",
    "evaluate",
    "implicit",
    "kl_penalty",
    "live",
    "named",
    "needs",
    "terminal",
    "total",
]
