"""The style fit against scipy and scikit-learn on the designs that the released scorings build."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from rto.evaluation.arena_fit import RIDGE, Units, fit, penalty, standardised, win_matrix


def units(models: int = 5, each: int = 80, features: int = 4, seed: int = 0) -> Units:
    generator = np.random.default_rng(seed)
    model = np.repeat(np.arange(models), each)
    z = generator.normal(size=(len(model), features))
    weight = generator.integers(1, 7, len(model)).astype(float)
    chance = expit(generator.normal(size=models)[model] + z @ generator.normal(size=features))
    return Units(model, z, weight, np.floor(2 * weight * chance + generator.random(len(model))) / 2, models)


def test_current_converges_to_scipys_optimum():
    data = units()
    m = data.models

    def loss(beta):
        eta = beta[data.model] + data.z @ beta[m:]
        residual = data.weight * expit(eta) - data.score
        value = (data.weight * np.logaddexp(0, eta) - data.score * eta).sum() + RIDGE * beta @ beta / 2
        gradient = RIDGE * beta
        gradient[:m] += np.bincount(data.model, residual, m)
        gradient[m:] += data.z.T @ residual
        return value, gradient

    theta, gamma = fit(data, penalty("current", m, 4))
    beta = np.concatenate([theta, gamma])
    assert np.abs(loss(beta)[1]).max() < 1e-7
    found = minimize(loss, np.full(m + 4, 0.5), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    assert np.allclose(beta, found.x, atol=1e-5)
    assert loss(beta)[0] <= found.fun + 1e-9


def test_classic_is_scikit_learns_fit_of_the_released_design():
    """Every battle twice, a column of +-ln 10 for each model and the baseline, L2 with C = 1, no intercept."""
    data = units(seed=1)
    m, n = data.models, len(data.model)
    design = np.zeros((n, m + 1 + 4))
    design[np.arange(n), data.model] = math.log(10)
    design[:, m] = -math.log(10)
    design[:, m + 1 :] = data.z
    twice = np.concatenate([design, design])
    labels = np.repeat([1, 0], n)
    weights = 2 * np.concatenate([data.score, data.weight - data.score])
    learned = LogisticRegression(fit_intercept=False, C=1.0, tol=1e-10, max_iter=10_000)
    learned.fit(twice, labels, sample_weight=weights)
    c = learned.coef_[0]
    theta, gamma = fit(data, penalty("classic", m, 4))
    assert np.allclose(theta, math.log(10) * (c[:m] - c[m]), atol=1e-4)
    assert np.allclose(gamma, c[m + 1 :], atol=1e-4)


def test_without_style_the_fit_is_the_log_odds_of_the_mean():
    data = Units(np.array([0, 0, 1]), np.zeros((3, 4)), np.array([4.0, 4.0, 2.0]), np.array([3.0, 3.0, 0.5]), 2)
    theta, gamma = fit(data, penalty("current", 2, 4))
    assert expit(theta) == pytest.approx([0.75, 0.25], abs=1e-6)
    assert gamma.tolist() == [0.0] * 4


def test_units_of_weight_zero_do_not_count_and_the_start_does_not_matter():
    data = units(seed=2)
    full = fit(data, penalty("current", data.models, 4))
    more = Units(
        np.append(data.model, 0), np.vstack([data.z, np.full(4, 9.0)]), np.append(data.weight, 0.0),
        np.append(data.score, 0.0), data.models,
    )  # fmt: skip
    there = fit(more, penalty("current", data.models, 4), start=np.full(data.models + 4, 5.0))
    for a, b in zip(full, there, strict=True):
        assert np.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("scoring", ["current", "classic"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extremes_are_finite(scoring, scale):
    """Separated in every way: all won by the wordy, all lost by the terse."""
    z = np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [-1.0, 0, 0, 0]]) * scale
    data = Units(np.array([0, 1, 1]), z, np.array([6.0, 6.0, 6.0]), np.array([6.0, 6.0, 0.0]), 2)
    theta, gamma = fit(data, penalty(scoring, 2, 4))
    assert np.isfinite(theta).all() and np.isfinite(gamma).all()
    assert theta[0] > 0


def test_standardised_by_hand():
    """Rows 0, 0, 0, 4 (weights 3 and 1): mean 1, sum of squares 3 + 9 = 12, over 3 or over 4."""
    z, weight = np.array([[0.0, 7.0], [4.0, 7.0]]), np.array([3.0, 1.0])
    assert standardised(z, weight, "current") == pytest.approx(np.array([[-1 / 2, 0], [3 / 2, 0]]))
    assert standardised(z, weight, "classic") == pytest.approx(np.array([[-1, 0], [3, 0]]) / math.sqrt(3))
    assert standardised(z, weight, "current", centred=False) == pytest.approx(np.array([[0, 0], [2, 0]]))
    assert standardised(z[:1], weight[:1], "current").tolist() == [[0, 0]]


def test_win_matrix_mirrors_exactly():
    matrix = win_matrix(np.array([0.3, -2.0, 40.0, -700.0]))
    assert np.array_equal(matrix + matrix.T, np.ones((4, 4)))
    assert np.array_equal(np.diag(matrix), np.full(4, 0.5))
    assert matrix[0, 1] == pytest.approx(1 / (1 + math.exp(-2.3)))
