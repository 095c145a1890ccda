"""Do the intervals hold what they promise: simulated comparisons whose truth is known.

    python benchmarks/coverage.py --draws 1000

For each kind of data and number of prompts: how many 95 % intervals contain the truth, and how often the sign test at
0.05 tells two equal policies apart. Then the time of a bootstrap of 10,000 prompts with 10,000 rounds.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
from scipy import stats

from rto.evaluation.length_control import length_controlled
from rto.evaluation.winrate import bootstrap_means, paired_bootstrap, sign_test, wilson, win_probability
from rto.report.export import markdown

PROMPTS = (50, 200, 800)

# Three kinds of prompts, equally frequent; the chances of the scores 0 to 4 of an answer to each. Scores tie often.
HARDNESS = np.array([1 / 3, 1 / 3, 1 / 3])
A = np.array([[0.3, 0.3, 0.2, 0.1, 0.1], [0.1, 0.2, 0.3, 0.2, 0.2], [0.0, 0.1, 0.2, 0.3, 0.4]])
B = np.array([[0.4, 0.3, 0.2, 0.1, 0.0], [0.1, 0.2, 0.4, 0.2, 0.1], [0.1, 0.1, 0.2, 0.3, 0.3]])
SHIFT = 0.3  # of the continuous scores: both have the prompt's own part and exponential noise
THETA, SLOPE = 0.4, 0.8  # of wins that length explains in part: logit P(win) = THETA + SLOPE tanh(difference / std)


def draw(kind: str, n: int, generator: np.random.Generator, equal: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n, K] of two policies; ``equal``: of one policy twice."""
    if kind == "continuous":
        part = generator.normal(0, 3, (n, 1))
        first, second = (part + generator.exponential(1, (n, 1)) for _ in range(2))
        return first + (0.0 if equal else SHIFT), second
    samples = 4 if kind == "ties, 4 answers" else 1
    hard = generator.choice(3, size=n, p=HARDNESS)
    return tuple(_scores(chances[hard], samples, generator) for chances in (B if equal else A, B))


def truth(kind: str) -> tuple[float, float, float]:
    """Mean difference, win rate, and the share of wins among the prompts that are not tied (one answer a prompt)."""
    if kind == "continuous":  # the difference of two exponentials is Laplace
        win = 1 - math.exp(-SHIFT) / 2
        return SHIFT, win, win
    joint = np.einsum("h,ha,hb->ab", HARDNESS, A, B)
    win, loss = float(np.tril(joint, -1).sum()), float(np.triu(joint, 1).sum())
    gap = float(HARDNESS @ (A - B) @ np.arange(5))
    return gap, win + (1 - win - loss) / 2, win / (win + loss)


def coverage(kind: str, n: int, draws: int, rounds: int, seed: int = 0) -> dict[str, float]:
    """Shares of ``draws``: intervals that contain the truth, and false alarms of the sign test between equals."""
    generator = np.random.default_rng([seed, n])
    gap, rate, share = truth(kind)
    hits = {"difference": 0, "win rate": 0, "wins, Wilson": 0, "false alarms": 0}
    for number in range(draws):
        a, b = draw(kind, n, generator)
        chances = win_probability(a, b)
        columns = np.stack([a.mean(1) - b.mean(1), chances], 1)
        for name, known, found in zip(hits, (gap, rate), bootstrap_means(columns, rounds, number), strict=False):
            hits[name] += found.low <= known <= found.high
        won, lost = int((chances > 0.5).sum()), int((chances < 0.5).sum())
        found = wilson(won, won + lost)
        hits["wins, Wilson"] += found.low <= share <= found.high
        same = win_probability(*draw(kind, n, generator, equal=True))
        hits["false alarms"] += sign_test(int((same > 0.5).sum()), int((same < 0.5).sum())) <= 0.05
    if kind == "ties, 4 answers":
        del hits["wins, Wilson"]  # wins are majorities of 16 games there: another share, without a closed form
    return {name: count / draws for name, count in hits.items()}


def length_coverage(n: int, draws: int, rounds: int, seed: int = 0) -> float:
    """Share of the intervals of the length-controlled win rate that contain logistic(THETA)."""
    generator = np.random.default_rng([seed, n])
    known, hits = 1 / (1 + math.exp(-THETA)), 0
    for number in range(draws):
        longer = generator.normal(0, 20, n)
        chance = 1 / (1 + np.exp(-THETA - SLOPE * np.tanh(longer / 20)))
        wins = (generator.random(n) < chance).astype(float)
        found = length_controlled(wins, longer, rounds=rounds, seed=number).win_rate
        hits += found.low <= known <= found.high
    return hits / draws


def size_of_sign_test(n: int) -> float:
    """Chance of p <= 0.05 on n prompts without ties when both sides are equally likely: exact."""
    return sum(float(stats.binom.pmf(k, n, 0.5)) for k in range(n + 1) if sign_test(k, n - k) <= 0.05)


def seconds_of_bootstrap(prompts: int = 10_000, rounds: int = 10_000) -> tuple[float, float]:
    """On the clock and of the processor: the second is what a busy machine does not change."""
    values = np.random.default_rng(0).normal(size=prompts)
    clock, processor = time.perf_counter(), time.process_time()
    paired_bootstrap(values, rounds, 0)
    return time.perf_counter() - clock, time.process_time() - processor


def _scores(chances: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Scores [n, samples] drawn from ``chances`` [n, 5]."""
    levels = chances.cumsum(1)[:, None, :-1]
    return (generator.random((len(chances), samples, 1)) > levels).sum(-1).astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1000, help="of each bootstrap")
    known = parser.parse_args()
    heads = ["data", "prompts", "difference", "win rate", "wins, Wilson", "length-controlled", "false alarms"]
    rows = []
    for kind in ("continuous", "ties", "ties, 4 answers"):
        for n in PROMPTS:
            found = coverage(kind, n, known.draws, known.rounds)
            rows.append([kind, str(n), *(f"{100 * found[head]:.1f} %" if head in found else "-" for head in heads[2:])])
    for n in PROMPTS:
        found = {"length-controlled": length_coverage(n, known.draws, known.rounds)}
        rows.append(["length", str(n), *(f"{100 * found[head]:.1f} %" if head in found else "-" for head in heads[2:])])
    error = 100 * math.sqrt(0.95 * 0.05 / known.draws)
    print(markdown(heads, rows))
    print(f"\n{known.draws} draws: a share of 95 % has a standard error of {error:.1f} points")
    sizes = ", ".join(f"{100 * size_of_sign_test(n):.1f} % on {n}" for n in PROMPTS)
    print(f"false alarms of the sign test, exact, without ties: {sizes} prompts")
    clock, processor = seconds_of_bootstrap()
    print(f"bootstrap of 10,000 prompts, 10,000 rounds: {clock:.1f} s, {processor:.1f} s of the processor")


if __name__ == "__main__":
    main()
