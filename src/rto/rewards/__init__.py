"""Token rewards: a sum of terms, each ``Signals -> r [B, T]``, zero outside the mask.

``TERMS`` has a row a term. ``METHODS`` has a row a published method: its list of terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals
from rto.config import Spec
from rto.rewards.attention import attention
from rto.rewards.external import function, http
from rto.rewards.implicit import implicit
from rto.rewards.kl import Estimator, kl_penalty
from rto.rewards.penalties import length, missing_eos
from rto.rewards.segment import segment
from rto.rewards.shaped import shaped
from rto.rewards.terminal import terminal


@dataclass(frozen=True)
class Term:
    """``needs`` are the fields of :class:`~rto.batch.Signals` that it reads beside those that are always there,
    ``needs_if`` further ones where an option has a value (never its default).

    ``keeps`` is what its sum over an answer is, if that is promised: "score" is scale * clamp(score, +-clip),
    "zero" is 0.
    """

    function: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    keeps: Literal["score", "zero"] | None = None
    needs_if: Mapping[tuple[str, Any], tuple[str, ...]] = field(default_factory=dict)


TERMS = {
    "terminal": Term(terminal, ("scores",), keeps="score"),
    "implicit": Term(implicit, ("guide",), needs_if={("placement", "sentence"): ("sentence_ends",)}),
    "shaped": Term(shaped, ("guide",), keeps="zero"),
    "segment": Term(segment, ("segments", "segment_ends")),
    "attention": Term(attention, ("scores", "attention"), keeps="score"),
    "missing_eos": Term(missing_eos),
    "length": Term(length),
    "function": Term(function, ("function",)),
    "http": Term(http, ("http",)),
}

METHODS: dict[str, list[Spec]] = {
    "ppo": [{"type": "terminal"}],
    "rto": [{"type": "implicit"}, {"type": "terminal"}],
    "rto-v1": [{"type": "implicit", "scale": 0.1, "clip": None}],  # Eq. 4.6 of the paper's first version
    "ddpo": [{"type": "implicit", "placement": "end"}, {"type": "terminal"}],
    "dppo": [{"type": "implicit", "scale": 0.1, "clip": None, "placement": "end"}],  # Eq. 5.1 of the first version
    "semi-rto": [{"type": "implicit", "placement": "sentence"}, {"type": "terminal"}],
    "rs-ppo": [{"type": "shaped"}, {"type": "terminal"}],
    "segment-ppo": [{"type": "segment"}],
    "token-ppo": [{"type": "segment"}],
    "bandit-ppo": [{"type": "segment", "layout": "last"}],
    "abc": [{"type": "attention"}],
    "opd": [{"type": "implicit", "scale": 0.01, "clip": None}],  # the default policy.kl.coef: see docs/rewards.md
}

# The entropy cutoff (nats) that a method's segment scorer must have been trained with.
CUTOFFS: dict[str, float | Literal["positive"] | None] = {
    "segment-ppo": "positive",
    "token-ppo": 0.0,
    "bandit-ppo": None,
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
    found: set[str] = set()
    for term in live(terms):
        row = TERMS[term["type"]]
        found.update(row.needs)
        for (option, value), further in row.needs_if.items():
            if term.get(option) == value:
                found.update(further)
    return found


def total(
    terms: list[Spec], signals: Signals, kl_coef: float, estimator: Estimator = "k1"
) -> tuple[Float[Tensor, "B T"], dict[str, Float[Tensor, "B T"]]]:
    """The reward of every token, and each term's part of it by name (``kl`` is the penalty).

    KL is taken against the moving reference where there is one; the terms keep to the frozen one.
    """
    parts: dict[str, Any] = {name: evaluate(term, signals) for name, term in named(terms).items()}
    reference = signals.reference if signals.moving is None else signals.moving
    parts["kl"] = kl_penalty(signals.logprobs, reference, signals.mask, kl_coef, estimator)
    return sum(parts.values()), parts


__all__ = [
    "CUTOFFS",
    "METHODS",
    "TERMS",
    "Term",
    "attention",
    "evaluate",
    "function",
    "http",
    "implicit",
    "kl_penalty",
    "length",
    "live",
    "missing_eos",
    "named",
    "needs",
    "segment",
    "shaped",
    "terminal",
    "total",
]
