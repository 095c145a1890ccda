"""How well token rewards find the known true token rewards: rank agreement, not scale.

Shapes: ``predicted``, ``true`` and ``mask`` are numpy [B, T], B answers, T response tokens. Only tokens under
the mask count. A statistic that the data leave undefined is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from rto.evaluation.winrate import percentile_interval, without_nan

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho. ``pooled``: over all tokens of all answers. ``within``: the mean over answers of rho
    inside the answer, from ``answers`` answers; the ``skipped`` ones have a constant prediction or truth.
    """

    pooled: float
    within: float
    answers: int
    skipped: int


def rank_correlation(predicted: ArrayLike, true: ArrayLike, mask: ArrayLike) -> RankCorrelation:
    """Spearman's rank correlation (ties: midranks) of predicted and true token rewards.

    Raises ValueError for unequal shapes and for values under the mask that are not finite.
    """
    p, t, m = _checked(predicted, true, mask)
    within = _within(p, t, m)
    defined = ~np.isnan(within)
    pooled = _spearman(_codes(p[m]), _codes(t[m]), np.ones(int(m.sum())))
    return RankCorrelation(pooled, _weighted_mean(within, np.ones(len(p))), int(defined.sum()), int((~defined).sum()))


def auc(predicted: ArrayLike, true: ArrayLike, mask: ArrayLike) -> float:
    """Probability that a token with true reward > 0 is predicted higher than one with true reward < 0.

    Ties count one half (Mann-Whitney U over all such pairs, divided by their number). Tokens with true
    reward 0 are left out. NaN when one of the two classes is empty. Raises as :func:`rank_correlation`.
    """
    p, t, m = _checked(predicted, true, mask)
    signed = m & (t != 0)
    return _auc(_codes(p[signed]), t[signed] > 0, np.ones(int(signed.sum())))


def credit_report(
    predicted: ArrayLike,
    true: ArrayLike,
    mask: ArrayLike,
    *,
    rounds: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """All of the above with percentile bootstrap intervals over answers, ready for JSON (NaN becomes None).

    Keys: ``spearman``, ``spearman_within`` and ``auc``, each {estimate, low, high}; the counts ``tokens``,
    ``positive``, ``negative`` (by true reward), ``answers`` (that ``spearman_within`` averages), ``skipped``;
    and ``rounds``, ``seed``, ``level``.
    """
    p, t, m = _checked(predicted, true, mask)
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: a bootstrap needs at least one")
    rho = rank_correlation(p, t, m)
    estimates = {"spearman": rho.pooled, "spearman_within": rho.within, "auc": auc(p, t, m)}

    # An answer drawn k times weighs k: the tokens are ordered once and only their weights change.
    answer = np.broadcast_to(np.arange(len(p))[:, None], m.shape)
    signed = m & (t != 0)
    pooled = (_codes(p[m]), _codes(t[m]))
    ranked, positive = _codes(p[signed]), t[signed] > 0
    within = _within(p, t, m)
    generator = np.random.default_rng(seed)
    draws = np.empty((rounds, 3))
    for row in draws:
        times = np.bincount(generator.integers(len(p), size=len(p)), minlength=len(p)).astype(np.float64)
        row[0] = _spearman(*pooled, times[answer[m]])
        row[1] = _weighted_mean(within, times)
        row[2] = _auc(ranked, positive, times[answer[signed]])
    if int(m.any(1).sum()) < 2:
        draws[:] = math.nan  # one answer resamples to itself: an interval of width 0 would claim certainty

    intervals = {
        name: percentile_interval(estimate, drawn, level).to_dict()
        for (name, estimate), drawn in zip(estimates.items(), draws.T, strict=True)
    }
    counts = {"tokens": int(m.sum()), "positive": int(positive.sum()), "negative": int((~positive).sum())}
    rest = {"answers": rho.answers, "skipped": rho.skipped, "rounds": rounds, "seed": seed, "level": level}
    return without_nan({**intervals, **counts, **rest})


def _codes(values: Floats) -> Codes:
    """Dense ranks from 0: equal values share a code, and codes order like the values."""
    return np.asarray(rankdata(values, method="dense"), dtype=np.int64) - 1


def _midranks(codes: Codes, weights: Floats) -> Floats:
    """Rank of each token when token i occurs ``weights[i]`` times; ties share their mean rank."""
    count = np.bincount(codes, weights=weights)
    return (np.cumsum(count) - (count - 1) / 2)[codes]


def _spearman(p: Codes, t: Codes, weights: Floats) -> float:
    """Pearson correlation of the midranks; NaN when one side is constant or nothing is there."""
    total = weights.sum()
    if total == 0:
        return math.nan
    x, y = _midranks(p, weights), _midranks(t, weights)
    x, y = x - (total + 1) / 2, y - (total + 1) / 2  # midranks have this mean: constants centre to exactly 0
    scale = math.sqrt((weights * x * x).sum()) * math.sqrt((weights * y * y).sum())
    return float((weights * x * y).sum() / scale) if scale > 0 else math.nan


def _auc(codes: Codes, positive: NDArray[np.bool_], weights: Floats) -> float:
    ups, downs = float(weights[positive].sum()), float(weights[~positive].sum())
    if ups == 0 or downs == 0:
        return math.nan
    rank_sum = float((weights * _midranks(codes, weights))[positive].sum())
    return (rank_sum - ups * (ups + 1) / 2) / (ups * downs)


def _within(p: Floats, t: Floats, m: NDArray[np.bool_]) -> Floats:
    """Spearman's rho inside each answer [B]; NaN where prediction or truth is constant."""
    n = m.sum(1, keepdims=True)

    def centred(values: Floats) -> Floats:
        # Masked tokens rank last and so leave the ranks of the others as they are.
        return np.where(m, rankdata(np.where(m, values, np.inf), axis=1) - (n + 1) / 2, 0.0)

    x, y = centred(p), centred(t)
    scale = np.sqrt((x * x).sum(1)) * np.sqrt((y * y).sum(1))
    return np.divide((x * y).sum(1), scale, out=np.full(len(p), np.nan), where=scale > 0)


def _weighted_mean(values: Floats, weights: Floats) -> float:
    """Mean over the values that are not NaN."""
    defined = ~np.isnan(values)
    total = float(weights[defined].sum())
    return float((weights[defined] * values[defined]).sum()) / total if total > 0 else math.nan


def _checked(predicted: ArrayLike, true: ArrayLike, mask: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    p, t = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    m = np.asarray(mask, dtype=bool)
    if p.ndim != 2 or p.shape != t.shape or p.shape != m.shape or p.size == 0:
        raise ValueError(f"predicted {p.shape}, true {t.shape} and mask {m.shape}: give three arrays [B, T], not empty")
    for name, values in (("predicted", p), ("true", t)):
        bad = np.argwhere(m & ~np.isfinite(values))
        if len(bad):
            row, token = bad[0].tolist()
            raise ValueError(f"{name} reward {values[row, token]} in answer {row}, token {token}: mask it out")
    return p, t, m
