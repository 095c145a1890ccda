"""What a judge's verdicts on two systems say: win rates, sureness, order bias, length.

Shapes: N prompts. Verdicts are [N], from the view of system a: 1 win, 1/2 tie, 0 loss, NaN no verdict. Prompts are the
unit of resampling: the two games of a prompt are not independent.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rto.evaluation.winrate import bootstrap_means, sign_test, wilson, without_nan

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Order = Literal["both", "single"]
TERCILES = ("shorter", "similar", "longer")


def pair_statistics(
    a_first: ArrayLike,
    b_first: ArrayLike,
    identical: ArrayLike,
    lengths: tuple[ArrayLike, ArrayLike],
    *,
    order: Order = "both",
    rounds: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Every number of system a against system b, ready for JSON (undefined ones are None).

    ``a_first`` and ``b_first``: the verdicts when a's answer, or b's, was shown first. ``identical``: prompts where
    both gave the same answer; they tie, whatever the verdicts are. ``lengths``: characters of a's and of b's answers.
    With ``order`` "both" a prompt is won when both games say so, else tied; a prompt that lacks one is dropped.

    Raises:
        ValueError: shapes differ; a verdict is none of 0, 1/2, 1 and NaN; no prompts; rounds below 1.
    """
    same = np.asarray(identical, dtype=bool)
    first, second = (np.where(same, np.nan, _verdicts(part)) for part in (a_first, b_first))
    long_a, long_b = (np.asarray(part, dtype=np.float64) for part in lengths)
    if len({part.shape for part in (same, first, second, long_a, long_b)}) > 1:
        raise ValueError("verdicts, identical and lengths must be of the same prompts, [N] each")
    combined = np.where(same, 0.5, _combined(first, second, order))
    soft = np.where(same, 0.5, (first + second) / 2)  # NaN for single games
    known = ~np.isnan(combined)
    gap = long_a - long_b
    terciles = _terciles(gap, known)

    columns = [combined, soft, *(np.where(mask, combined, np.nan) for mask in terciles)]
    # Draw from the prompts with a verdict only: those without one say nothing.
    table = np.stack(columns, 1)[known]
    intervals = bootstrap_means(table, rounds, seed, level) if len(table) else None
    rates = [interval.to_dict() for interval in intervals] if intervals else [_nothing()] * len(columns)

    wins, ties, losses = _counts(combined)
    decided = known & (combined != 0.5) & (gap != 0)
    longer = int((((combined == 1) == (gap > 0)) & decided).sum())
    return without_nan(
        {
            "n": int(known.sum()),
            "dropped": int((~known).sum()),
            "identical": int(same.sum()),
            "wins": wins,
            "ties": ties,
            "losses": losses,
            "win_rate": rates[0],
            "win_rate_without_ties": wilson(wins, wins + losses, level).to_dict(),
            "mean_score": rates[1] if order == "both" else None,
            "p": sign_test(wins, losses),
            "verdict": _better(rates[0]),
            "orders": {
                name: dict(zip(("wins", "ties", "losses"), _counts(part), strict=True))
                for name, part in (("a_first", first), ("b_first", second))
            },
            "position": _position(first, second, order, level),
            "length": {
                "a": _mean(long_a[known]),
                "b": _mean(long_b[known]),
                "win_rate_where_a_is": {
                    name: {"n": int(mask.sum()), **rate}
                    for name, mask, rate in zip(TERCILES, terciles, rates[2:], strict=True)
                },
                "longer_wins": {"n": int(decided.sum()), **wilson(longer, int(decided.sum()), level).to_dict()},
            },
        }
    )


def kappa(first: Floats, second: Floats) -> float:
    """Cohen's kappa of two verdicts (win, tie, loss) on the same prompts; NaN when chance alone would agree always."""
    if len(first) == 0:
        return math.nan
    chance = sum(float((first == value).mean() * (second == value).mean()) for value in (0.0, 0.5, 1.0))
    return (float((first == second).mean()) - chance) / (1 - chance) if chance < 1 else math.nan


def _position(a_first: Floats, b_first: Floats, order: Order, level: float) -> dict[str, Any]:
    """How much the place of an answer decides. Identical answers are no games."""
    first_wins = int((a_first == 1).sum() + (b_first == 0).sum())
    second_wins = int((a_first == 0).sum() + (b_first == 1).sum())
    share: dict[str, Any] = {"first_wins": first_wins, "second_wins": second_wins}
    share["first_share"] = wilson(first_wins, first_wins + second_wins, level).to_dict()
    if order == "single":
        return {**share, "p": sign_test(first_wins, second_wins)}
    both = ~np.isnan(a_first) & ~np.isnan(b_first)
    one, two = a_first[both], b_first[both]
    n, shown_first = len(one), int(((one == 1) & (two == 0)).sum())
    shown_second = int(((one == 0) & (two == 1)).sum())
    return {
        **share,
        "n": n,
        "both_first": shown_first,
        "both_second": shown_second,
        "p": sign_test(shown_first, shown_second),
        "consistency": 1 - (shown_first + shown_second) / n if n else math.nan,
        "agreement": _mean((one == two).astype(np.float64)),
        "kappa": kappa(one, two),
    }


def _combined(first: Floats, second: Floats, order: Order) -> Floats:
    if order == "single":
        return np.where(np.isnan(first), second, first)
    return np.where(np.isnan(first) | np.isnan(second), np.nan, np.where(first == second, first, 0.5))


def _terciles(gap: Floats, known: Bools) -> list[Bools]:
    """Prompts in the lower, middle and upper third of the length difference, a less b. Equal ones stay together."""
    values = np.sort(gap[known])
    if len(values) == 0:
        return [known] * len(TERCILES)
    cut = (len(values) - 1) // 3  # whole numbers: swapping a and b mirrors the thirds exactly
    low, high = values[cut], values[len(values) - 1 - cut]
    shorter, longer = known & (gap <= low) & (gap < high), known & (gap >= high) & (gap > low)
    return [shorter, known & ~shorter & ~longer, longer]


def _verdicts(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not (np.isin(array, (0.0, 0.5, 1.0)) | np.isnan(array)).all():
        raise ValueError("verdicts are [N], each 1 (win), 0.5 (tie), 0 (loss) or NaN (none)")
    return array


def _counts(verdicts: Floats) -> tuple[int, int, int]:
    return int((verdicts == 1).sum()), int((verdicts == 0.5).sum()), int((verdicts == 0).sum())


def _better(rate: dict[str, float | None]) -> str:
    low, high = rate["low"], rate["high"]
    if low is None or high is None:
        return "not distinguishable"
    return "better" if low > 0.5 else "worse" if high < 0.5 else "not distinguishable"


def _nothing() -> dict[str, float | None]:
    return {"estimate": None, "low": None, "high": None}


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan
