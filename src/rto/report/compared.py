"""Figures of a comparison, in the style of :mod:`rto.report.plots`: score against KL, and win rates, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rto.report import plots

MARKS = "osD^vP"
Bar = tuple[float, float, float]  # estimate, low, high; NaN bounds: no bar


def score_against_kl(points: Mapping[str, tuple[Bar, Bar]]) -> Figure:
    """One point a policy at (KL, score), each a :data:`Bar`. Names stand in the legend."""
    figure = plots._figure(6.4, 3.9 + 0.2 * (len(points) // 3))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    plots._panel(axes, "oracle score against KL")
    axes.set_xlabel("KL to the reference, nats an answer", fontsize=8.5, color=plots.INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    for index, (name, (kl, score)) in enumerate(points.items()):
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        mark = MARKS[index // len(plots.COLOURS) % len(MARKS)]
        style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 5, "elinewidth": 1, "linestyle": "none"}
        axes.errorbar([kl[0]], [score[0]], xerr=_arms(kl), yerr=_arms(score), label=plots._plain(name), **style)
    legend: dict[str, Any] = {"ncols": 3, "frameon": False, "fontsize": 8, "labelcolor": plots.INK}
    figure.legend(loc="outside lower center", **legend)
    return figure


def win_rates(points: Mapping[str, Mapping[str, Bar]], title: str) -> Figure:
    """One line a policy with a point for each kind of win rate, shares of 1; the broken line is one half."""
    kinds = list(dict.fromkeys(kind for bars in points.values() for kind in bars))
    figure = plots._figure(6.4, 1.2 + 0.3 * len(points))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    plots._panel(axes, title)
    axes.set_xlabel("%", fontsize=8.5, color=plots.INK)
    axes.axvline(50, color=plots.INK, alpha=0.5, linewidth=0.8, linestyle="--")
    for index, kind in enumerate(kinds):
        offset = 0.24 * (index - (len(kinds) - 1) / 2)
        for line, bars in enumerate(points.values()):
            if kind in bars:
                share, low, high = bars[kind]
                bar = (100 * share, 100 * low, 100 * high)
                style: dict[str, Any] = {"color": plots.COLOURS[index], "marker": MARKS[index], "markersize": 4.5}
                label = kind if kind not in axes.get_legend_handles_labels()[1] else None
                axes.errorbar([bar[0]], [line + offset], xerr=_arms(bar), elinewidth=1, label=label, **style)
    axes.set_yticks(range(len(points)), [plots._plain(name) for name in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    legend: dict[str, Any] = {"ncols": 3, "frameon": False, "fontsize": 8, "labelcolor": plots.INK}
    figure.legend(loc="outside lower center", **legend)
    return figure


def _arms(bar: Bar) -> list[list[float]] | None:
    """Lengths of the bars below and above, never negative: a bootstrap interval need not hold its estimate."""
    estimate, low, high = bar
    if math.isnan(low) or math.isnan(high):
        return None
    return [[max(0.0, estimate - low)], [max(0.0, high - estimate)]]
