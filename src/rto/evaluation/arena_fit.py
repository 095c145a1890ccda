"""Bradley-Terry against one baseline with shared style coefficients, fitted to convergence.

Shapes: U units (a model on a question), M models, K style features. logit P(model of unit u wins) =
theta[model[u]] + z[u] . gamma. A unit has ``weight`` rows, whose scores (0, 1/2, 1) sum to ``score``: the likelihood
needs no more, so that a fit costs the units and not the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rto.evaluation.arena_style import Scoring

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RIDGE = 1e-6  # a model that wins every row has no finite optimum; this holds it at about 1 - 1e-7 and moves no other
_STEPS, _HALVINGS, _DECREMENT = 200, 40, 1e-11


@dataclass(frozen=True)
class Units:
    """What is fitted: ``model`` [U] in 0..M-1, ``z`` [U, K], ``weight`` [U] > 0 and ``score`` [U] in [0, weight]."""

    model: Ints
    z: Floats
    weight: Floats
    score: Floats
    models: int


def standardised(z: Floats, weight: Floats, scoring: Scoring, centred: bool = True) -> Floats:
    """``z`` [U, K] centred and scaled over all rows of the pool (ddof 1 in current, 0 in classic).

    ``centred=False`` scales only. A feature without spread is 0 everywhere (the released code divides by zero).
    """
    rows = weight.sum()
    mean = weight @ z / rows
    variance = weight @ (z - mean) ** 2 / max(rows - (scoring == "current"), 1.0)
    spread = np.sqrt(variance)
    flat = spread <= 1e-12
    scaled = (z - mean if centred else z) / np.where(flat, 1.0, spread)
    return np.where(flat, 0.0, scaled)


def penalty(scoring: Scoring, models: int, features: int) -> Floats:
    """Matrix P [M + K, M + K] of the penalty 1/2 b'Pb on b = (theta, gamma), for rows counted once.

    current: none (a ridge of 1e-6). classic: scikit-learn's L2 with C = 1 on one coefficient c a model, the baseline
    included, with columns of ln 10, every battle in the data twice. There theta_m = ln 10 (c_m - c_base); at the best
    c_base the penalty on c is (sum theta^2 - (sum theta)^2 / (M + 1)) / (ln 10)^2; twice the data is half the penalty.
    """
    if scoring == "current":
        return RIDGE * np.eye(models + features)
    matrix = np.eye(models + features)
    matrix[:models, :models] = (np.eye(models) - 1 / (models + 1)) / math.log(10) ** 2
    return matrix / 2


def fit(units: Units, penalty: Floats, start: Floats | None = None) -> tuple[Floats, Floats]:
    """theta [M] and gamma [K] that minimise the summed cross-entropy plus 1/2 b'Pb, by damped Newton steps.

    Units of weight 0 do not count. ``start`` [M + K] saves steps and does not change the optimum.
    """
    m, k = units.models, units.z.shape[1]
    assert penalty.shape == (m + k, m + k)
    beta = np.zeros(m + k) if start is None else start.copy()
    there = units.weight > 0  # a resample leaves out a third of the questions
    units = Units(units.model[there], units.z[there], units.weight[there], units.score[there], m)

    def loss(beta: Floats) -> tuple[float, Floats]:
        logit = beta[units.model] + units.z @ beta[m:]
        return float(units.weight @ np.logaddexp(0, logit) - units.score @ logit + beta @ penalty @ beta / 2), logit

    value, logit = loss(beta)
    for _ in range(_STEPS):
        chance = expit(logit)
        residual = units.weight * chance - units.score
        gradient = penalty @ beta
        gradient[:m] += np.bincount(units.model, residual, m)
        gradient[m:] += units.z.T @ residual
        curvature = units.weight * chance * (1 - chance)
        spread = units.z * curvature[:, None]
        hessian = penalty.copy()
        hessian[range(m), range(m)] += np.bincount(units.model, curvature, m)
        for feature in range(k):
            hessian[:m, m + feature] += np.bincount(units.model, spread[:, feature], m)
        hessian[m:, :m] = hessian[:m, m:].T
        hessian[m:, m:] += units.z.T @ spread
        step = np.linalg.solve(hessian, gradient)
        if gradient @ step < _DECREMENT:  # the next loss would differ by rounding only; this step squares the error
            beta = beta - step
            return beta[:m], beta[m:]
        for halving in range(_HALVINGS):
            tried, tried_logit = loss(beta - step / 2**halving)
            if tried < value:
                break
        else:
            return beta[:m], beta[m:]  # no descent is left in float64
        beta, value, logit = beta - step / 2**halving, tried, tried_logit
    raise AssertionError("the style fit did not converge, though its objective is strictly convex")


def win_matrix(theta: Floats) -> Floats:
    """M[a, b] = P(a beats b) = 1 / (1 + e^(theta_b - theta_a)) for strengths [M]; M + M^T = 1, diagonal 1/2."""
    matrix = expit(theta[:, None] - theta[None, :])
    lower = np.tril_indices(len(theta), -1)
    matrix[lower] = 1.0 - matrix.T[lower]  # exactly the complement
    return matrix
