"""Arena-Hard scores from judged games: raw win rates (WR) and style-controlled win rates (SC) against one baseline.

Two scorings, ``current`` (v2.0, since April 2025) and ``classic`` (v0.1, to March 2025); docs/arena.md says where they
differ and what is done otherwise here. Rates are in [0, 1], from the model's side. A row is one entry of a game's
score: a strong verdict is three rows. Questions are the unit of the honest interval, rows that of the published one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rto.evaluation.arena_fit import Units, fit, penalty, standardised, win_matrix
from rto.evaluation.arena_style import FEATURES, Scoring, style_difference
from rto.evaluation.winrate import Interval, percentile_interval
from rto.seeds import derive

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STRONG = 3  # rows of a strong verdict
# Verdict -> (score, rows) of the answer that was shown as A.
LABELS = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, STRONG)}
MIRRORED = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}  # current reads these too
PUBLISHED_LEVEL: dict[Scoring, float] = {"current": 0.90, "classic": 0.95}
SMALL_POOL = 10


@dataclass(frozen=True)
class Game:
    """One verdict. ``score`` is the label that was read from ``text``, None where there was none."""

    score: str | None
    text: str = ""
    prompt: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Judgment:
    """One question of one model: game 1 showed the baseline as A, game 2 the model. None: the game is missing.

    ``endpoint`` and ``time`` (UTC) of the judging are "" where the file does not say.
    """

    uid: str
    category: str
    model: str
    baseline: str
    judge: str
    games: tuple[Game | None, Game | None]
    endpoint: str = ""
    time: str = ""


@dataclass
class Tally:
    """What became of a model's games. ``null``: no verdict; ``unknown``: a string that is no label of the scoring."""

    questions: int = 0
    counted: int = 0
    null: int = 0
    unknown: int = 0
    dropped: int = 0  # questions without a row
    labels: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Rows:
    """All rows of a pool: ``model`` [n] and ``question`` [n] are indices, ``score`` [n] is 0, 1/2 or 1."""

    models: tuple[str, ...]
    questions: tuple[str, ...]
    model: Ints
    question: Ints
    score: Floats
    tallies: dict[str, Tally]


@dataclass(frozen=True)
class Rate:
    """A win rate with the interval of a bootstrap over rows (published level) and one over questions (95 %)."""

    estimate: float
    rows: Interval
    questions: Interval


@dataclass(frozen=True)
class StyleControl:
    """Rates a model, strengths theta (baseline 0), one coefficient a style feature, and M[a, b] between models."""

    rates: dict[str, Rate]
    strengths: dict[str, float]
    coefficients: dict[str, float]
    matrix: Floats


def known_label(score: str | None, scoring: Scoring) -> str | None:
    """The label that a stored score means to a scoring; None for none and for a string that is no label of it."""
    if score is None:
        return None
    if scoring == "current":
        score = MIRRORED.get(score, score)
    return score if score in LABELS else None


def game_rows(label: str, game: int) -> list[float]:
    """Scores from the model's side, three for a strong verdict. Game 1 shows the baseline as A, game 2 the model."""
    score, times = LABELS[label]
    return [score if game == 2 else 1.0 - score] * times


def score_rows(judgments: Sequence[Judgment], scoring: Scoring) -> Rows:
    """Games to rows. current drops a question when either game has no label, classic drops that game alone.

    Raises ValueError for no judgments, a question judged twice for a model, and several baselines or judges.
    """
    if not judgments:
        raise ValueError("no judgments: nothing can be scored")
    for what, names in (
        ("baselines", {j.baseline for j in judgments}),
        ("judges", {j.judge for j in judgments}),
    ):
        if len(names) > 1:
            raise ValueError(f"{what} {', '.join(sorted(names))}: scores hold for one of them, score them apart")
    models = tuple(dict.fromkeys(j.model for j in judgments))
    questions = tuple(dict.fromkeys(j.uid for j in judgments))
    place, order = {uid: i for i, uid in enumerate(questions)}, {name: i for i, name in enumerate(models)}
    tallies = {name: Tally() for name in models}
    seen: set[tuple[str, str]] = set()
    found: list[tuple[int, int, float]] = []
    for judgment in judgments:
        if (judgment.model, judgment.uid) in seen:
            raise ValueError(f"question {judgment.uid} of {judgment.model} is judged twice: remove one of the rows")
        seen.add((judgment.model, judgment.uid))
        tally = tallies[judgment.model]
        labels = [known_label(game.score if game else None, scoring) for game in judgment.games]
        tally.questions += 1
        for game, label in zip(judgment.games, labels, strict=True):
            tally.null += game is None or game.score is None
            tally.unknown += label is None and game is not None and game.score is not None
        if scoring == "current" and None in labels:
            labels = [None, None]
        scores = []
        for number, label in enumerate(labels, start=1):
            if label is not None:
                entries = game_rows(label, number)
                scores += entries
                tally.counted += 1
                tally.labels[_outcome(entries)] += 1
        tally.dropped += not scores
        found += [(order[judgment.model], place[judgment.uid], score) for score in scores]
    model, question, score = (np.array([row[i] for row in found]) for i in range(3))
    return Rows(models, questions, model.astype(np.int64), question.astype(np.int64), score.astype(float), tallies)


def win_rates(rows: Rows, scoring: Scoring, rounds: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, Rate]:
    """WR: the mean of a model's rows, which is the Bradley-Terry win rate too since there is one opponent.

    Intervals: a bootstrap over the model's rows at the published level, and one over questions at ``level``, in which
    all rows of a question stay together. A model without a row has no rate (NaN).
    """
    drawn = _question_draws(rows, rounds, seed)
    rates = {}
    for index, name in enumerate(rows.models):
        mine = rows.model == index
        score, question = rows.score[mine], rows.question[mine]
        estimate = float(score.mean()) if score.size else math.nan
        values, counts = np.unique(score, return_counts=True)
        generator = np.random.default_rng(derive(seed, "arena", "rows", name))
        # Rows are 0, 1/2 or 1: drawing n of them is one multinomial draw of three counts.
        size = max(score.size, 1)
        means = generator.multinomial(size, counts / size, rounds) @ values / size if score.size else score
        n = len(rows.questions)
        sums, sizes = np.bincount(question, score, n), np.bincount(question, minlength=n)
        by_question = _ratio(drawn @ sums, drawn @ sizes.astype(float))
        rates[name] = _rate(estimate, means, by_question, np.unique(question).size, scoring, level)
    return rates


def style_controlled(
    rows: Rows,
    features: Mapping[tuple[str, str], Sequence[float]],
    baseline: Mapping[str, Sequence[float]],
    scoring: Scoring,
    rounds: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    centred: bool = True,
) -> StyleControl:
    """SC: win rates at equal style, from one fit of all models of the pool.

    ``features[model, uid]`` and ``baseline[uid]`` are (tokens, headers, lists, bold) of the answers. With
    ``centred=False`` equal style means the baseline's own and not the pool's mean: another number, never SC. No
    ``rounds`` means no intervals.
    Raises ValueError naming the model and question whose answer has no features.
    """
    n = len(rows.questions)
    unit_ids, unit = np.unique(rows.model * n + rows.question, return_inverse=True)
    model, question = unit_ids // n, unit_ids % n
    weight, score = np.bincount(unit).astype(np.float64), np.bincount(unit, rows.score).astype(np.float64)
    if not len(unit_ids):
        raise ValueError("no game has a verdict: there is nothing to fit")
    names = [(rows.models[m], rows.questions[q]) for m, q in zip(model, question, strict=True)]
    for name, uid in names:
        if (name, uid) not in features:
            raise ValueError(f"no answer of {name} to question {uid}: style control needs every judged answer")
        if uid not in baseline:
            raise ValueError(f"no answer of the baseline to question {uid}: style control needs every judged answer")
    own = np.array([features[key] for key in names], dtype=float)
    other = np.array([baseline[uid] for _, uid in names], dtype=float)
    z = standardised(style_difference(own, other, scoring), weight, scoring, centred)
    matrix = penalty(scoring, len(rows.models), len(FEATURES))

    def fitted(weight: Floats, score: Floats, start: Floats | None = None) -> tuple[Floats, Floats]:
        theta, gamma = fit(Units(model, z, weight, score, len(rows.models)), matrix, start)
        return np.where(np.bincount(model, weight, len(rows.models)) > 0, theta, np.nan), gamma

    theta, gamma = fitted(weight, score)
    start = np.concatenate([np.nan_to_num(theta), gamma])
    questions = _question_draws(rows, rounds, seed)
    by_question = ((weight * counts[question], score * counts[question]) for counts in questions)
    drawn = [
        np.array([expit(fitted(w, s, start)[0]) for w, s in resamples]).reshape(rounds, len(rows.models))
        for resamples in (_row_draws(unit, rows.score, rounds, seed), by_question)
    ]
    rates = {}
    for index, name in enumerate(rows.models):
        judged = int((model == index).sum())
        rates[name] = _rate(float(expit(theta[index])), drawn[0][:, index], drawn[1][:, index], judged, scoring, level)
    return StyleControl(
        rates,
        dict(zip(rows.models, theta.tolist(), strict=True)),
        dict(zip(FEATURES, gamma.tolist(), strict=True)),
        win_matrix(theta),
    )


def pool_warning(models: int) -> str | None:
    """Why SC of a small pool is not SC of the leaderboard."""
    if models >= SMALL_POOL:
        return None
    said = "so SC is about WR" if models == 1 else "so SC leans towards WR"
    return (
        f"the pool has {models} model{'s' * (models > 1)}: style is measured from its mean over the pool, {said}. "
        f"Give the judgments of {SMALL_POOL} or more other models with --pool DIR"
    )


def _outcome(entries: Sequence[float]) -> str:
    name = {1.0: "win", 0.5: "tie", 0.0: "loss"}[entries[0]]
    return f"strong {name}" if len(entries) > 1 else name


def _question_draws(rows: Rows, rounds: int, seed: int) -> Floats:
    """How often each question is drawn: [rounds, Q], the same for every model and score."""
    n = len(rows.questions)
    generator = np.random.default_rng(derive(seed, "arena", "questions"))
    return generator.multinomial(n, np.full(n, 1 / n), rounds).astype(float)


def _row_draws(unit: Ints, score: Floats, rounds: int, seed: int) -> Iterator[tuple[Floats, Floats]]:
    """Weight and score [U] of every unit when the rows of the whole pool are drawn again, ``rounds`` times."""
    generator = np.random.default_rng(derive(seed, "arena", "style rows"))
    n, units = len(score), int(unit.max()) + 1
    for _ in range(rounds):
        count = np.bincount(generator.integers(n, size=n), minlength=n)
        yield (
            np.bincount(unit, count, units).astype(np.float64),
            np.bincount(unit, count * score, units).astype(np.float64),
        )


def _ratio(sums: Floats, sizes: Floats) -> Floats:
    return np.divide(sums, sizes, out=np.full(len(sums), np.nan), where=sizes > 0)


def _rate(estimate: float, rows: Floats, questions: Floats, judged: int, scoring: Scoring, level: float) -> Rate:
    # One question resamples to itself: an interval of width 0 would claim certainty.
    rows, questions = (draws if judged > 1 else draws[:0] for draws in (rows, questions))
    return Rate(
        estimate,
        percentile_interval(estimate, rows, PUBLISHED_LEVEL[scoring]),
        percentile_interval(estimate, questions, level),
    )
