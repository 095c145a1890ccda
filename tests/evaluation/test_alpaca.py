"""AlpacaEval 2: the judge's verdicts by hand, raw metrics by hand, the fit by its stationarity and its symmetries."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from rto.evaluation.alpaca import (
    BASELINE,
    GAMED_WEIGHT,
    STRENGTHS,
    Annotations,
    Difficulty,
    bootstrap_error,
    is_suspicious,
    judge_messages,
    length_controlled,
    order_switched,
    preference_from_text,
    preference_from_top,
    preference_without_judge,
    win_rates,
)

NAN = math.nan


def annotations(preference: list[float], lengths: tuple[list[int], list[int]] | None = None) -> Annotations:
    n = len(preference)
    model, baseline = lengths or ([100] * n, [100] * n)
    return Annotations(np.arange(n), np.array(preference), np.array(model, float), np.array(baseline, float))


def logistic(eta: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-eta))


def world(n: int = 120) -> tuple[Annotations, Difficulty]:
    """A model whose preferences come from known weights, and gamed answers of a baseline without a model effect."""
    generator = np.random.default_rng(0)
    d = generator.normal(0, 1.5, n)
    gap = generator.normal(200, 600, n).round()
    y = logistic(-0.8 * np.tanh(gap / gap.std(ddof=1)) + 0.7 * d + 0.5 + generator.normal(0, 1, n))
    scaled = generator.normal(0, 2, 2 * n)
    share = logistic(-0.8 * np.tanh(scaled) + 0.05 * np.tile(d, 2))
    difficulty = Difficulty(dict(enumerate(d.tolist())), share, scaled, np.tile(d, 2), GAMED_WEIGHT / 2)
    return Annotations(np.arange(n), 1 + y, 2000 - gap, np.full(n, 2000.0)), difficulty


# --- the judge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "preference"),
    [
        ({"m": math.log(0.3), "M": math.log(0.1), " m": -0.1}, 2 - 0.3 / 0.4),  # a token with a space does not count
        ({"m": math.log(0.2)}, 1.0),
        ({"M": -7.0}, 2.0),
        ({"m": -2000.0, "M": -2000.0}, 1.5),  # both probabilities are 0 in floats
        ({"m": -9999.0, "M": 0.0}, 2.0),
        ({"m": 0.0, "M": -math.inf}, 1.0),
    ],
)
def test_the_preference_of_log_probs(top, preference):
    assert preference_from_top(top, switched=False) == pytest.approx(preference, abs=1e-12)
    assert preference_from_top(top, switched=True) == pytest.approx(3 - preference, abs=1e-12)


@pytest.mark.parametrize("top", [None, {}, {" m": -0.1, "Model": -0.2}, {"m": -math.inf}])
def test_no_preference_without_the_two_tokens(top):
    assert math.isnan(preference_from_top(top, switched=False))
    assert math.isnan(preference_from_top(top, switched=True))


def test_the_preference_of_a_text():
    assert [preference_from_text(text, False) for text in ("m", " M\n")] == [1.0, 2.0]
    assert [preference_from_text(text, True) for text in ("m", " M\n")] == [2.0, 1.0]
    for text in (None, "", "both", "mM", "m."):
        assert math.isnan(preference_from_text(text, True))


def test_the_order_depends_on_the_instruction_alone():
    texts = [f"Instruction {number}" for number in range(2000)]
    switched = [order_switched(text) for text in texts]
    assert switched == [random.Random("is_switched_outputs" + text + "0").choices([False, True])[0] for text in texts]
    assert 0.45 < sum(switched) / len(switched) < 0.55
    first = "What are the names of some famous actors that started their careers on Broadway?"
    assert (order_switched(first), order_switched("")) == (True, False)


def test_the_messages_show_the_answers_in_order():
    for switched, order in ((False, ("B{0}", "A{x}")), (True, ("A{x}", "B{0}"))):
        system, user = judge_messages("Say {it}", "B{0}", "A{x}", switched)
        assert [system["role"], user["role"]] == ["system", "user"]
        places = [user["content"].index(text) for text in ("Say {it}", 'name="m"', order[0], 'name="M"', order[1])]
        assert places == sorted(places)


def test_identical_answers_tie_without_a_judge():
    assert preference_without_judge("a", "a") == 1.5
    assert preference_without_judge("a", "a ") is None


# --- raw metrics --------------------------------------------------------------------------------------


def test_raw_metrics_by_hand():
    found = win_rates(annotations([1.0, 1.25, 1.5, 1.75, NAN, 2.0], ([3, 4, 5, 6, 7, 8], [5] * 6)))
    y = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found.win_rate == 50.0
    assert found.standard_error == pytest.approx(100 * math.sqrt(sum((v - 0.5) ** 2 for v in y) / 4 / 5), abs=1e-12)
    assert (found.n_wins, found.n_wins_base, found.n_draws, found.n_total, found.n_missing) == (2, 2, 1, 5, 1)
    assert (found.discrete_win_rate, found.avg_length) == (50.0, 5)  # 33 / 6 characters, cut
    assert found.verdicts == "weighted"


def test_whole_verdicts_are_called_discrete():
    assert win_rates(annotations([1.0, 2.0, 1.5, NAN])).verdicts == "discrete"


def test_one_row_has_no_standard_error_and_no_preference_at_all_is_refused():
    assert math.isnan(win_rates(annotations([2.0])).standard_error)
    with pytest.raises(ValueError, match="no row has a preference"):
        win_rates(annotations([NAN, NAN]))


def test_swapping_the_systems_mirrors_the_raw_metrics():
    found = world()[0]
    mirrored = replace(found, preference=3 - found.preference)
    one, other = win_rates(found), win_rates(mirrored)
    assert one.win_rate + other.win_rate == pytest.approx(100, abs=1e-10)
    assert one.discrete_win_rate + other.discrete_win_rate == pytest.approx(100, abs=1e-10)
    assert one.standard_error == pytest.approx(other.standard_error, abs=1e-10)
    assert (one.n_wins, one.n_wins_base, one.n_draws) == (other.n_wins_base, other.n_wins, other.n_draws)


@pytest.mark.parametrize(
    ("win_rate", "lc", "suspicious"),
    [
        (20, 9.9, True),
        (20, 10, False),
        (20, 40, False),
        (20, 40.1, True),
        (50, 37.4, True),
        (50, 62.5, False),
        (95, 100, False),
    ],
)
def test_the_warning_rule(win_rate, lc, suspicious):
    assert is_suspicious(win_rate, lc) is suspicious


# --- the fit ------------------------------------------------------------------------------------------


def test_the_fit_is_stationary_and_lc_follows_from_its_weights():
    found, difficulty = world()
    lc = length_controlled(found, difficulty)
    assert lc.c in STRENGTHS
    gap = found.len_baseline - found.len_model
    d = np.array([difficulty.of[number] for number in found.index.tolist()])
    own = np.stack([np.tanh(gap / gap.std(ddof=1)), d, np.ones_like(d)], 1)
    gamed = np.stack([np.tanh(difficulty.scaled_gap), difficulty.difficulty, np.zeros_like(difficulty.share)], 1)
    b = np.array([lc.weights.length, lc.weights.difficulty, lc.weights.model])
    # Where |b_j| > 0: C sum_i w_i (y_i - p_i) x_ij = sign(b_j).
    gradient = own.T @ (found.preference - 1 - logistic(own @ b))
    gradient += 0.1 * gamed.T @ (difficulty.share - logistic(gamed @ b))
    np.testing.assert_allclose(gradient, np.sign(b) / lc.c, atol=3e-3)  # 1 / C = 0.046; the solver's tolerance
    p = logistic(b[1] * d + b[2])
    assert lc.win_rate == pytest.approx(100 * p.mean(), abs=1e-9)
    assert lc.standard_error == pytest.approx(100 * p.std(ddof=1) / math.sqrt(len(p)), abs=1e-9)
    assert not lc.suspicious


def test_the_order_of_the_rows_does_not_matter():
    found, difficulty = world()
    order = np.random.default_rng(1).permutation(len(found.index))
    columns = ("index", "preference", "len_model", "len_baseline")
    shuffled = replace(found, **{name: getattr(found, name)[order] for name in columns})
    one, other = length_controlled(found, difficulty), length_controlled(shuffled, difficulty)
    assert (one.c, one.weights) == (other.c, other.weights)
    assert one.win_rate == pytest.approx(other.win_rate, abs=1e-9)


def test_a_row_without_a_preference_is_predicted_but_not_fitted():
    found, difficulty = world()
    missing = found.preference.copy()
    missing[::7] = NAN
    lc = length_controlled(replace(found, preference=missing), difficulty)
    d = np.array(list(difficulty.of.values()))
    assert lc.win_rate == pytest.approx(100 * logistic(lc.weights.difficulty * d + lc.weights.model).mean(), abs=1e-9)
    values = missing.copy()
    values[::7] = found.preference[::7]  # the fit is another one than with them
    assert lc.weights != length_controlled(replace(found, preference=values), difficulty).weights


def test_identical_answers_give_fifty():
    _, difficulty = world()
    same = annotations([1.5] * len(difficulty.of))
    lc = length_controlled(same, difficulty)
    assert (lc.win_rate, lc.standard_error, lc.c, lc.suspicious) == (50.0, 0.0, None, False)
    assert bootstrap_error(same, difficulty, lc.c, rounds=2) == 0.0
    assert win_rates(same).n_draws == len(difficulty.of)


def test_one_length_gap_everywhere_is_finite():
    found, difficulty = world()
    lc = length_controlled(replace(found, len_model=np.full(len(found.index), 1500.0)), difficulty)
    assert math.isfinite(lc.win_rate) and math.isfinite(lc.standard_error)


@pytest.mark.parametrize(("preference", "low", "high"), [(1.0, 0, 1), (2.0, 99, 100)])
def test_a_model_that_always_loses_or_wins_has_finite_weights(preference, low, high):
    found, difficulty = world()
    lc = length_controlled(replace(found, preference=np.full(len(found.index), preference)), difficulty)
    assert low <= lc.win_rate <= high
    assert abs(lc.weights.model) < 50


def test_longer_answers_of_the_same_quality_win_less_under_length_control():
    found, difficulty = world()
    raw, lc = win_rates(found), length_controlled(found, difficulty)
    longer = replace(found, len_model=found.len_model + 2000 * (found.preference > 1.6))
    assert length_controlled(longer, difficulty).win_rate < lc.win_rate
    assert win_rates(longer).win_rate == raw.win_rate


def test_the_fit_leaves_sklearn_as_it_is():
    import sklearn

    before = sklearn.get_config()
    length_controlled(*world())
    assert sklearn.get_config() == before


def test_the_bootstrap_is_seeded():
    found, difficulty = world()
    lc = length_controlled(found, difficulty)
    one, same, other = (bootstrap_error(found, difficulty, lc.c, rounds=30, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert one > 0
    with pytest.raises(ValueError, match="rounds = 1"):
        bootstrap_error(found, difficulty, lc.c, rounds=1)


def test_what_has_no_length_controlled_win_rate_is_refused():
    found, difficulty = world()
    half = {name: getattr(found, name)[::2] for name in ("index", "preference", "len_model", "len_baseline")}
    assert math.isfinite(length_controlled(replace(found, **half), difficulty).win_rate)  # known by index
    for change, message in (
        ({**half, "indexed_by": "position"}, "60 rows, but 120 instructions have a difficulty"),
        ({"index": found.index + 1}, "1 instructions have no difficulty, the first is index 120"),
        ({"baseline": "text_davinci_003"}, "the baseline .* is 'text_davinci_003'"),
        ({"preference": np.where(found.index == 3, found.preference, NAN)}, "1 row has a preference"),
    ):
        with pytest.raises(ValueError, match=message):
            length_controlled(replace(found, **change), difficulty)
    assert length_controlled(replace(found, baseline=BASELINE), difficulty).c is not None
