"""Rules of the divergence doctor: what the metrics of one stage say is going wrong. Thresholds: ``docs/doctor.md``.

A rule compares two windows: the first rows and the last ones, a quarter of the rows each, 3 to 20 (of the first at
most 5). Means are compared with their noise, which is taken from the differences between neighbouring rows, so that a
slow trend is no noise. A metric that is absent, null or not finite is left out, and a rule without its metrics sees
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import fmean, median
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, Any]]

LEAST = 5  # rows before a level is judged
TREND = 8  # rows before two windows are compared
NO_TERMS = ("reward/total", "reward/kl")


class Sign(NamedTuple):
    """What a rule saw."""

    fail: bool
    first: int  # step
    evidence: dict[str, float]


class Window(NamedTuple):
    """A mean over neighbouring rows, its standard error, and the steps it is made of."""

    mean: float
    error: float
    first: int
    last: int


class Series:
    """One metric of one stage: its steps and finite values."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self.steps = [step for step, _ in points]
        self.values = [value for _, value in points]
        self.width = min(20, max(3, len(points) // 4))

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def noise(self) -> float:
        """Standard deviation of a value around its neighbours, from both ends of the stage."""
        ends = self.values[:20], self.values[-20:]
        leaps = [abs(b - a) for part in ends for a, b in zip(part[:-1], part[1:], strict=True)]
        return median(leaps) / 0.954 if leaps else 0.0  # the median of |x - y| is 0.954 deviations

    def window(self, start: int, width: int) -> Window:
        stop = start + width
        error = self.noise / math.sqrt(width)
        return Window(fmean(self.values[start:stop]), error, self.steps[start], self.steps[stop - 1])

    def head(self) -> Window:
        return self.window(0, min(5, self.width))

    def tail(self) -> Window:
        width = min(self.width, len(self))
        return self.window(len(self) - width, width)


class Curves:
    """The metrics of one stage by name. ``whole``: all its rows where ``rows`` are only some: for counts."""

    def __init__(self, rows: Rows, whole: Rows | None = None) -> None:
        self.rows = rows
        self.whole = rows if whole is None else whole
        self.names = dict.fromkeys(key for row in rows for key in row)
        self.known: dict[str, Series] = {}

    def get(self, name: str, least: int = 1) -> Series | None:
        """None: fewer than ``least`` finite values."""
        if name not in self.names:
            return None
        if name not in self.known:
            self.known[name] = _series(self.rows, name)
        series = self.known[name]
        return series if len(series) >= least else None

    def reward(self, least: int) -> Series | None:
        """What the terms pay without the KL penalty and before scaling; without terms ``reward/total``."""
        terms = [name for name in self.names if name.startswith("reward/") and name not in NO_TERMS]
        if not terms:
            return self.get("reward/total", least)
        parts = [self.get(name, least) for name in terms]
        first = parts[0]
        if first is None or any(part is None or part.steps != first.steps for part in parts):
            return None
        values = zip(*(part.values for part in parts if part is not None), strict=True)
        return Series(list(zip(first.steps, map(sum, values), strict=True)))

    def each(self, prefix: str) -> list[tuple[str, Series]]:
        """``prefix/<term>`` of every term but the KL penalty."""
        names = [name for name in self.names if name.startswith(f"{prefix}/") and name != f"{prefix}/kl"]
        found = [(name, self.get(name, LEAST)) for name in names]
        return [(name, series) for name, series in found if series is not None]


def _series(rows: Rows, name: str) -> Series:
    found = [(row["step"], row.get(name)) for row in rows]
    return Series([(s, v) for s, v in found if isinstance(v, (int, float)) and math.isfinite(v)])


def rises(before: Window, after: Window, errors: float = 4.0) -> bool:
    """By more than ``errors`` standard errors of the difference; a drop is ``rises(after, before)``."""
    return after.mean - before.mean > errors * math.hypot(before.error, after.error)


# --- rules of reinforcement learning ----------------------------------------------------------------------


def kl_mismatch(c: Curves) -> Sign | None:
    """In step 1 the policy is the reference; later KL is positive in expectation."""
    kl = c.get("kl_per_token")
    if kl is None:
        return None
    if kl.steps[0] == 1 and abs(kl.values[0]) > 0.005:
        return Sign(abs(kl.values[0]) > 0.02, 1, {"kl_per_token at step 1": kl.values[0]})
    if len(kl) >= LEAST and (tail := kl.tail()).mean < -max(0.005, 4 * tail.error):
        return Sign(True, tail.first, {"kl_per_token": tail.mean, "standard error": tail.error})
    return None


def sampler_gap(c: Curves) -> Sign | None:
    gap = c.get("policy/sampler_gap")
    if gap is None or (tail := gap.tail()).mean <= 0.03:
        return None
    return Sign(tail.mean > 0.1, tail.first, {"policy/sampler_gap": tail.mean})


def kl_explosion(c: Curves) -> Sign | None:
    """Against the entropy at the start, which is what the reference itself finds surprising in its own answers."""
    kl, entropy = c.get("kl_per_token", LEAST), c.get("entropy")
    if kl is None:
        return None
    tail, start = kl.tail(), entropy.values[0] if entropy else 1.0
    if tail.mean <= max(0.3, 0.5 * start):
        return None
    return Sign(tail.mean > max(0.6, start), tail.first, {"kl_per_token": tail.mean, "entropy at the start": start})


def step_size(c: Curves) -> Sign | None:
    return _above(c, "policy/moved", 0.03, 0.1)


def clip_share(c: Curves) -> Sign | None:
    return _above(c, "policy/clip_share", 0.2, 0.3)


def entropy_collapse(c: Curves) -> Sign | None:
    entropy = c.get("entropy", LEAST)
    if entropy is None or (tail := entropy.tail()).mean >= 0.35 * entropy.values[0]:
        return None
    fail = tail.mean < 0.1 * entropy.values[0]
    return Sign(fail, tail.first, {"entropy at the start": entropy.values[0], "entropy": tail.mean})


def entropy_explosion(c: Curves) -> Sign | None:
    entropy = c.get("entropy", LEAST)
    if entropy is None or (tail := entropy.tail()).mean <= 1.4 * entropy.values[0] + 0.2:
        return None
    fail = tail.mean > 2 * entropy.values[0] + 0.2
    return Sign(fail, tail.first, {"entropy at the start": entropy.values[0], "entropy": tail.mean})


def length_hacking(c: Curves) -> Sign | None:
    """Length and reward rise, and the oracle does not, or most of the reward's rise is a term that pays for length.
    Without an oracle a term that pays for length is enough."""
    length, reward = c.get("length", TREND), c.reward(TREND)
    if length is None or reward is None:
        return None
    before, after = length.head(), length.tail()
    if after.mean < 1.3 * before.mean or not rises(before, after) or not rises(reward.head(), reward.tail()):
        return None
    evidence = {"length at the start": before.mean, "length": after.mean}
    evidence |= {"reward at the start": reward.head().mean, "reward": reward.tail().mean}
    oracle = c.get("oracle", TREND)
    if oracle is not None:
        start, now = oracle.head(), oracle.tail()
        evidence |= {"oracle at the start": start.mean, "oracle": now.mean}
        if not rises(start, now, 2.0):
            return Sign(rises(now, start), after.first, evidence)
    paid = {name: series.tail().mean for name, series in c.each("reward_length_correlation")}
    if oracle is None:
        paid = {name: value for name, value in paid.items() if value > 0.3}
    else:
        risen = reward.tail().mean - reward.head().mean
        paid = {name: value for name, value in paid.items() if value > 0.8 and _rise(c, name) > 0.5 * risen}
    return Sign(False, after.first, evidence | paid) if paid else None


def _rise(c: Curves, name: str) -> float:
    """By how much the term rose whose correlation with length is called ``name``."""
    term = c.get(f"reward/{name.partition('/')[2]}", TREND)
    return term.tail().mean - term.head().mean if term is not None else 0.0


def reward_hacking(c: Curves) -> Sign | None:
    """Since its best window the oracle has fallen while the reward rose."""
    oracle, reward = c.get("oracle", TREND), c.reward(TREND)
    if oracle is None or reward is None or oracle.steps != reward.steps:
        return None
    width = oracle.width
    windows = [oracle.window(i, width) for i in range(len(oracle) - 2 * width + 1)]
    best = max(range(len(windows)), key=lambda i: windows[i].mean)
    peak, now, start = windows[best], oracle.tail(), oracle.window(0, min(5, width))
    paid_then, paid = reward.window(best, width), reward.tail()
    lost = peak.mean - now.mean
    # The best of many windows is partly luck: five errors, and half of what had been won.
    if not rises(now, peak, 5.0) or lost < 0.5 * (peak.mean - start.mean) or not rises(paid_then, paid):
        return None
    evidence = {"best oracle": peak.mean, "oracle": now.mean, "reward then": paid_then.mean, "reward": paid.mean}
    return Sign(rises(now, start), peak.last, evidence)


def reward_falls(c: Curves) -> Sign | None:
    reward = c.reward(TREND)
    if reward is None or len(reward) < 2 * TREND:
        return None
    before, after = reward.head(), reward.tail()
    if not rises(after, before, 5.0) or before.mean - after.mean < 0.1 * abs(before.mean):
        return None
    return Sign(False, after.first, {"reward at the start": before.mean, "reward": after.mean})


def critic_not_learning(c: Curves) -> Sign | None:
    explained = c.get("value/explained_variance", 15)
    if explained is None or (tail := explained.tail()).mean > 0.0:
        return None
    head = explained.head()
    if len(explained) < 30 and rises(head, tail):  # late, but on its way
        return None
    evidence = {"value/explained_variance at the start": head.mean, "value/explained_variance": tail.mean}
    if (loss := c.get("value/loss", TREND)) is not None:
        evidence |= {"value/loss at the start": loss.head().mean, "value/loss": loss.tail().mean}
    return Sign(tail.mean < -0.5, tail.first, evidence)


def dense_dominates(c: Curves) -> Sign | None:
    """Other terms leave the scorer's ``terminal`` less than a tenth of what they pay together, KL apart."""
    shares = {name.partition("/")[2]: series.tail() for name, series in c.each("reward_share")}
    if "terminal" not in shares or len(shares) < 2:
        return None
    mass = sum(share.mean for share in shares.values())
    if mass <= 0 or shares["terminal"].mean / mass >= 0.1:
        return None
    evidence = {f"reward_share/{name}": share.mean for name, share in shares.items()}
    return Sign(False, shares["terminal"].first, evidence)


def kl_dominates(c: Curves) -> Sign | None:
    return _above(c, "reward_share/kl", 0.6, math.inf)


def term_saturated(c: Curves) -> Sign | None:
    found = {name: series.tail() for name, series in c.each("reward_clip_share") if series.tail().mean > 0.5}
    if not found:
        return None
    first = min(tail.first for tail in found.values())
    return Sign(False, first, {name: tail.mean for name, tail in found.items()})


def truncated(c: Curves) -> Sign | None:
    """Most answers are cut, or clearly more than at the start."""
    finished = c.get("finished", LEAST)
    if finished is None:
        return None
    before, after = finished.head(), finished.tail()
    lost = before.mean - after.mean
    grows = len(finished) >= TREND and lost > 0.1 and rises(after, before)
    if after.mean >= 0.5 and not grows:
        return None
    return Sign(
        lost > 0.3 or after.mean < 0.2, after.first, {"finished at the start": before.mean, "finished": after.mean}
    )


def missing_rewards(c: Curves) -> Sign | None:
    missing = c.get("missing")
    if missing is None or (tail := missing.tail()).mean <= 0.01:
        return None
    return Sign(tail.mean > 0.2, tail.first, {"missing": tail.mean})


def left_out(c: Curves) -> Sign | None:
    """Optimiser steps that were not finite: ``skipped`` summed over all rows of the stage, and divided by its steps so
    far. A step of RL is an iteration, of several optimiser steps: there the ratio may exceed 1."""
    skipped = _series(c.whole, "skipped")
    count = sum(skipped.values)
    if not count:
        return None
    ratio = count / c.whole[-1]["step"]
    return Sign(ratio > 0.05, skipped.steps[0], {"optimiser steps left out": count, "for each step": ratio})


# --- rules of preference training -------------------------------------------------------------------------


def at_chance(c: Curves) -> Sign | None:
    """Held-out accuracy, or that of the last training batches where there is none yet."""
    if (held := c.get("eval_accuracy")) is not None:
        step, value = held.steps[-1], held.values[-1]
        return Sign(value < 0.45, step, {"eval_accuracy": value}) if value < 0.55 else None
    accuracy = c.get("accuracy", 60)
    if accuracy is None or (tail := accuracy.tail()).mean >= 0.53:
        return None
    return Sign(tail.mean < 0.45, tail.first, {"accuracy": tail.mean})


def overfit(c: Curves) -> Sign | None:
    held, held_loss = c.get("eval_accuracy"), c.get("eval_loss")
    accuracy, loss = c.get("accuracy", TREND), c.get("loss", TREND)
    if held is None or held_loss is None or accuracy is None or loss is None:
        return None
    train, train_loss = accuracy.tail(), loss.tail()
    gap = train.mean - held.values[-1]
    if gap < 0.12 + 2 * train.error or held_loss.values[-1] < 1.25 * train_loss.mean:
        return None
    evidence = {"accuracy": train.mean, "eval_accuracy": held.values[-1]}
    return Sign(gap > 0.3, train.first, evidence | {"loss": train_loss.mean, "eval_loss": held_loss.values[-1]})


def loss_rises(c: Curves) -> Sign | None:
    loss = c.get("loss", 20)
    if loss is None:
        return None
    before, after = loss.head(), loss.tail()
    if not rises(before, after, 5.0) or after.mean - before.mean < 0.1 * abs(before.mean):
        return None
    return Sign(after.mean > 1.5 * before.mean, after.first, {"loss at the start": before.mean, "loss": after.mean})


def _above(c: Curves, name: str, warn: float, fail: float) -> Sign | None:
    series = c.get(name, LEAST)
    if series is None or (tail := series.tail()).mean <= warn:
        return None
    return Sign(tail.mean > fail, tail.first, {name: tail.mean})
