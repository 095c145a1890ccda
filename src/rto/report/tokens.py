"""Token credit: an answer, once a reward term, with every token coloured by its reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

POSITIVE = (33, 102, 172)  # blue
NEGATIVE = (202, 80, 32)  # red-orange: told from the blue by colour-blind readers too
OPACITY = 0.62  # of the strongest token: text stays readable on a light and on a dark page
# Control characters (C0) have pictures in Unicode; the two that answers are full of get clearer ones.
VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {127: "␡", ord("\n"): "⏎", ord("\t"): "⇥"}


def token_view(
    tokens: Sequence[str], terms: dict[str, Sequence[float | None]], ends: Sequence[bool] | None = None
) -> Markup:
    """HTML of one answer: a line a term, a span a token, in the order of ``terms``.

    Blue tokens earned reward, red and underlined ones lost it. Each term has its own symmetric scale; its
    legend gives the limit (largest absolute value). The title of a token holds the exact value of the term
    and every token text is escaped. A bar closes every token where ``ends`` is true: the end of a segment.
    ValueError when a term has not one value a token.
    """
    lines = []
    for name, values in terms.items():
        if len(values) != len(tokens):
            raise ValueError(f"the term {name!r} has {len(values)} values for {len(tokens)} tokens")
        limit = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
        marks = ends or [False] * len(tokens)
        spans = Markup("").join(
            _span(name, token, value, limit) + (_BAR if end else "")
            for token, value, end in zip(tokens, values, marks, strict=True)
        )
        lines.append(_LINE.format(name=name, legend=_legend(limit), spans=spans))
    return Markup('<div class="credit">{}</div>').format(Markup("").join(lines))


_LINE = Markup(
    '<div class="term"><div class="term-head"><span class="term-name">{name}</span>{legend}</div>'
    '<div class="tokens" dir="auto">{spans}</div></div>'
)


_BAR = Markup('<span class="bar" title="end of a segment">|</span>')


def _span(term: str, token: str, value: float | None, limit: float) -> Markup:
    text = token.translate(VISIBLE) or "∅"  # a token that only completes a character has no text of its own
    if value is None or not math.isfinite(value):
        return Markup('<span class="t" title="{} unknown">{}</span>').format(term, text)
    kind = "t neg" if value < 0 else "t"
    style = f' style="background:{_colour(value, limit)}"' if value else ""
    return Markup('<span class="{}"{} title="{} {}">{}</span>').format(
        kind, Markup(style), term, f"{value:+.6g}", escape(text)
    )


def _colour(value: float, limit: float) -> str:
    red, green, blue = POSITIVE if value > 0 else NEGATIVE
    return f"rgba({red},{green},{blue},{OPACITY * abs(value) / limit:.3f})"


def _legend(limit: float) -> Markup:
    if limit == 0:
        return Markup('<span class="legend">all 0</span>')
    ramp = f"linear-gradient(90deg,{_colour(-limit, limit)},transparent,{_colour(limit, limit)})"
    return Markup(
        '<span class="legend">&minus;{limit}<span class="ramp" style="background:{ramp}"></span>+{limit}</span>'
    ).format(limit=f"{limit:.3g}", ramp=ramp)
