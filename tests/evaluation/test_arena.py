"""Arena-Hard scores: games worked by hand, win rates as means, mirror images, what a pool does to style control."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from rto.evaluation.arena import (
    LABELS,
    MIRRORED,
    Game,
    Judgment,
    game_rows,
    known_label,
    pool_warning,
    score_rows,
    style_controlled,
    win_rates,
)

SCORINGS = ("current", "classic")


def judgment(uid: str, first: str | None, second: str | None, model: str = "m") -> Judgment:
    games = (None if first is None else Game(first), None if second is None else Game(second))
    return Judgment(uid, "hard_prompt", model, "base", "judge", games)


def mirrored(one: Judgment) -> Judgment:
    """The same verdicts with the roles of model and baseline exchanged: game 1 becomes game 2, labels stay."""
    first, second = one.games
    return replace(one, games=(second, first))


def simulated(models: dict[str, float], questions: int, seed: int, wordy: float = 0.0):
    """Judgments and feature rows: the judge sees quality plus ``wordy`` times the log-ratio of lengths."""
    generator = np.random.default_rng(seed)
    names = list(LABELS)
    base = {f"q{i}": (float(n), 3.0, 5.0, 2.0) for i, n in enumerate(generator.integers(200, 900, questions))}
    judgments, features = [], {}
    for index, (name, quality) in enumerate(models.items()):
        for uid, (tokens, *_) in base.items():
            ratio = math.exp(generator.normal(0.3 * index, 0.4))
            features[name, uid] = (
                tokens * ratio,
                *map(float, generator.poisson(math.sqrt(ratio) * np.array([2, 5, 3]))),
            )
            chance = expit(quality + wordy * math.log(ratio))
            labels = []
            for game in (1, 2):
                place = generator.binomial(4, chance if game == 1 else 1 - chance)  # 4: B>>A, the model's in game 1
                labels.append(names[place])
            judgments.append(judgment(uid, *labels, model=name))
    return judgments, features, base


def test_a_game_by_hand():
    assert game_rows("A>B", 2) == [1.0] and game_rows("A>>B", 2) == [1.0] * 3
    assert game_rows("A>B", 1) == [0.0] and game_rows("A>>B", 1) == [0.0] * 3
    assert game_rows("B>>A", 1) == [1.0] * 3 and game_rows("B>A", 2) == [0.0]
    assert game_rows("A=B", 1) == game_rows("A=B", 2) == [0.5]


def test_mirror_spellings_are_labels_of_current_only():
    for spelling, label in MIRRORED.items():
        assert known_label(spelling, "current") == label
        assert known_label(spelling, "classic") is None
    for scoring in SCORINGS:
        assert all(known_label(label, scoring) == label for label in LABELS)
        assert known_label("B", scoring) is None and known_label("A>>>B", scoring) is None
        assert known_label(None, scoring) is None


def test_a_small_set_by_hand():
    """q1: lost strongly, won: 3 zeros and a one. q2: tie and strong win: a half and three ones. q3: won both."""
    rows = score_rows(
        [judgment("q1", "A>>B", "A>B"), judgment("q2", "A=B", "A>>B"), judgment("q3", "B>A", "A>B")], "current"
    )
    assert rows.score.tolist() == [0, 0, 0, 1, 0.5, 1, 1, 1, 1, 1]
    assert rows.question.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    rate = win_rates(rows, "current", rounds=10)["m"]
    assert rate.estimate == pytest.approx((1 + 3.5 + 2) / 10, abs=1e-12)
    tally = rows.tallies["m"]
    assert (tally.questions, tally.counted, tally.null, tally.unknown, tally.dropped) == (3, 6, 0, 0, 0)
    assert dict(tally.labels) == {"strong loss": 1, "win": 3, "tie": 1, "strong win": 1}


def test_null_rules():
    """q1 has no second verdict, q2 a string that is no label, q3 lacks its first game."""
    judgments = [
        replace(judgment("q1", "B>A", None), games=(Game("B>A"), Game(None))),
        judgment("q2", "B", "A>B"),
        judgment("q3", None, "B>>A"),
        judgment("q4", "A=B", "A=B"),
    ]
    current, classic = (score_rows(judgments, scoring) for scoring in SCORINGS)
    assert current.score.tolist() == [0.5, 0.5]
    assert classic.score.tolist() == [1, 1, 0, 0, 0, 0.5, 0.5]
    for rows, counted, dropped in ((current, 2, 3), (classic, 5, 0)):
        tally = rows.tallies["m"]
        assert (tally.null, tally.unknown, tally.counted, tally.dropped) == (2, 1, counted, dropped)


def test_a_model_without_a_verdict_has_no_rate():
    rows = score_rows([judgment("q1", None, None), judgment("q1", "A>B", "A>B", "other")], "current")
    rates = win_rates(rows, "current", rounds=10)
    assert math.isnan(rates["m"].estimate) and math.isnan(rates["m"].questions.low)
    assert rates["other"].estimate == 0.5
    assert math.isnan(rates["other"].questions.low)  # one question has no interval
    same = (100.0, 1.0, 1.0, 1.0)
    controlled = style_controlled(rows, {("m", "q1"): same, ("other", "q1"): same}, {"q1": same}, "current", rounds=3)
    assert math.isnan(controlled.rates["m"].estimate)
    assert controlled.rates["other"].estimate == pytest.approx(0.5)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_raw_rate_is_the_mean_of_its_games_and_the_bradley_terry_rate(scoring):
    judgments, *_ = simulated({"a": 0.4, "b": -0.7}, 60, seed=1)
    rates = win_rates(score_rows(judgments, scoring), scoring, rounds=20)
    for name, rate in rates.items():
        parts = [(LABELS[g.score], i) for j in judgments if j.model == name for i, g in enumerate(j.games)]
        scores = np.array([value if i else 1 - value for (value, _), i in parts])
        weights = np.array([times for (_, times), _ in parts])
        assert rate.estimate == pytest.approx((weights * scores).sum() / weights.sum(), abs=1e-9)

        def loss(theta, weights=weights, scores=scores):
            return (weights * (np.logaddexp(0, theta) - scores * theta)).sum()

        theta = minimize(lambda x: loss(x[0]), [0.0], method="BFGS", options={"gtol": 1e-9}).x[0]
        assert expit(theta) == pytest.approx(rate.estimate, abs=1e-6)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_exchanging_model_and_baseline_mirrors_every_rate(scoring):
    judgments, features, base = simulated({"a": 0.8, "b": -0.2, "c": 0.1}, 40, seed=2, wordy=1.0)
    here = style_controlled(score_rows(judgments, scoring), features, base, scoring, rounds=0)
    raw = win_rates(score_rows(judgments, scoring), scoring, rounds=5)
    # Each model has its own mirror: its answers become the baseline's and the other way round.
    raw_back = win_rates(score_rows([mirrored(j) for j in judgments], scoring), scoring, rounds=5)
    for name, rate in raw.items():
        assert rate.estimate + raw_back[name].estimate == pytest.approx(1, abs=1e-12)
    one = [j for j in judgments if j.model == "a"]
    own = {uid: features["a", uid] for uid in base}
    there = style_controlled(score_rows(one, scoring), features, base, scoring, rounds=0)
    back = [mirrored(j) for j in one]
    back = style_controlled(score_rows(back, scoring), {("a", uid): base[uid] for uid in base}, own, scoring, rounds=0)
    assert there.rates["a"].estimate + back.rates["a"].estimate == pytest.approx(1, abs=1e-9)
    assert np.array_equal(here.matrix + here.matrix.T, np.ones((3, 3)))
    assert here.matrix[0, 1] == pytest.approx(expit(here.strengths["a"] - here.strengths["b"]))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_answers_that_are_the_same_tie(scoring):
    judgments = [judgment(f"q{i}", "A=B", "A=B") for i in range(5)]
    same = {f"q{i}": (100.0, 1.0, 2.0, 3.0) for i in range(5)}
    rows = score_rows(judgments, scoring)
    controlled = style_controlled(rows, {("m", uid): row for uid, row in same.items()}, same, scoring, rounds=5)
    for rate in (win_rates(rows, scoring, rounds=5)["m"], controlled.rates["m"]):
        assert rate.estimate == rate.rows.low == rate.questions.high == 0.5
    assert set(controlled.coefficients.values()) == {0.0}


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_pool_of_one_has_sc_near_wr_and_a_pool_of_many_has_not(scoring):
    """Centring takes the model's own mean style away when it is alone: a fact of the metric, told in a warning."""
    judgments, features, base = simulated(
        {f"m{i}": 0.0 for i in range(6)}, 120, seed=3, wordy=0.5
    )  # m5 is the wordiest by far
    rows = score_rows(judgments, scoring)
    raw = win_rates(rows, scoring, rounds=5)["m5"].estimate
    inside = style_controlled(rows, features, base, scoring, rounds=0).rates["m5"].estimate
    alone = score_rows([j for j in judgments if j.model == "m5"], scoring)
    single = style_controlled(alone, features, base, scoring, rounds=0).rates["m5"].estimate
    uncentred = style_controlled(rows, features, base, scoring, rounds=0, centred=False).rates["m5"].estimate
    assert raw > 0.75
    assert abs(single - raw) < 0.04
    assert inside < raw - 0.05
    assert uncentred < inside  # the baseline is shorter than the pool
    assert uncentred == pytest.approx(0.5, abs=0.1)  # equal quality, length taken out


def test_rows_understate_the_interval_that_questions_give():
    """Both games of a question say the same: the row bootstrap takes them for independent."""
    generator = np.random.default_rng(4)
    judgments = []
    for i in range(200):
        better = generator.random() < 0.6
        judgments.append(judgment(f"q{i}", *(("B>>A", "A>>B") if better else ("A>>B", "B>>A"))))
    rate = win_rates(score_rows(judgments, "classic"), "classic", rounds=2000)["m"]
    width = {name: getattr(rate, name).high - getattr(rate, name).low for name in ("rows", "questions")}
    assert width["questions"] / width["rows"] == pytest.approx(math.sqrt(6), rel=0.1)
    p = rate.estimate
    assert width["questions"] == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 200), rel=0.1)


def test_published_levels_of_the_row_interval():
    judgments, *_ = simulated({"a": 0.3}, 100, seed=5)
    narrow, wide = (win_rates(score_rows(judgments, s), s, rounds=4000)["a"].rows for s in SCORINGS)
    ratio = (narrow.high - narrow.low) / (wide.high - wide.low)
    assert ratio == pytest.approx(1.645 / 1.960, rel=0.06)  # 90 % against 95 %


def test_style_intervals_hold_the_estimate_and_repeat_with_the_seed():
    judgments, features, base = simulated({"a": 0.5, "b": 0.0}, 60, seed=6, wordy=1.0)
    rows = score_rows(judgments, "current")
    first, again = (style_controlled(rows, features, base, "current", rounds=20, seed=7) for _ in range(2))
    other = style_controlled(rows, features, base, "current", rounds=20, seed=8)
    assert first.rates == again.rates != other.rates
    for rate in first.rates.values():
        assert rate.questions.low < rate.estimate < rate.questions.high
        assert rate.rows.low < rate.estimate < rate.rows.high


def test_a_model_that_wins_everything_is_finite():
    judgments, features, base = simulated({"a": 0.0, "b": 0.2}, 30, seed=9)
    judgments += [judgment(f"q{i}", "B>>A", "A>>B", "best") for i in range(30)]
    features |= {("best", f"q{i}"): features["a", f"q{i}"] for i in range(30)}
    rows = score_rows(judgments, "current")
    found = style_controlled(rows, features, base, "current", rounds=10)
    assert 0.9999 < found.rates["best"].estimate < 1
    without = style_controlled(score_rows(judgments[:60], "current"), features, base, "current", rounds=0)
    assert np.isfinite(list(without.strengths.values())).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="no judgments"):
        score_rows([], "current")
    with pytest.raises(ValueError, match="q1 of m is judged twice"):
        score_rows([judgment("q1", "A>B", "A>B")] * 2, "current")
    with pytest.raises(ValueError, match="baselines base, other"):
        score_rows([judgment("q1", "A>B", "A>B"), replace(judgment("q2", "A>B", "A>B"), baseline="other")], "current")
    rows = score_rows([judgment("q1", "A>B", "A>B")], "current")
    with pytest.raises(ValueError, match="no answer of m to question q1"):
        style_controlled(rows, {}, {"q1": (1, 1, 1, 1)}, "current")
    with pytest.raises(ValueError, match="no answer of the baseline to question q1"):
        style_controlled(rows, {("m", "q1"): (1, 1, 1, 1)}, {}, "current")


def test_the_warning_names_the_pool():
    assert "1 model:" in pool_warning(1) and "9 models" in pool_warning(9)
    assert pool_warning(10) is None


def test_ten_thousand_rows_are_quick():
    """2,500 questions of two models: about 15,000 rows. Processor time: the machine may be busy."""
    judgments, features, base = simulated({"a": 0.2, "b": float(logit(0.4))}, 2500, seed=10, wordy=0.5)
    start = time.process_time()
    rows = score_rows(judgments, "current")
    win_rates(rows, "current", rounds=1000)
    style_controlled(rows, features, base, "current", rounds=20)
    assert len(rows.score) > 10_000
    assert time.process_time() - start < 5
