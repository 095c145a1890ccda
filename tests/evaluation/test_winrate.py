"""Comparisons: matrices worked by hand, mirror symmetry, published examples, coverage."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from scipy import stats

from rto.evaluation.winrate import (
    Interval,
    across_seeds,
    compare,
    holm,
    paired_bootstrap,
    seed_interval,
    sign_test,
    wilson,
    win_matrix,
    win_probability,
)

NAN = math.nan


def policies(samples: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shape = (60, samples)
    return {
        name: np.round(generator.normal(mean, 1, shape), 1) for name, mean in zip("abc", (0, 0.1, 0.8), strict=True)
    }


# --- win rates ----------------------------------------------------------------------------------------


def test_win_probability_counts_all_pairs_of_samples():
    # Prompt 0: (1, 3) against (1, 2, 5): tie, loss, loss, win, win, loss = (2 + 1/2) / 6.
    a = [[1.0, 3.0], [4.0, 4.0], [1.0, 1.0]]
    b = [[1.0, 2.0, 5.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]
    assert win_probability(a, b).tolist() == [2.5 / 6, 1.0, 0.5]


def test_win_probability_of_missing_samples_is_missing():
    result = win_probability([1.0, NAN, 2.0], [[0.0, 0.0], [0.0, 0.0], [0.0, NAN]])
    np.testing.assert_array_equal(result, [1.0, NAN, NAN])


def test_win_matrix_by_hand():
    scores = {"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 1.0, 4.0, 5.0], "c": [0.0, 2.0, 3.0, NAN]}
    expected = [
        [1 / 2, (0.5 + 1 + 0 + 0) / 4, (1 + 0.5 + 0.5) / 3],
        [(0.5 + 0 + 1 + 1) / 4, 1 / 2, (1 + 0 + 1) / 3],
        [(0 + 0.5 + 0.5) / 3, (0 + 1 + 0) / 3, 1 / 2],
    ]
    np.testing.assert_allclose(win_matrix(scores, ["a", "b", "c"]), expected, atol=1e-15)
    assert win_matrix(scores, ["b", "a"])[0, 1] == 2.5 / 4


@pytest.mark.parametrize("samples", [1, 3])
def test_win_matrix_and_its_transpose_sum_to_one(samples):
    matrix = win_matrix(policies(samples), list("abc"))
    np.testing.assert_array_equal(matrix + matrix.T, np.ones((3, 3)))
    np.testing.assert_array_equal(np.diag(matrix), [0.5] * 3)


# --- bootstrap ----------------------------------------------------------------------------------------


def test_bootstrap_of_two_prompts_by_hand():
    # Means of 0 and 1 drawn twice: 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    assert paired_bootstrap([0.0, 1.0], 2000, 0) == Interval(0.5, 0.0, 1.0)
    assert paired_bootstrap([0.0, 1.0], 2000, 0, level=0.4) == Interval(0.5, 0.5, 0.5)


def test_bootstrap_matches_the_normal_interval_on_a_large_sample():
    values = np.random.default_rng(1).normal(0.3, 2, 2000)
    interval = paired_bootstrap(values, 4000, 0)
    error = values.std() / math.sqrt(2000)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_is_seeded():
    values = np.random.default_rng(2).normal(size=50)
    assert paired_bootstrap(values, 500, 7) == paired_bootstrap(values, 500, 7)
    assert paired_bootstrap(values, 500, 7) != paired_bootstrap(values, 500, 8)


def test_bootstrap_with_too_few_prompts_gives_no_interval():
    for values, estimate in (([2.0], 2.0), ([2.0, NAN], 2.0), ([NAN, NAN], NAN)):
        np.testing.assert_equal(paired_bootstrap(values, 100, 0), Interval(estimate, NAN, NAN))


def test_bootstrap_of_missing_differences():
    # Some resamples of these rows hold no value at all: they are left out, not counted as 0.
    assert paired_bootstrap([3.0, 3.0, NAN, NAN, NAN], 500, 0) == Interval(3.0, 3.0, 3.0)


def test_bootstrap_of_ten_thousand_prompts_is_fast():
    values = np.random.default_rng(3).normal(size=10_000)
    start = time.process_time()
    paired_bootstrap(values, 10_000, 0)
    assert time.process_time() - start < 5


def test_bootstrap_covers_the_truth():
    generator = np.random.default_rng(4)
    true, hits = 0.5, 0
    for draw in range(300):
        skill = generator.normal(0, 3, 200)  # shared by both answers to a prompt: pairing takes it out
        a = skill + true - 1 + generator.exponential(1, 200)
        interval = paired_bootstrap(a - skill, 400, draw)
        hits += interval.low <= true <= interval.high
    assert 0.91 <= hits / 300 <= 0.98


# --- tests and intervals in closed form ---------------------------------------------------------------


def test_sign_test_by_hand():
    assert sign_test(5, 0) == pytest.approx(2 / 2**5)
    assert sign_test(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert sign_test(4, 4) == 1.0
    assert sign_test(0, 0) == 1.0


def test_holm_by_hand():
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1 = .02, .03, .06, .04, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_wilson_by_hand():
    # 8 of 10 with z = 1.959964: centre (0.8 + z^2/20) / (1 + z^2/10) = 0.71674, half width 0.22659.
    interval = wilson(8, 10)
    assert interval.estimate == 0.8
    assert (interval.low, interval.high) == (pytest.approx(0.49015, abs=1e-4), pytest.approx(0.94333, abs=1e-4))
    known = stats.binomtest(8, 10).proportion_ci(0.9, method="wilson")
    assert (wilson(8, 10, 0.9).low, wilson(8, 10, 0.9).high) == (pytest.approx(known.low), pytest.approx(known.high))


def test_wilson_edges():
    assert wilson(0, 5).low == 0.0 and wilson(0, 5).high == pytest.approx(1.96**2 / (5 + 1.96**2), abs=1e-4)
    assert wilson(5, 5).high == 1.0
    np.testing.assert_equal(wilson(0, 0), Interval(NAN, 0.0, 1.0))
    with pytest.raises(ValueError, match="between 0 and n = 5"):
        wilson(6, 5)
    with pytest.raises(ValueError, match="0.95 means 95 %"):
        wilson(1, 5, 95)


def test_seed_interval_by_hand():
    # Mean 2, standard deviation 1, three seeds, t(0.975; 2) = 4.302653.
    interval = seed_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-6)
    assert across_seeds([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == interval
    known = stats.ttest_rel([1.0, 2.5, 3.0, 3.2], [0.5, 2.6, 2.0, 2.1]).confidence_interval(0.9)
    found = across_seeds([1.0, 2.5, 3.0, 3.2], [0.5, 2.6, 2.0, 2.1], 0.9)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, NAN]])
def test_seed_interval_needs_two_seeds(differences):
    with pytest.raises(ValueError, match="two or more"):
        seed_interval(differences)


def test_across_seeds_needs_the_same_seeds():
    with pytest.raises(ValueError, match="same seeds"):
        across_seeds([1.0, 2.0], [1.0])


# --- the comparison -----------------------------------------------------------------------------------


def test_compare_by_hand():
    scores = {"a": [1.0, 2.0, 3.0, 4.0, NAN], "b": [1.0, 1.0, 4.0, 1.0, 9.0]}
    lengths = {"a": [10.0, 20.0, 30.0, 40.0, NAN], "b": [1.0, 2.0, 3.0, 4.0, 5.0]}
    result = compare(scores, rounds=500, seed=1, lengths=lengths, kls={"a": [0.5] * 5})
    a, b = result.policies
    assert (a.name, a.score.estimate, a.n, a.missing, a.length, a.kl) == ("a", 2.5, 4, 1, 25.0, 0.5)
    assert (b.name, b.score.estimate, b.n, b.missing, b.length, b.kl) == ("b", 3.2, 5, 0, 3.0, None)
    pair = result.pair("a", "b")
    assert (pair.wins, pair.ties, pair.losses, pair.n, pair.missing) == (2, 1, 1, 4, 1)
    assert pair.win_rate.estimate == 2.5 / 4
    assert pair.difference.estimate == (0 + 1 - 1 + 3) / 4
    assert (pair.p, pair.p_holm, pair.verdict) == (1.0, 1.0, "not distinguishable")


def test_compare_shares_one_set_of_resamples():
    scores = policies(2)
    scores["a"][3, 1] = NAN
    result = compare(scores, rounds=300, seed=5)
    for x, y in (("a", "b"), ("b", "c")):
        alone = paired_bootstrap(scores[x].mean(1) - scores[y].mean(1), 300, 5)
        assert vars(result.pair(x, y).difference) == pytest.approx(vars(alone))
        chance = paired_bootstrap(win_probability(scores[x], scores[y]), 300, 5)
        assert vars(result.pair(x, y).win_rate) == pytest.approx(vars(chance))


def test_compare_agrees_with_the_matrix_and_finds_the_better_policy():
    scores = policies(2)
    result = compare(scores, rounds=500)
    matrix = win_matrix(scores, list("abc"))
    for i, x in enumerate("abc"):
        for j, y in enumerate("abc"):
            if i != j:
                assert result.pair(x, y).win_rate.estimate == pytest.approx(matrix[i, j], abs=1e-15)
    assert result.pair("c", "a").verdict == "better"
    assert result.pair("a", "c").verdict == "worse"
    assert result.pair("a", "b").verdict == "not distinguishable"


@pytest.mark.parametrize("samples", [1, 3])
def test_swapping_two_systems_mirrors_every_number(samples):
    scores = policies(samples)
    scores["b"][7] = NAN
    there = compare(scores, rounds=300)
    back = compare(dict(reversed(scores.items())), rounds=300)
    other = {"better": "worse", "worse": "better", "not distinguishable": "not distinguishable"}
    for x, y in (("a", "b"), ("a", "c"), ("b", "c")):
        forward = there.pair(x, y)
        for mirror in (there.pair(y, x), back.pair(y, x)):
            assert (mirror.wins, mirror.ties, mirror.losses) == (forward.losses, forward.ties, forward.wins)
            assert (mirror.n, mirror.missing, mirror.p) == (forward.n, forward.missing, forward.p)
            assert mirror.p_holm == pytest.approx(forward.p_holm)
            assert mirror.verdict == other[forward.verdict]
            gap, win = forward.difference, forward.win_rate
            assert vars(mirror.difference) == pytest.approx(vars(Interval(-gap.estimate, -gap.high, -gap.low)))
            assert vars(mirror.win_rate) == pytest.approx(vars(Interval(1 - win.estimate, 1 - win.high, 1 - win.low)))


def test_identical_answers_tie():
    pair = compare({"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}, rounds=200).pair("x", "y")
    assert pair.win_rate == Interval(0.5, 0.5, 0.5)
    assert pair.difference == Interval(0.0, 0.0, 0.0)
    assert (pair.wins, pair.ties, pair.losses, pair.p) == (0, 3, 0, 1.0)
    assert pair.verdict == "not distinguishable"


def test_holm_runs_over_unordered_pairs():
    result = compare(policies(), rounds=200)
    ps = [result.pair(*pair).p for pair in ("ab", "ac", "bc")]
    assert [result.pair(*pair).p_holm for pair in ("ab", "ac", "bc")] == pytest.approx(list(holm(ps)))
    assert len(result.pairs) == 6


def test_pair_without_common_prompts():
    result = compare({"x": [1.0, 2.0, NAN, NAN], "y": [NAN, NAN, 1.0, 2.0]}, rounds=200)
    pair = result.pair("x", "y")
    assert math.isnan(pair.win_rate.estimate) and math.isnan(pair.difference.low)
    assert (pair.n, pair.missing, pair.p, pair.verdict) == (0, 4, 1.0, "not distinguishable")
    assert result.to_dict()["pairs"][0]["win_rate"] == {"estimate": None, "low": None, "high": None}


def test_to_dict_is_strict_json():
    result = compare(policies(2), rounds=200, seed=3, lengths={"a": np.ones((60, 2))})
    table = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert table == result.to_dict()
    assert (table["names"], table["rounds"], table["seed"], table["level"]) == (["a", "b", "c"], 200, 3, 0.95)
    assert table["policies"][0]["length"] == 1.0
    assert table["pairs"][0]["difference"]["low"] == result.pair("a", "b").difference.low


def test_user_errors_name_the_policy():
    with pytest.raises(ValueError, match="'x': 2, 'y': 1"):
        compare({"x": [1.0, 2.0], "y": [1.0]})
    with pytest.raises(ValueError, match="scores of y are infinite at prompt 1"):
        compare({"x": [1.0, 2.0], "y": [1.0, math.inf]})
    with pytest.raises(ValueError, match="lengths of 'z'"):
        compare({"x": [1.0, 2.0]}, rounds=100, lengths={"z": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"kls of x: 1 prompts"):
        compare({"x": [1.0, 2.0]}, rounds=100, kls={"x": [1.0]})
    with pytest.raises(ValueError, match="no scores of z"):
        win_matrix({"x": [1.0]}, ["x", "z"])
    with pytest.raises(ValueError, match="no pair 'x' against 'z'"):
        compare({"x": [1.0, 2.0]}, rounds=100).pair("x", "z")
    with pytest.raises(ValueError, match="0 rounds"):
        paired_bootstrap([1.0, 2.0], 0, 0)
    with pytest.raises(ValueError, match="0 prompts"):
        paired_bootstrap([], 100, 0)
    with pytest.raises(ValueError, match="score the same prompts"):
        win_probability([1.0], [1.0, 2.0])
