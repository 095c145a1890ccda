"""Numbers that are not finite: found where a role says them, and named by role, row and token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Culprit:
    """Where a number that is not finite came up first.

    ``row`` counts from 0 in the rows that are looked at, ``part`` is the answer of that row ("chosen", "answers.1"),
    ``token`` counts its response tokens from 0. None or "": not known, or not of one.
    """

    role: str
    quantity: str
    value: str
    row: int | None = None
    part: str = ""
    token: int | None = None
    bad: int = 0  # rows of the pass with such a number, and all its rows
    rows: int = 0


class NotFinite(FloatingPointError):
    """A number is not finite. ``rows`` are the rows that ``culprit.row`` counts, once they are known."""

    def __init__(self, culprit: Culprit, rows: Sequence[Any] = (), text: str | None = None) -> None:
        super().__init__(text or _told(culprit, rows))
        self.culprit, self.rows = culprit, rows

    def told(self, text: str) -> NotFinite:
        """The same in other words."""
        return NotFinite(self.culprit, self.rows, text)

    def named(self, of: Sequence[tuple[int, str]]) -> NotFinite:
        """The same, where entry ``culprit.row`` of ``of`` says which row and which part of it that is."""
        if self.culprit.row is None:
            return self
        row, part = of[self.culprit.row]
        return NotFinite(replace(self.culprit, row=row, part=part), self.rows)

    def among(self, rows: Sequence[Any], index: Sequence[int]) -> NotFinite:
        """The same, found in a micro-batch that is made of ``rows[i] for i in index``. A culprit whose rows are known
        stays as it is."""
        if self.rows:
            return self
        row = self.culprit.row
        return NotFinite(self.culprit if row is None else replace(self.culprit, row=index[row]), rows)


def require_finite(values: Tensor, role: str, quantity: str, of: Sequence[tuple[int, str]] | None = None) -> None:
    """``values`` is [B], or [B, T] in response coordinates. ``of`` says for each of the B which row and which part
    of it that is; without it they are the rows.

    Raises:
        NotFinite: names the first value that is not finite.
    """
    bad = ~values.detach().isfinite()
    if bad.any():
        first, *token = bad.nonzero()[0].tolist()
        value = str(values.detach()[(first, *token)].item())
        row, part = of[first] if of is not None else (first, "")
        count = int(bad.flatten(1).any(-1).sum() if bad.dim() > 1 else bad.sum())
        raise NotFinite(Culprit(role, quantity, value, row, part, token[0] if token else None, count, len(bad)))


def _told(culprit: Culprit, rows: Sequence[Any]) -> str:
    c, places = culprit, []
    if c.row is not None:
        places.append(f"data row {rows[c.row].row}" if rows else f"row {c.row}")
    elif rows:
        places.append(f"data rows {', '.join(str(row.row) for row in rows[:8])}{', ...' if len(rows) > 8 else ''}")
    places += [c.part] if c.part else []
    places += [f"token {c.token}"] if c.token is not None else []
    if c.rows > 1 and c.bad:
        places.append(f"{c.bad} of {c.rows} rows" + (": the weights are suspect" if c.bad == c.rows else ""))
    return f"the {c.quantity} of the {c.role} is {c.value}" + (f" ({', '.join(places)})" if places else "")
