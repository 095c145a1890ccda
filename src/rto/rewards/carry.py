"""Token rewards from one tokenisation of a text to another, by the characters that tokens stand for.

A span is (start, end) in characters of one text, the end exclusive. Spans come in the order of the text: starts and
ends never go back. An empty span, start = end, is a token without characters of its own: a special token, or the first
bytes of a character that a later token completes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

Span = tuple[int, int]


def carry(values: Sequence[float], from_spans: Sequence[Span], to_spans: Sequence[Span]) -> tuple[list[float], float]:
    """Rewards that add up, one a token of ``from_spans``, as rewards of the tokens of ``to_spans``.

    A value is split over the tokens that its characters overlap, in proportion to the characters; characters that no
    token stands for (some tokenizers skip spaces) do not count. A token that overlaps none gives its value to the next
    token at or after its place (of several empty ones at one place the n-th to the n-th), else to the last. So sums
    are preserved, and equal spans change nothing.

    Returns:
        The new values, and the share of the absolute mass that was misaligned: split over several tokens, or moved
        to one that does not cover its place. 0 where there is no mass.
    """
    _check(values, from_spans)
    assert to_spans or not from_spans, "no tokens to carry rewards to"
    if list(from_spans) == list(to_spans):
        return list(values), 0.0
    starts, ends = [span[0] for span in to_spans], [span[1] for span in to_spans]
    assert starts == sorted(starts) and ends == sorted(ends), "spans out of order"
    out = [0.0] * len(to_spans)
    mass = moved = 0.0
    here, earlier = -1, 0  # place of the last empty span, and how many came before it at that place
    for value, (start, end) in zip(values, from_spans, strict=True):
        mass += abs(value)
        shares = _overlaps(start, end, to_spans, bisect_right(ends, start))
        if shares:
            total = sum(shares.values())
            for index, share in shares.items():
                out[index] += value * (share / total)
            aligned = len(shares) == 1
        else:
            earlier = earlier + 1 if start == here and start == end else 0
            here = start if start == end else -1
            index = min(_next(start, to_spans, starts, ends, earlier), len(out) - 1)
            out[index] += value
            aligned = start == end and (to_spans[index] == (start, end) or starts[index] <= start < ends[index])
        moved += 0.0 if aligned else abs(value)
    return out, moved / mass if mass else 0.0


def at_ends(values: Sequence[float], from_spans: Sequence[Span], to_ends: Sequence[int]) -> tuple[list[float], float]:
    """Readings that tell of the text so far (a scorer's head at a position), for tokens that end at ``to_ends``.

    Each gets the value of the first token of ``from_spans`` that ends at or after it, else of the last. Of several that
    end at one place, the n-th gets that of the n-th there. So equal ends change nothing.

    Returns:
        The readings, and the share of their absolute mass at ends where no token of ``from_spans`` ends.
    """
    _check(values, from_spans)
    assert values or not to_ends, "no readings"
    ends = [span[1] for span in from_spans]
    places: list[int] = []
    earlier = 0  # ends before this one at the same place
    for index, end in enumerate(to_ends):
        earlier = earlier + 1 if index and to_ends[index - 1] == end else 0
        first, behind = bisect_left(ends, end), bisect_right(ends, end)
        places.append(min(first + earlier, max(first, behind - 1), len(ends) - 1))
    read = [values[place] for place in places]
    mass = sum(map(abs, read))
    moved = sum(abs(values[place]) for place, end in zip(places, to_ends, strict=True) if ends[place] != end)
    return read, moved / mass if mass else 0.0


def _overlaps(start: int, end: int, spans: Sequence[Span], first: int) -> dict[int, int]:
    """Characters that [start, end) has in common with each span from ``first`` on, where it has any."""
    shares = {}
    for index in range(first, len(spans)):
        if spans[index][0] >= end:
            break
        if (common := min(end, spans[index][1]) - max(start, spans[index][0])) > 0:
            shares[index] = common
    return shares


def _next(place: int, spans: Sequence[Span], starts: list[int], ends: list[int], earlier: int) -> int:
    """The empty token number ``earlier`` at ``place`` if there is one, else the first with characters from there on."""
    empty = bisect_left(starts, place) + earlier
    if empty < len(spans) and spans[empty] == (place, place):
        return empty
    return bisect_right(ends, place)


def _check(values: Sequence[float], spans: Sequence[Span]) -> None:
    assert len(values) == len(spans), f"{len(values)} values for {len(spans)} spans"
    ends = [end for _, end in spans]
    assert ends == sorted(ends) and all(start <= end for start, end in spans), "spans out of order"
