"""The length-controlled win rate: closed forms, the condition of the optimum, mirrors, edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from rto.evaluation.length_control import RIDGE, fit, length_controlled, standardised

NAN = math.nan


def logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def games(n: int, seed: int = 0, theta: float = 0.4, slope: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Wins [n] and length differences [n] of a system that is better by theta and whose length pays slope."""
    generator = np.random.default_rng(seed)
    longer = generator.normal(8, 20, n)
    chance = 1 / (1 + np.exp(-theta - slope * np.tanh(longer / 20)))
    return (generator.random(n) < chance).astype(float), longer


def test_answers_of_equal_length_leave_the_win_rate():
    # x = 0: theta solves 3/4 n = n logistic(theta) + RIDGE theta, so logistic(theta) is 0.75 but for the ridge.
    wins = np.array([1.0, 1.0, 1.0, 0.0] * 50)
    found = length_controlled(wins, np.zeros(200), rounds=200)
    theta = math.log(found.win_rate.estimate / (1 - found.win_rate.estimate))
    assert pytest.approx(200 * logistic(theta) + RIDGE * theta, abs=1e-9) == 150
    assert found.win_rate.estimate == pytest.approx(0.75, abs=1e-4)
    assert found.win_rate.low < 0.75 < found.win_rate.high
    assert (found.slope, found.longer, found.n) == (0.0, 0.0, 200)


def test_two_lengths_by_hand():
    # Half the answers longer (9 of 10 won), half shorter (5 of 10 won): x = +-tanh(sqrt(19/20)), so theta is the mean
    # of the two logits, (log 9 + log 1) / 2 = log 3, and the rate 3/4, but for the ridge.
    wins = np.array([1.0] * 9 + [0.0] + [1.0] * 5 + [0.0] * 5)
    differences = np.array([7.0] * 10 + [-7.0] * 10)
    found = length_controlled(wins, differences, rounds=100)
    assert found.win_rate.estimate == pytest.approx(0.75, abs=2e-3)
    assert found.slope == pytest.approx(math.log(9) / 2 / math.tanh(math.sqrt(19 / 20)), abs=2e-2)
    assert found.longer == 0.5


def test_the_scale_is_not_centred_and_has_ddof_one():
    np.testing.assert_allclose(standardised(np.array([1.0, 3.0])), np.tanh([1 / math.sqrt(2), 3 / math.sqrt(2)]))
    np.testing.assert_array_equal(standardised(np.zeros(3)), np.zeros(3))
    assert np.isnan(standardised(np.full(3, 2.0))).all()


def test_newton_finds_what_a_general_minimiser_finds():
    wins, longer = games(150)
    wins[:40] = 0.25  # soft, as of several samples
    x = standardised(longer)
    counts = np.random.default_rng(1).multinomial(150, [1 / 150] * 150, 3).astype(float)

    def loss(b: np.ndarray, weights: np.ndarray) -> float:
        eta = b[0] + b[1] * x
        return float(weights @ (np.logaddexp(0, eta) - wins * eta) + RIDGE / 2 * (b @ b))

    for weights, found in zip(counts, fit(wins, x, counts), strict=True):
        known = minimize(loss, np.zeros(2), args=(weights,), tol=1e-10).x
        np.testing.assert_allclose(found, known, atol=1e-4)
        assert loss(found, weights) <= loss(known, weights) + 1e-9


def test_length_alone_is_taken_out():
    wins, longer = games(4000, theta=0.0, slope=2.0)
    found = length_controlled(wins, longer, rounds=200)
    assert wins.mean() > 0.56
    assert found.win_rate.low < 0.5 < found.win_rate.high
    assert found.slope == pytest.approx(2.0, abs=0.25)


def test_swapping_the_two_systems_mirrors_every_number():
    wins, longer = games(120)
    there, back = length_controlled(wins, longer, rounds=150), length_controlled(1 - wins, -longer, rounds=150)
    assert there.win_rate.estimate + back.win_rate.estimate == pytest.approx(1, abs=1e-12)
    assert there.win_rate.low + back.win_rate.high == pytest.approx(1, abs=1e-9)
    assert there.win_rate.high + back.win_rate.low == pytest.approx(1, abs=1e-9)
    assert there.slope == pytest.approx(back.slope)
    assert there.longer + back.longer == 1


def test_identical_answers_tie():
    found = length_controlled(np.full(20, 0.5), np.zeros(20), rounds=50)
    assert (found.win_rate.estimate, found.win_rate.low, found.win_rate.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_separable_data_stay_finite(scale):
    generator = np.random.default_rng(2)
    longer = generator.normal(0, scale, 60)
    for wins in (np.ones(60), np.zeros(60), (longer > 0).astype(float), (longer < 0).astype(float)):
        found = length_controlled(wins, longer, rounds=100)
        numbers = [found.win_rate.estimate, found.win_rate.low, found.win_rate.high, found.slope]
        assert np.isfinite(numbers).all()
    assert length_controlled(np.ones(100), np.zeros(100), rounds=0).win_rate.estimate == pytest.approx(0.999, abs=1e-3)


def test_what_does_not_allow_a_rate():
    # All longer by the same: nothing tells length from quality.
    for wins, longer in (([1.0, 0.0, 1.0], [5.0] * 3), ([1.0], [0.0]), ([], []), ([NAN, 1.0], [1.0, 2.0])):
        assert math.isnan(length_controlled(wins, longer, rounds=10).win_rate.estimate)
    missing = length_controlled([NAN, 1.0, 0.0, 1.0], [9.0, 1.0, -1.0, 2.0], rounds=10)
    assert missing.n == 3
    assert missing.win_rate == length_controlled([1.0, 0.0, 1.0], [1.0, -1.0, 2.0], rounds=10).win_rate
    no_interval = length_controlled([1.0, 0.0, 1.0], [1.0, -1.0, 2.0], rounds=0).win_rate
    assert no_interval.estimate == missing.win_rate.estimate and math.isnan(no_interval.low)


def test_user_errors():
    with pytest.raises(ValueError, match=r"one number a prompt"):
        length_controlled([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        length_controlled([2.0, 0.0], [1.0, 0.0])
