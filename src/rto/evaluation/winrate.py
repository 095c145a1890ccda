"""Policies compared by their scores on the same prompts: win rates, intervals over prompts, tests.

Shapes: N prompts, K and L samples a prompt, S statistics. Scores are [N] or [N, K], in any unit, higher is
better. NaN means missing: a prompt with a missing sample is left out of every statistic that needs it, and
counted. Prompts are the unit of resampling, never single games or samples: samples of one prompt are not
independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "not distinguishable"]

_BLOCK = 1 << 16  # prompts drawn at a time: the buffers (512 KB each) stay in the cache


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval; NaN where the data do not allow one."""

    estimate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        return without_nan(asdict(self))


@dataclass(frozen=True)
class PolicySummary:
    """One policy. ``score`` is its mean over ``n`` prompts; ``missing`` prompts have no complete score."""

    name: str
    score: Interval
    n: int
    missing: int
    length: float | None
    kl: float | None


@dataclass(frozen=True)
class PairSummary:
    """``a`` against ``b`` on the ``n`` prompts that both have scores for.

    ``wins``, ``ties`` and ``losses`` count prompts: a win is a prompt whose win probability is above 1/2.
    ``p`` is the exact sign test on them, ``p_holm`` the same adjusted for all unordered pairs. ``verdict``
    is "better" or "worse" when the interval of ``difference`` (mean score of a less b, paired) excludes 0,
    else "not distinguishable"; it is not adjusted for the number of pairs.
    """

    a: str
    b: str
    win_rate: Interval
    difference: Interval
    wins: int
    ties: int
    losses: int
    n: int
    missing: int
    p: float
    p_holm: float
    verdict: Verdict

    def mirrored(self) -> PairSummary:
        """The same comparison read as ``b`` against ``a``."""
        win, gap = self.win_rate, self.difference
        gap = Interval(0.0 - gap.estimate, 0.0 - gap.high, 0.0 - gap.low)  # 0.0 - x: never -0.0
        win = Interval(1.0 - win.estimate, 1.0 - win.high, 1.0 - win.low)
        counts = (self.losses, self.ties, self.wins, self.n, self.missing)
        return PairSummary(self.b, self.a, win, gap, *counts, self.p, self.p_holm, _verdict(gap))


@dataclass(frozen=True)
class Comparison:
    """All policies and all ordered pairs of them, with what is needed to compute the numbers again."""

    names: tuple[str, ...]
    policies: tuple[PolicySummary, ...]
    pairs: tuple[PairSummary, ...]
    level: float
    rounds: int
    seed: int

    def pair(self, a: str, b: str) -> PairSummary:
        """``a`` against ``b``. Raises ValueError for an unknown pair."""
        for pair in self.pairs:
            if (pair.a, pair.b) == (a, b):
                return pair
        raise ValueError(f"no pair {a!r} against {b!r}: the policies are {', '.join(self.names)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts for strict JSON: NaN becomes None."""
        return without_nan(asdict(self))


def win_probability(a: ArrayLike, b: ArrayLike) -> Floats:
    """Per prompt the mean of 1[a > b] + 1/2 [a = b] over all K x L pairs of samples.

    ``a``: [N, K] or [N], ``b``: [N, L] or [N]. Returns [N], NaN where a sample is missing.
    """
    first, second = _samples(a, "a"), _samples(b, "b")
    if len(first) != len(second):
        raise ValueError(f"a has {len(first)} prompts and b has {len(second)}: score the same prompts")
    left, right = first[:, :, None], second[:, None, :]
    # Half points as integers, one division at the end: a balanced prompt is exactly 0.5.
    points = 2 * (left > right).sum((1, 2)) + (left == right).sum((1, 2))
    missing = np.isnan(first).any(1) | np.isnan(second).any(1)
    return np.where(missing, np.nan, points / (2 * first.shape[1] * second.shape[1]))


def win_matrix(scores: Mapping[str, ArrayLike], names: Sequence[str]) -> Floats:
    """M[a, b]: how often ``names[a]`` beats ``names[b]``, ties one half, mean over the prompts of the pair.

    M + M^T = 1, diagonal 0.5; NaN for a pair without a common prompt.
    """
    if unknown := [name for name in names if name not in scores]:
        raise ValueError(f"no scores of {', '.join(unknown)}: the policies are {', '.join(scores)}")
    matrix = np.full((len(names), len(names)), 0.5)
    table = _table({name: scores[name] for name in names})
    for i, j in combinations(range(len(names)), 2):
        matrix[i, j] = _mean(win_probability(table[names[i]], table[names[j]]))
        matrix[j, i] = 1.0 - matrix[i, j]
    return matrix


def paired_bootstrap(differences: ArrayLike, rounds: int, seed: int, level: float = 0.95) -> Interval:
    """Mean of ``differences`` [N], one a prompt, with the percentile interval of a bootstrap over prompts.

    Missing differences (NaN) are drawn like the others and then left out of the mean of that resample.
    Fewer than two differences give no interval. The percentile interval is somewhat narrow below about 30.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"differences have shape {values.shape}: give one number a prompt, [N]")
    return bootstrap_means(values[:, None], rounds, seed, level)[0]


def bootstrap_means(values: Floats, rounds: int, seed: int, level: float = 0.95) -> list[Interval]:
    """The mean of every column of ``values`` [N, S] with its interval, all from the same resamples of the prompts."""
    draws = _resampled_means(values, rounds, seed)
    intervals = []
    for column, drawn in zip(values.T, draws.T, strict=True):
        # One prompt resamples to itself: an interval of width 0 would claim certainty.
        enough = _counted(column)[0] >= 2
        intervals.append(percentile_interval(_mean(column), drawn if enough else drawn[:0], level))
    return intervals


def percentile_interval(estimate: float, draws: Floats, level: float) -> Interval:
    """``estimate`` with the central ``level`` of its resampled ``draws``; undefined draws (NaN) are left out."""
    tail = _tail(level)
    draws = draws[~np.isnan(draws)]
    if math.isnan(estimate) or len(draws) == 0:
        return Interval(estimate, math.nan, math.nan)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided sign test, ties left out: p of a split at least this uneven when both are equally likely."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def holm(pvalues: ArrayLike) -> Floats:
    """Holm's step-down adjusted p-values [m] in the order given: max over j <= i of (m - j + 1) p_(j), at most 1."""
    p = np.asarray(pvalues, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion. Without observations: no estimate, interval [0, 1]."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes = {successes} is not between 0 and n = {n}")
    z = float(stats.norm.isf(_tail(level)))
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def seed_interval(differences: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of ``differences`` [n], one a training seed, with Student's t-interval (n - 1 degrees of freedom)."""
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"differences = {values.tolist()}: an interval over seeds needs two or more finite numbers")
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.isf(_tail(level), len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def across_seeds(values_a: ArrayLike, values_b: ArrayLike, level: float = 0.95) -> Interval:
    """Paired t-interval of a less b; ``values_a[i]`` and ``values_b[i]`` come from the same seed."""
    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} values against {b.shape}: give both policies the same seeds in the same order")
    return seed_interval(a - b, level)


def paired_t_test(values_a: ArrayLike, values_b: ArrayLike) -> float:
    """Two-sided p of the paired t-test behind :func:`across_seeds`; 1 where all pairs are equal."""
    gap = np.asarray(values_a, dtype=np.float64) - np.asarray(values_b, dtype=np.float64)
    if len(gap) < 2 or not np.isfinite(gap).all():
        raise ValueError(f"differences = {gap.tolist()}: a test over seeds needs two or more finite numbers")
    error = float(gap.std(ddof=1)) / math.sqrt(len(gap))
    if error == 0:
        return 0.0 if gap[0] else 1.0
    return float(2 * stats.t.sf(abs(float(gap.mean())) / error, len(gap) - 1))


def compare(
    scores: Mapping[str, ArrayLike],
    *,
    rounds: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    lengths: Mapping[str, ArrayLike] | None = None,
    kls: Mapping[str, ArrayLike] | None = None,
) -> Comparison:
    """Every policy and every ordered pair, from scores [N] or [N, K] on the same N prompts in the same order.

    ``lengths`` and ``kls`` ([N] or [N, K], the caller's unit) are averaged and may lack policies. All
    intervals come from one set of ``rounds`` resamples of the prompts. What the verdict means is said in
    :class:`PairSummary`. Raises ValueError for unequal numbers of prompts, infinite scores, unknown names.
    """
    table = _table(scores)
    names = tuple(table)
    couples = list(combinations(names, 2))
    means = {name: samples.mean(1) for name, samples in table.items()}
    chances = [win_probability(table[a], table[b]) for a, b in couples]
    gaps = [means[a] - means[b] for a, b in couples]
    intervals = bootstrap_means(np.stack([*means.values(), *chances, *gaps], 1), rounds, seed, level)
    of_policy, of_chance = intervals[: len(names)], intervals[len(names) : len(names) + len(couples)]
    of_gap = intervals[len(names) + len(couples) :]
    mean_length, mean_kl = _means(lengths, table, "lengths"), _means(kls, table, "kls")

    policies = []
    for name, score in zip(names, of_policy, strict=True):
        n, missing = _counted(means[name])
        policies.append(PolicySummary(name, score, n, missing, mean_length.get(name), mean_kl.get(name)))

    counts = [(int((c > 0.5).sum()), int((c == 0.5).sum()), int((c < 0.5).sum())) for c in chances]
    ps = [sign_test(wins, losses) for wins, _, losses in counts]
    pairs: dict[tuple[str, str], PairSummary] = {}
    for i, (p, p_holm) in enumerate(zip(ps, holm(ps), strict=True)):
        a, b = couples[i]
        rest = (*counts[i], *_counted(chances[i]), p, float(p_holm))
        pairs[a, b] = PairSummary(a, b, of_chance[i], of_gap[i], *rest, _verdict(of_gap[i]))
        pairs[b, a] = pairs[a, b].mirrored()
    ordered = tuple(pairs[a, b] for a in names for b in names if a != b)
    return Comparison(names, tuple(policies), ordered, level, rounds, seed)


def without_nan(value: Any) -> Any:
    """``value`` for strict JSON: tuples become lists and NaN becomes None, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# --- resampling and checks ----------------------------------------------------------------------------


def _resampled_means(values: Floats, rounds: int, seed: int) -> Floats:
    """Means of the columns of ``values`` [N, S] in ``rounds`` resamples of the rows: [rounds, S].

    A resample is a row of counts, so that its means are one matrix product, however many columns.
    """
    n = len(values)
    if n == 0 or rounds < 1:
        raise ValueError(f"{n} prompts and {rounds} rounds: a bootstrap needs at least one of each")
    if np.isinf(values).any():
        raise ValueError("infinite values have no mean: mark missing ones as NaN")
    generator = np.random.default_rng(seed)
    valid = (~np.isnan(values)).astype(np.float64)
    filled = np.nan_to_num(values, nan=0.0)
    complete = bool(valid.all())
    means = np.full((rounds, values.shape[1]), np.nan)
    block = max(1, _BLOCK // n)
    for start in range(0, rounds, block):
        rows = min(block, rounds - start)
        drawn = generator.integers(n, size=(rows, n))
        if complete and values.shape[1] == 1:  # looking one column up is twice as fast as counting
            means[start : start + rows, 0] = np.take(filled[:, 0], drawn).mean(1)
            continue
        drawn += n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        size = np.full((rows, values.shape[1]), float(n)) if complete else counts @ valid
        np.divide(counts @ filled, size, out=means[start : start + rows], where=size > 0)
    return means


def _samples(scores: ArrayLike, name: str) -> Floats:
    """``scores`` as [N, K]."""
    array = np.asarray(scores, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"scores of {name} have shape {np.shape(scores)}: give [N] or [N, K]")
    if np.isinf(array).any():
        row = int(np.isinf(array).any(1).argmax())
        raise ValueError(f"scores of {name} are infinite at prompt {row}: mark a missing score as NaN")
    return array


def _table(scores: Mapping[str, ArrayLike]) -> dict[str, Floats]:
    table = {name: _samples(array, name) for name, array in scores.items()}
    sizes = {name: len(samples) for name, samples in table.items()}
    if not sizes or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"prompts a policy: {sizes}. Score all policies on the same prompts (NaN: missing)")
    return table


def _means(arrays: Mapping[str, ArrayLike] | None, table: dict[str, Floats], what: str) -> dict[str, float]:
    """Mean of each array of ``arrays`` over everything that is not missing."""
    means = {}
    for name, array in (arrays or {}).items():
        if name not in table:
            raise ValueError(f"{what} of {name!r}, which has no scores: the policies are {', '.join(table)}")
        values = _samples(array, f"{name} ({what})")
        if len(values) != len(table[name]):
            raise ValueError(f"{what} of {name}: {len(values)} prompts, but its scores have {len(table[name])}")
        means[name] = _mean(values)
    return means


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level = {level} is not between 0 and 1: 0.95 means 95 %")
    return (1 - level) / 2


def _counted(values: Floats) -> tuple[int, int]:
    """How many values are there and how many are missing."""
    missing = int(np.isnan(values).sum())
    return len(values) - missing, missing


def _mean(values: Floats) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


def _verdict(difference: Interval) -> Verdict:
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not distinguishable"
