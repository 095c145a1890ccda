"""Draws what benchmarks/growth.py measured, in the look of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.growth import WORK, along, fit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from rto.report import plots

X = {
    "answer": ("answer length", "tokens of an answer"),
    "pairs": ("batch", "pairs in a batch"),
    "vocabulary": ("vocabulary", "words of the vocabulary"),
}


def draw(found: Sequence[dict[str, Any]]) -> Figure:
    """Tokens/s above, peak memory below; answer length, batch and vocabulary from left to right."""
    figure = plots._figure(10.8, 5.6)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.08)
    panels = figure.subplots(2, 3)
    for (axis, (title, label)), (above, below) in zip(X.items(), zip(*panels, strict=True), strict=True):
        plots._panel(above, f"speed by {title}")
        plots._panel(below, f"peak memory by {title if axis != 'answer' else 'tokens of a pass'}")
        places = [row[axis] for row in along(found, axis, next(iter(WORK)))]
        for axes in (above, below):
            axes.set_xlabel(label, fontsize=8.5, color=plots.INK)
            _ticks(axes, places, double=axes is above or axis != "vocabulary")
        for index, (work, name) in enumerate(WORK.items()):
            rows = along(found, axis, work)
            style: dict[str, Any] = {"color": plots.COLOURS[index], "linestyle": plots.DASHES[index]}
            style |= {"marker": "o", "markersize": 3.6, "linewidth": 1.6, "label": name}
            above.plot(places, [row["speed"] for row in rows], **style)
            if axis == "answer":  # a pass is as large as its tokens, not as its answers
                _against_tokens(below, rows, style)
            else:
                below.plot(places, [row["peak_mb"] for row in rows], **style)
            if axis == "vocabulary":
                _weights(below, rows, index)
        for axes, unit in ((above, "tokens/s"), (below, "MB")):
            axes.set_ylabel(unit, fontsize=8.5, color=plots.INK)
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
            axes.yaxis.set_major_formatter(_thousands())
    plots._legend(figure, list(panels.flat))
    return figure


def _against_tokens(axes: Axes, rows: Sequence[dict[str, Any]], style: dict[str, Any]) -> None:
    """Points, and the line that fits them best."""
    tokens, memory = [row["micro_batch"] for row in rows], [row["peak_mb"] for row in rows]
    axes.plot(tokens, memory, **style | {"linestyle": "none"})
    a, b, _ = fit(tokens, memory)
    ends = [0, max(tokens)]
    axes.plot(ends, [a + b * end for end in ends], **style | {"marker": "", "linewidth": 1.0})
    axes.set_xscale("linear")
    axes.set_xlim(0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(_thousands())
    axes.set_xlabel("tokens of the largest micro-batch", fontsize=8.5, color=plots.INK)


def _weights(axes: Axes, rows: Sequence[dict[str, Any]], index: int) -> None:
    """How the peak would grow if nothing but weights, gradients and moments did."""
    only = [rows[0]["peak_mb"] + row["weights_mb"] - rows[0]["weights_mb"] for row in rows]
    label = "growth of weights, gradients, moments alone" if index == 0 else "_"
    axes.plot([row["vocabulary"] for row in rows], only, color=plots.INK, linewidth=0.8, linestyle=":", label=label)


def _ticks(axes: Axes, places: Sequence[int], double: bool) -> None:
    """At the places that were measured. ``double``: on a logarithmic axis."""
    if double:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(places), [f"{place // 1000}k" if place >= 10_000 else f"{place:,}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())


def _thousands() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.0f}")
