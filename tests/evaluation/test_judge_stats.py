"""The numbers of a judge: worked by hand, mirrored, and quick."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from rto.evaluation.judge_stats import kappa, pair_statistics
from rto.evaluation.winrate import sign_test, wilson

NAN = math.nan


def mirrored(x):
    """What a's numbers must be when the two systems are swapped."""
    swap = {"a": "b", "b": "a", "a_first": "b_first", "b_first": "a_first", "wins": "losses", "losses": "wins"}
    swap |= {"shorter": "longer", "longer": "shorter"}
    other = {"better": "worse", "worse": "better"}
    out = {}
    for key, value in x.items():
        if key in ("win_rate", "win_rate_without_ties", "mean_score"):
            value = flipped(value)
        elif key == "win_rate_where_a_is":
            value = {swap.get(k, k): {"n": v["n"], **flipped(v)} for k, v in value.items()}
        elif key == "position":
            pass  # says nothing of a or b
        elif key == "verdict":
            value = other.get(value, value)
        elif isinstance(value, dict) and key != "longer_wins":
            value = mirrored(value)
        out[swap.get(key, key)] = value
    return out


def flipped(interval):
    if interval is None or interval["estimate"] is None:
        return interval
    low, high = interval["high"], interval["low"]
    return {
        "estimate": 1 - interval["estimate"],
        "low": None if low is None else 1 - low,
        "high": None if high is None else 1 - high,
    }


def assert_close(x, y):
    assert x.keys() == y.keys()
    for key in x:
        if isinstance(x[key], dict):
            assert_close(x[key], y[key])
        elif isinstance(x[key], float):
            assert x[key] == pytest.approx(y[key], abs=1e-12), key
        else:
            assert x[key] == y[key], key


def test_both_orders_by_hand():
    #            win  loss  first  second  tie  win/tie  identical  lost
    a_first = [1.0, 0.0, 1.0, 0.0, 0.5, 1.0, NAN, NAN]
    b_first = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, NAN, 1.0]
    same = [False] * 6 + [True, False]
    x = pair_statistics(a_first, b_first, same, ([9, 9, 9, 9, 9, 9, 5, 9], [3, 3, 9, 9, 9, 9, 5, 3]), rounds=200)
    assert (x["n"], x["dropped"], x["identical"]) == (7, 1, 1)
    assert (x["wins"], x["ties"], x["losses"]) == (1, 5, 1)
    assert x["win_rate"]["estimate"] == 0.5 and x["p"] == 1.0 and x["verdict"] == "not distinguishable"
    assert x["win_rate_without_ties"] == wilson(1, 2).to_dict()
    assert x["mean_score"]["estimate"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.5 + 0.75 + 0.5) / 7)
    assert x["orders"] == {
        "a_first": {"wins": 3, "ties": 1, "losses": 2},
        "b_first": {"wins": 3, "ties": 2, "losses": 2},
    }
    place = x["position"]
    # First shown won: 3 games with a first, 2 with b first. Second shown: 2 and 3.
    assert (place["first_wins"], place["second_wins"]) == (5, 5) and place["first_share"] == wilson(5, 10).to_dict()
    assert (place["n"], place["both_first"], place["both_second"]) == (6, 1, 1)
    assert place["consistency"] == pytest.approx(4 / 6) and place["agreement"] == 0.5 and place["p"] == 1.0
    # Shares of win, tie, loss: 3/6, 1/6, 2/6 and 2/6, 2/6, 2/6.
    chance = (3 * 2 + 1 * 2 + 2 * 2) / 36
    assert place["kappa"] == pytest.approx((0.5 - chance) / (1 - chance))
    # Lengths differ on two decided prompts: the longer (a) won one of them.
    assert x["length"]["longer_wins"] == {"n": 2, **wilson(1, 2).to_dict()}
    assert x["length"]["a"] == pytest.approx((6 * 9 + 5) / 7)


def test_single_games_by_hand():
    x = pair_statistics([1.0, NAN, NAN, 1.0], [NAN, 0.0, 0.5, NAN], [False] * 4, ([1] * 4, [2] * 4), order="single")
    assert (x["wins"], x["ties"], x["losses"], x["dropped"]) == (2, 1, 1, 0)
    assert x["mean_score"] is None and x["win_rate"]["estimate"] == 2.5 / 4
    assert x["position"] == {
        "first_wins": 3,
        "second_wins": 0,
        "first_share": wilson(3, 3).to_dict(),
        "p": sign_test(3, 0),
    }


def test_a_judge_that_sees_places_only():
    x = pair_statistics([1.0] * 20, [0.0] * 20, [False] * 20, ([1] * 20, [1] * 20))
    assert (x["wins"], x["ties"], x["losses"]) == (0, 20, 0) and x["position"]["consistency"] == 0
    assert x["position"]["p"] == pytest.approx(2 * 0.5**20) and x["position"]["kappa"] == 0.0


def test_a_judge_that_is_sure():
    x = pair_statistics([1.0] * 20, [1.0] * 20, [False] * 20, ([3] * 20, [1] * 20))
    assert x["verdict"] == "better" and x["p"] == pytest.approx(2 * 0.5**20)
    assert x["position"]["kappa"] is None  # chance alone would agree always


def test_kappa_is_that_of_the_definition():
    first, second = np.array([1, 1, 0.5, 0, 0, 1]), np.array([1, 0, 0.5, 0, 1, 1])
    chance = (3 / 6) * (3 / 6) + (1 / 6) ** 2 + (2 / 6) * (2 / 6)
    assert kappa(first, second) == pytest.approx((4 / 6 - chance) / (1 - chance))


@pytest.mark.parametrize("order", ["both", "single"])
def test_swapping_the_systems_mirrors_every_number(order):
    draw = np.random.default_rng(0)
    n = 100  # 99 gaps: divisible by three
    a_first, b_first = (draw.choice([0, 0.5, 1, NAN], n, p=[0.2, 0.2, 0.5, 0.1]) for _ in range(2))
    if order == "single":
        b_first = np.where(np.isnan(a_first), b_first, NAN)
    same = draw.random(n) < 0.1
    long_a, long_b = draw.integers(1, 30, n), draw.integers(1, 30, n)
    x = pair_statistics(a_first, b_first, same, (long_a, long_b), order=order, rounds=500, seed=3)
    y = pair_statistics(1 - b_first, 1 - a_first, same, (long_b, long_a), order=order, rounds=500, seed=3)
    assert_close(mirrored(x), y)


def test_terciles_part_the_prompts_by_length_difference():
    won = [0.0] * 3 + [0.5] * 3 + [1.0] * 3
    x = pair_statistics(won, won, [False] * 9, ([1, 2, 3, 10, 10, 10, 17, 18, 19], [10] * 9))
    thirds = x["length"]["win_rate_where_a_is"]
    assert {name: (third["n"], third["estimate"]) for name, third in thirds.items()} == {
        "shorter": (3, 0.0),
        "similar": (3, 0.5),
        "longer": (3, 1.0),
    }
    equal = pair_statistics(won, won, [False] * 9, ([10] * 9, [10] * 9))["length"]["win_rate_where_a_is"]
    assert (equal["shorter"]["n"], equal["similar"]["n"], equal["longer"]["n"]) == (0, 9, 0)


def test_nothing_judged():
    x = pair_statistics([NAN], [NAN], [False], ([1], [2]))
    assert x["n"] == 0 and x["dropped"] == 1 and x["p"] == 1.0
    assert x["win_rate"] == {"estimate": None, "low": None, "high": None} and x["length"]["a"] is None


def test_wrong_input():
    with pytest.raises(ValueError, match="same prompts"):
        pair_statistics([1.0], [1.0, 0.0], [False], ([1], [1]))
    with pytest.raises(ValueError, match="verdicts are"):
        pair_statistics([2.0], [1.0], [False], ([1], [1]))


def test_ten_thousand_prompts_in_under_five_seconds():
    draw = np.random.default_rng(1)
    n = 10_000
    first, second = (draw.choice([0.0, 0.5, 1.0], n) for _ in range(2))
    lengths = (draw.integers(1, 2000, n), draw.integers(1, 2000, n))
    start = time.process_time()  # the machine may be busy with something else
    x = pair_statistics(first, second, np.zeros(n, bool), lengths, rounds=10_000)
    assert time.process_time() - start < 5
    assert x["win_rate"]["low"] < x["win_rate"]["estimate"] < x["win_rate"]["high"]
