"""Token credit: against scipy, against all pairs, and worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from rto.evaluation.credit import auc, credit_report, rank_correlation


def tokens(seed: int = 0, rows: int = 12, width: int = 9):
    """Predictions and truths with many ties; ragged answers; garbage (NaN) outside the mask."""
    generator = np.random.default_rng(seed)
    true = generator.integers(-1, 2, (rows, width)).astype(float)
    predicted = np.round(true + generator.normal(0, 1.5, true.shape))
    mask = np.arange(width) < generator.integers(4, width + 1, rows)[:, None]
    predicted[~mask] = np.nan
    return predicted, true, mask


def test_rank_correlation_by_hand():
    # Ranks (1, 2, 3) against (1, 3, 2): 1 - 6 (0 + 1 + 1) / (3 * 8) = 1/2; the second answer is reversed: -1.
    predicted = np.array([[1.0, 2.0, 3.0], [5.0, 6.0, 0.0]])
    true = np.array([[10.0, 30.0, 20.0], [2.0, 1.0, 0.0]])
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    rho = rank_correlation(predicted, true, mask)
    assert rho.within == pytest.approx((1 / 2 - 1) / 2)
    assert (rho.answers, rho.skipped) == (2, 0)
    # Pooled ranks (1, 2, 3, 4, 5) against (3, 5, 4, 2, 1): 1 - 6 (4 + 9 + 1 + 4 + 16) / (5 * 24).
    assert rho.pooled == pytest.approx(1 - 6 * 34 / 120)


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation_is_spearmanr(seed):
    predicted, true, mask = tokens(seed)
    rho = rank_correlation(predicted, true, mask)
    assert rho.pooled == pytest.approx(spearmanr(predicted[mask], true[mask]).statistic, abs=1e-12)
    each = [spearmanr(p[m], t[m]).statistic for p, t, m in zip(predicted, true, mask, strict=True)]
    assert rho.within == pytest.approx(np.mean(each), abs=1e-12)
    assert rho.answers == 12


def test_constant_and_empty_answers_are_skipped_and_counted():
    predicted = np.array([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    true = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.3, 0.3, 0.3], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    mask = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]])
    rho = rank_correlation(predicted, true, mask)
    assert (rho.within, rho.answers, rho.skipped) == (pytest.approx(1.0), 1, 4)
    nothing = rank_correlation(predicted, true, np.zeros_like(mask))
    assert math.isnan(nothing.pooled) and math.isnan(nothing.within) and nothing.skipped == 5
    assert math.isnan(rank_correlation(np.full((2, 3), 0.1), true[:2], mask[:2]).pooled)


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_the_mean_over_all_pairs(seed):
    predicted, true, mask = tokens(seed)
    up, down = predicted[mask & (true > 0)], predicted[mask & (true < 0)]
    wins = [(u > d) + 0.5 * (u == d) for u in up for d in down]
    assert auc(predicted, true, mask) == pytest.approx(np.mean(wins), abs=1e-12)


def test_auc_edges():
    true = np.array([[1.0, -1.0, 0.0, 2.0]])
    everything = np.ones((1, 4))
    assert auc(true, true, everything) == 1.0
    assert auc(-true, true, everything) == 0.0
    assert auc(np.zeros((1, 4)), true, everything) == 0.5
    assert auc([[1.0, 1.0, 9.0, 2.0]], true, everything) == 0.75  # one tie, one win
    assert math.isnan(auc(true, np.abs(true), everything))
    assert math.isnan(auc(true, true, np.zeros((1, 4))))


def test_only_ranks_matter():
    predicted, true, mask = tokens()
    stretched = np.exp(3 * predicted) - 7
    assert auc(stretched, true, mask) == auc(predicted, true, mask)
    assert rank_correlation(stretched, true, mask) == rank_correlation(predicted, true, mask)


def test_report_holds_the_statistics_and_is_strict_json():
    predicted, true, mask = tokens(rows=40)
    report = credit_report(predicted, true, mask, seed=3)
    rho = rank_correlation(predicted, true, mask)
    estimates = [report[key]["estimate"] for key in ("spearman", "spearman_within", "auc")]
    assert estimates == [rho.pooled, rho.within, auc(predicted, true, mask)]
    for key in ("spearman", "spearman_within", "auc"):
        assert report[key]["low"] < report[key]["estimate"] < report[key]["high"]
    assert report["tokens"] == mask.sum()
    assert report["positive"] == (mask & (true > 0)).sum()
    assert report["negative"] == (mask & (true < 0)).sum()
    assert (report["rounds"], report["seed"], report["level"]) == (200, 3, 0.95)
    assert report == credit_report(predicted, true, mask, seed=3)
    assert report != credit_report(predicted, true, mask, seed=4)
    json.dumps(report, allow_nan=False)


def test_bootstrap_weights_are_repeated_answers():
    # One round: the interval is the statistic of the answers that this generator draws.
    predicted, true, mask = tokens()
    report = credit_report(predicted, true, mask, rounds=1, seed=5)
    drawn = np.random.default_rng(5).integers(12, size=12)
    rho = rank_correlation(predicted[drawn], true[drawn], mask[drawn])
    assert report["spearman"]["low"] == pytest.approx(rho.pooled, abs=1e-12)
    assert report["spearman_within"]["high"] == pytest.approx(rho.within, abs=1e-12)
    assert report["auc"]["low"] == pytest.approx(auc(predicted[drawn], true[drawn], mask[drawn]), abs=1e-12)


def test_undefined_statistics_are_none():
    true = np.array([[1.0, 2.0], [1.0, 3.0]])
    report = credit_report(true, true, np.ones((2, 2)))
    assert report["auc"] == {"estimate": None, "low": None, "high": None}
    assert report["spearman_within"]["estimate"] == pytest.approx(1.0)
    single = credit_report(true[:1], true[:1], np.ones((1, 2)))
    assert single["spearman"] == {"estimate": pytest.approx(1.0), "low": None, "high": None}


def test_user_errors_name_the_place():
    predicted, true, mask = tokens()
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        auc(predicted[:, :3], true, mask)
    predicted[2, 1] = np.nan
    with pytest.raises(ValueError, match="predicted reward nan in answer 2, token 1"):
        rank_correlation(predicted, true, mask)
    with pytest.raises(ValueError, match="rounds = 0"):
        credit_report(true, true, mask, rounds=0)
