"""A win rate with the advantage of length taken out: a logistic regression on the length difference.

Ours, in the spirit of AlpacaEval's length control (Dubois et al. 2024, arXiv 2404.04475): the same scale of
lengths, but no instruction difficulty, no fixed rows of a gamed baseline and no penalty that is chosen by
cross-validation, and wins come from an oracle. It is not the number that AlpacaEval calls LC.

Shapes: N prompts, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rto.evaluation.winrate import Interval, percentile_interval

Floats = NDArray[np.float64]

RIDGE = 0.01  # bounds separable data: 100 wins of 100 prompts give 99.9 %; other rates move by about 0.01 points
_STEP = 1.0  # the longest step of a coefficient: |x| <= 1, so no logit moves by more than 2
_STEPS = 200
_BLOCK = 1 << 17  # prompts drawn at a time


@dataclass(frozen=True)
class LengthControlled:
    """``win_rate`` at equal length, logistic(theta). ``slope`` (phi): what one unit of tanh(difference / std) adds to
    the logit of a win; ``longer``: share of the ``n`` prompts where the system's own answer is the longer one."""

    win_rate: Interval
    slope: float
    longer: float
    n: int


def length_controlled(
    wins: ArrayLike, differences: ArrayLike, *, rounds: int = 1000, seed: int = 0, level: float = 0.95
) -> LengthControlled:
    """Fits logit P(win) = theta + phi tanh(difference / std), with the percentile interval of a bootstrap over prompts.

    ``wins`` [N]: win probability of the system a prompt, 0 to 1, soft where there are several samples.
    ``differences`` [N]: length of its answer less that of the other's, any unit; std with ddof 1, not centred, that of
    all prompts in every resample. NaN in either leaves the prompt out. Maximised: the log-likelihood summed over
    prompts less RIDGE / 2 (theta^2 + phi^2). Swapping the two systems mirrors every number. ``rounds`` 0: no interval.

    The rate is NaN where nothing tells length from quality: all differences equal, and not 0.

    Raises:
        ValueError: shapes differ, or wins outside [0, 1].
    """
    y, gap = np.asarray(wins, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    if y.ndim != 1 or y.shape != gap.shape:
        raise ValueError(f"wins have shape {y.shape} and differences {gap.shape}: give both one number a prompt, [N]")
    there = ~(np.isnan(y) | np.isnan(gap))
    y, gap = y[there], gap[there]
    if ((y < 0) | (y > 1)).any():
        raise ValueError("wins are not between 0 and 1: give win probabilities, one a prompt")
    n = len(y)
    longer = float((gap > 0).mean()) if n else math.nan
    x = standardised(gap)
    if n < 2 or np.isnan(x).any():
        return LengthControlled(Interval(math.nan, math.nan, math.nan), math.nan, longer, n)
    best = fit(y, x, np.ones((1, n)))[0]
    thetas = [best[:1], *(fit(y, x, counts, best)[:, 0] for counts in _resamples(n, rounds, seed))]
    rates = _logistic(np.concatenate(thetas))
    rate = percentile_interval(float(rates[0]), rates[1:], level)
    return LengthControlled(rate, float(best[1]), longer, n)


def standardised(differences: Floats) -> Floats:
    """tanh(difference / std) [N], std with ddof 1. All differences 0: zeros; all equal otherwise: NaN."""
    if len(differences) < 2 or not differences.any():
        return np.zeros_like(differences)
    if (differences == differences[0]).all():
        return np.full_like(differences, math.nan)
    return np.tanh(differences / differences.std(ddof=1))


def fit(y: Floats, x: Floats, counts: Floats, start: Floats | None = None) -> Floats:
    """theta and phi [R, 2] of R resamples, ``counts`` [R, N]: how often each prompt is in them. Newton's method."""
    found = np.tile(np.zeros(2) if start is None else start, (len(counts), 1))
    open_rows = np.arange(len(counts))
    right = np.stack([counts @ y, counts @ (y * x)], 1)
    for _ in range(_STEPS):
        theta, phi = found[open_rows].T
        chance = _logistic(theta[:, None] + phi[:, None] * x)
        weighted = counts[open_rows] * chance
        curved = weighted * (1 - chance)
        slope0 = right[open_rows, 0] - weighted.sum(1) - RIDGE * theta
        slope1 = right[open_rows, 1] - weighted @ x - RIDGE * phi
        h00, h01, h11 = curved.sum(1) + RIDGE, curved @ x, curved @ (x * x) + RIDGE
        determinant = h00 * h11 - h01 * h01
        step = np.stack([h11 * slope0 - h01 * slope1, h00 * slope1 - h01 * slope0], 1) / determinant[:, None]
        size = np.abs(step).max(1)
        found[open_rows] += step * np.minimum(1.0, _STEP / np.maximum(size, 1e-300))[:, None]
        open_rows = open_rows[size > 1e-9]
        if len(open_rows) == 0:
            return found
    raise FloatingPointError(f"Newton's method did not settle in {_STEPS} steps on {len(open_rows)} resamples")


def _resamples(n: int, rounds: int, seed: int) -> Iterator[Floats]:
    """Counts [r, n] of resamples of n prompts, block by block, ``rounds`` in all."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    for start in range(0, rounds, block):
        rows = min(block, rounds - start)
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _logistic(value: Floats) -> Floats:
    """1 / (1 + exp(-value)), written so that logistic(-v) is 1 - logistic(v) and nothing overflows."""
    return 0.5 + 0.5 * np.tanh(0.5 * value)
