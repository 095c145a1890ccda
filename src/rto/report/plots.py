"""Figures of the report, through matplotlib's object interface: no pyplot, no global state.

Every function returns a ``Figure``; :func:`svg` turns it into markup that can stand inside a page, and
:func:`save_png` into a file. What is drawn in :data:`INK` takes the colour of the page's text, so that one
SVG reads on light and dark pages.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

INK = "#1b1f24"
# Okabe and Ito, "Color universal design" (2008), less black and yellow, which one of the two pages swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")  # change too, so that curves are told apart in print
SCALE = LinearSegmentedColormap.from_list("win", ["#ca5020", "#f6d5c6", "#fafafa", "#c4dcef", "#2166ac"])
SMOOTH_FROM = 40  # points: longer curves also show their running mean

Rows = Sequence[Mapping[str, Any]]


def curves(runs: Mapping[str, Rows], keys: Sequence[str], titles: Sequence[str]) -> Figure:
    """One panel a key with the curve of every run against its steps.

    Rows without the key are skipped, null is a gap, and a panel that nobody has data for says so. A curve
    longer than :data:`SMOOTH_FROM` is drawn thin under its running mean (a twentieth of its points).
    """
    figure, panels = _row(len(keys))
    for axes, key, title in zip(panels, keys, titles, strict=True):
        _panel(axes, title)
        for index, (name, rows) in enumerate(runs.items()):
            _curve(axes, rows, key, name, index)
        _finish(axes)
    _legend(figure, panels)
    return figure


def training(rows: Rows, panels: Mapping[str, Sequence[str]]) -> Figure:
    """One panel a title with the curves of its keys, for example ``{"accuracy": ["accuracy", "eval_accuracy"]}``."""
    figure, drawn = _row(len(panels))
    for axes, (title, keys) in zip(drawn, panels.items(), strict=True):
        _panel(axes, title)
        for index, key in enumerate(keys):
            _curve(axes, rows, key, key, index)
        _finish(axes)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def win_matrix(
    names: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    low: Sequence[Sequence[float | None]],
    high: Sequence[Sequence[float | None]],
) -> Figure:
    """Heat map: how often the policy of the row beats the policy of the column, with the interval, in percent."""
    count = len(names)
    margin = 0.3 + 0.085 * max((len(name) for name in names), default=0)  # inches, for the names of the rows
    width, height = margin + 1.15 * count, 0.35 + 0.72 * count
    figure = _figure(width, height)
    axes = figure.add_axes((margin / width, 0.03 / height, 1.15 * count / width, 0.72 * count / height))
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    for i in range(count):
        for j in range(count):
            _cell(axes, i, j, matrix[i][j], low[i][j], high[i][j])
    centres = [index + 0.5 for index in range(count)]
    axes.set_xticks(centres, [_plain(name) for name in names])
    axes.set_yticks(centres, [_plain(name) for name in names])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9.5, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def normaliser_plot(fitted: Mapping[str, Any]) -> Figure:
    """Mean and std of a segment scorer's values by location and the fitted lines, from a normaliser's fields."""
    figure, panels = _row(2)
    places = [float(place) for place in fitted["locations"]]
    line = [k / 200 for k in range(1, 201)]
    biggest = max(fitted["counts"], default=1)
    sizes = [4 + 40 * count / biggest for count in fitted["counts"]]
    for axes, title, kind, points in (
        (panels[0], "mean of the scorer's values", "mu", fitted["means"]),
        (panels[1], "standard deviation", "sigma", fitted["stds"]),
    ):
        _panel(axes, title)
        axes.set_xlabel("location of the segment: k / K", fontsize=8.5, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.scatter(places, points, s=sizes, color=COLOURS[0], alpha=0.45, linewidths=0, label="segments")
        values = [fitted[f"w_{kind}"] * math.log(p + 1e-10) + fitted[f"b_{kind}"] for p in line]
        if kind == "sigma":
            values = [max(value, fitted["floor"]) for value in values]
        axes.plot(line, values, color=COLOURS[1], linewidth=1.8, label="Huber fit")
    _legend(figure, panels)
    return figure


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as ``<svg>`` markup. ``name`` starts all its ids, so it must be unique in the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', text)
    assert width is not None
    head = f'<svg role="img" aria-label="{html.escape(label)}" style="width:{float(width[1]) * 4 / 3:.0f}px"'
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r' height="[\d.]+pt"', "", text, count=1), count=1)
    return text.replace("<svg", head, 1).replace(INK, "currentColor")


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure on white, 200 dots an inch."""
    figure.savefig(path, format="png", dpi=200, facecolor="white")


def _figure(width: float, height: float) -> Figure:
    """Inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _row(count: int) -> tuple[Figure, list[Axes]]:
    figure = _figure(min(3.6 * count, 10.8), 2.7)  # inches: 10.8 is the width of the page
    figure.set_layout_engine("constrained", wspace=0.05)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _panel(axes: Axes, title: str) -> None:
    axes.set_facecolor("none")
    axes.set_title(_plain(title), fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel("step", fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3, width=0.6)
    axes.grid(True, color=INK, alpha=0.13, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_linewidth(0.6)


def _curve(axes: Axes, rows: Rows, key: str, label: str, index: int) -> None:
    points = [(row["step"], math.nan if row[key] is None else float(row[key])) for row in rows if key in row]
    if all(math.isnan(value) for _, value in points):
        return
    steps, values = [step for step, _ in points], [value for _, value in points]
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    long = len(points) > SMOOTH_FROM
    if long:
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.7)
        values = _running_mean(values, len(values) // 20)
    (line,) = axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.6, label=_plain(label))
    if len(points) <= 12:
        line.set(marker="o", markersize=3.2)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the values at most ``width`` places away; gaps stay gaps."""
    means = []
    for index, value in enumerate(values):
        near = [other for other in values[max(0, index - width) : index + width + 1] if not math.isnan(other)]
        means.append(math.nan if math.isnan(value) else sum(near) / len(near))
    return means


def _finish(axes: Axes) -> None:
    if not axes.get_lines():
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "alpha": 0.6}
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, fontsize=9, **style)
        axes.set_xticks([])
        axes.set_yticks([])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            found.setdefault(label, handle)
    if found:
        style: dict[str, Any] = {"ncols": 6, "frameon": False, "fontsize": 9, "labelcolor": INK}
        figure.legend(list(found.values()), list(found), loc="outside upper left", **style)


def _cell(axes: Axes, i: int, j: int, rate: float | None, low: float | None, high: float | None) -> None:
    centred: dict[str, Any] = {"ha": "center", "va": "center"}
    if i == j or rate is None:
        axes.text(j + 0.5, i + 0.5, "–", fontsize=10, color=INK, alpha=0.6, **centred)
        return
    red, green, blue, _ = SCALE(rate)
    axes.add_patch(Rectangle((j + 0.03, i + 0.04), 0.94, 0.92, facecolor=(red, green, blue), linewidth=0))
    ink = "#ffffff" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.48 else "#14181d"  # on the cell, not on the page
    axes.text(j + 0.5, i + 0.4, f"{100 * rate:.1f} %", fontsize=10.5, color=ink, fontweight="bold", **centred)
    if low is not None and high is not None:
        axes.text(j + 0.5, i + 0.72, f"{100 * low:.1f} to {100 * high:.1f}", fontsize=7.5, color=ink, **centred)


def _plain(text: str) -> str:
    """Names come from users: a dollar sign must not start mathematics, a leading underscore not hide a label."""
    return text.replace("$", r"\$").lstrip("_") or "?"
