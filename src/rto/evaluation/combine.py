"""Recipes side by side: each policy's measures with intervals, and a verdict on each pair.

With two or more seeds the unit is the seed: means over the seeds with Student's t, pairs matched by seed. With one
run the unit is the prompt: the paired bootstrap of :mod:`rto.evaluation.winrate`. The two are not the same claim: only
seeds contain the luck of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rto.evaluation.length_control import length_controlled
from rto.evaluation.runs import Policy, Recipe, Run, matched
from rto.evaluation.winrate import (
    Interval,
    Verdict,
    across_seeds,
    bootstrap_means,
    holm,
    paired_t_test,
    seed_interval,
    sign_test,
    win_probability,
    without_nan,
)

Floats = NDArray[np.float64]

MEASURES = ("score", "kl", "length", "win_rate", "length_controlled", "auc")


@dataclass(frozen=True)
class Row:
    """One policy. ``measures``: :data:`MEASURES` that are defined, with intervals (NaN where the data allow none);
    ``each``: the same by seed. ``win_rate`` and ``length_controlled`` are against the table's ``against``."""

    name: str
    policy: str
    recipe: str
    method: bool  # the policy that its recipe is about
    measures: dict[str, Interval]
    each: dict[str, dict[int, float]]


@dataclass(frozen=True)
class Pair:
    """``a`` against ``b``: mean oracle score of a less b and win rate of a, over ``n`` of ``unit`` (seeds or prompts).

    ``won`` and ``lost`` count the units where a has the higher or the lower score. ``p``: paired t-test over seeds, or
    exact sign test over prompts; ``p_holm``: the same for all pairs of the table. The verdict is "better" or "worse"
    when the interval of ``difference`` excludes 0 and ``p_holm`` is below 1 - level, both on the same side; else "not
    distinguishable".
    """

    a: str
    b: str
    difference: Interval
    win_rate: Interval
    won: int
    lost: int
    n: int
    unit: str
    p: float
    p_holm: float
    verdict: Verdict


@dataclass(frozen=True)
class Table:
    """What `rto compare` shows. ``pairs``: one object for each unordered pair, the later row first."""

    against: str
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    recipes: dict[str, tuple[int, ...]]  # label -> seeds
    prompts: tuple[int, ...]  # of each run, the different counts
    oracles: tuple[str, ...]
    flags: tuple[str, ...]
    level: float

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts for strict JSON: NaN becomes None."""
        return without_nan(asdict(self))


def combine(recipes: Sequence[Recipe], against: str = "sft", level: float = 0.95) -> Table:
    """All policies of all recipes. A policy with the same answers in several recipes (a shared reference) is one row;
    others of one name carry their recipe's label.

    Raises:
        ValueError: ``against`` is missing in a run, or runs cannot be compared (:func:`rto.evaluation.runs.matched`).
    """
    together = {(j, i): matched(recipes[j], recipes[i]) for i, j in combinations(range(len(recipes)), 2)}
    together |= {(i, i): [(run, run) for run in recipe.runs.values()] for i, recipe in enumerate(recipes)}
    runs = [run for recipe in recipes for run in recipe.runs.values()]
    for run in runs:
        if against not in run.policies:
            raise ValueError(f"{run.folder} has no policy {against!r} to win against: it has {', '.join(run.policies)}")
    places = _distinct(recipes)
    common = [place for place in places if [p for _, p in places].count(place[1]) == 1]
    names = {place: place[1] if place in common else f"{place[1]} ({recipes[place[0]].label})" for place in places}
    rows = [_row(recipes[i], policy, names[i, policy], against, level) for i, policy in places]
    pairs: list[Pair] = []
    for (j, i), couples in _by_recipes(places).items():
        named = {(a, b): (names[j, a], names[i, b]) for a, b in couples}
        pairs += _pairs(together[j, i], couples, named, level)
    order = {names[place]: number for number, place in enumerate(places)}
    pairs.sort(key=lambda pair: (order[pair.a], order[pair.b]))
    adjusted = holm([pair.p for pair in pairs])
    return Table(
        against,
        tuple(rows),
        tuple(_judged(replace(pair, p_holm=float(p)), level) for pair, p in zip(pairs, adjusted, strict=True)),
        {recipe.label: tuple(recipe.runs) for recipe in recipes},
        tuple(sorted({len(run.prompts) for run in runs})),
        tuple(dict.fromkeys(run.oracle for run in runs)),
        tuple(dict.fromkeys(run.flag for run in runs if run.flag)),
        level,
    )


# --- rows ---------------------------------------------------------------------------------------------


def _distinct(recipes: Sequence[Recipe]) -> list[tuple[int, str]]:
    """Recipe and policy of every row that is not the same system as a row before."""
    places: list[tuple[int, str]] = []
    seen: set[tuple[str, frozenset[tuple[int, str]]]] = set()
    for i, recipe in enumerate(recipes):
        for name in recipe.first.policies:
            system = (name, frozenset((seed, run.policies[name].answers) for seed, run in recipe.runs.items()))
            if system not in seen:
                places.append((i, name))
            seen.add(system)
    return places


def _row(recipe: Recipe, policy: str, name: str, against: str, level: float) -> Row:
    each: dict[str, dict[int, float]] = {}
    for seed, run in recipe.runs.items():
        for key, value in _values(run, policy, against).items():
            each.setdefault(key, {})[seed] = value
    if len(recipe.runs) == 1:
        measures = _over_prompts(recipe.first, policy, against, level)
    else:
        measures = {key: _over_seeds(list(values.values()), level) for key, values in each.items()}
    return Row(name, policy, recipe.label, policy == recipe.first.method, measures, each)


def _values(run: Run, policy: str, against: str) -> dict[str, float]:
    """The measures of a policy in one run, without intervals."""
    mine = run.policies[policy]
    found = {"score": _mean(mine.scores), "kl": mine.kl, "length": _mean(mine.lengths)}
    if policy != against:
        chances, longer = _against(mine, run.policies[against])
        found["win_rate"] = _mean(chances)
        found["length_controlled"] = length_controlled(chances, longer, rounds=0).win_rate.estimate
    if mine.auc is not None:
        found["auc"] = mine.auc.estimate
    return {key: value for key, value in found.items() if not math.isnan(value)}


def _over_prompts(run: Run, policy: str, against: str, level: float) -> dict[str, Interval]:
    mine = run.policies[policy]
    columns = {"score": mine.scores.mean(1), "length": mine.lengths.mean(1)}
    found: dict[str, Interval] = {"kl": Interval(mine.kl, math.nan, math.nan)}
    if mine.kls is not None:
        columns["kl"] = mine.kls.mean(1)
    if policy != against:
        columns["win_rate"], longer = _against(mine, run.policies[against])
        controlled = length_controlled(columns["win_rate"], longer, seed=run.seed, level=level)
        found["length_controlled"] = controlled.win_rate
    drawn = bootstrap_means(np.stack(list(columns.values()), 1), run.rounds, run.seed, level)
    found |= dict(zip(columns, drawn, strict=True))
    if mine.auc is not None:
        found["auc"] = mine.auc
    return {key: found[key] for key in MEASURES if key in found and not math.isnan(found[key].estimate)}


def _over_seeds(values: list[float], level: float) -> Interval:
    return seed_interval(values, level) if len(values) > 1 else Interval(values[0], math.nan, math.nan)


def _against(mine: Policy, other: Policy) -> tuple[Floats, Floats]:
    """Win probability and mean length difference, tokens, a prompt: [N] each."""
    return win_probability(mine.scores, other.scores), mine.lengths.mean(1) - other.lengths.mean(1)


# --- pairs --------------------------------------------------------------------------------------------


def _by_recipes(places: list[tuple[int, str]]) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """The unordered pairs of rows, the later first, by their two recipes: one set of resamples serves all of them."""
    grouped: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for (i, b), (j, a) in combinations(places, 2):
        grouped.setdefault((j, i), []).append((a, b))
    return grouped


def _pairs(
    runs: list[tuple[Run, Run]],
    couples: list[tuple[str, str]],
    names: Mapping[tuple[str, str], tuple[str, str]],
    level: float,
) -> list[Pair]:
    """``p_holm`` and verdicts are still to come."""
    found: list[Pair] = []
    if len(runs) > 1:
        for a, b in couples:
            ours = [_mean(one.policies[a].scores) for one, _ in runs]
            theirs = [_mean(other.policies[b].scores) for _, other in runs]
            rates = [_mean(_against(one.policies[a], other.policies[b])[0]) for one, other in runs]
            gap, rate = across_seeds(ours, theirs, level), seed_interval(rates, level)
            won = sum(x > y for x, y in zip(ours, theirs, strict=True))
            lost = sum(x < y for x, y in zip(ours, theirs, strict=True))
            p = paired_t_test(ours, theirs)
            found.append(Pair(*names[a, b], gap, rate, won, lost, len(runs), "seeds", p, 1.0, "not distinguishable"))
        return found
    one, other = runs[0]
    chances = [_against(one.policies[a], other.policies[b])[0] for a, b in couples]
    gaps = [one.policies[a].scores.mean(1) - other.policies[b].scores.mean(1) for a, b in couples]
    drawn = bootstrap_means(np.stack([*gaps, *chances], 1), one.rounds, one.seed, level)
    for i, (couple, chance) in enumerate(zip(couples, chances, strict=True)):
        won, lost = int((chance > 0.5).sum()), int((chance < 0.5).sum())
        n = int((~np.isnan(chance)).sum())
        gap, rate, p = drawn[i], drawn[len(couples) + i], sign_test(won, lost)
        found.append(Pair(*names[couple], gap, rate, won, lost, n, "prompts", p, 1.0, "not distinguishable"))
    return found


def _judged(pair: Pair, level: float) -> Pair:
    """``pair`` with its verdict. The sign test is about wins and the difference about means: both must agree."""
    seeds = pair.unit == "seeds"  # there p and interval are one test
    if pair.p_holm < 1 - level and pair.difference.low > 0 and (seeds or pair.won > pair.lost):
        return replace(pair, verdict="better")
    if pair.p_holm < 1 - level and pair.difference.high < 0 and (seeds or pair.won < pair.lost):
        return replace(pair, verdict="worse")
    return pair


def _mean(values: Floats) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan
