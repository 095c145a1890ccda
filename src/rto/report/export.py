"""Tables for a terminal, for Markdown and for LaTeX, from cells that are already text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Format = Literal["text", "markdown", "latex"]
ENDINGS: dict[Format, str] = {"text": "txt", "markdown": "md", "latex": "tex"}

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
}


def render(form: Format, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """One table in the format, ``caption`` above it. The first column is aligned to the left, the others to the right.

    Raises:
        ValueError: a row has more or fewer cells than ``heads``.
    """
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"a row has {len(row)} cells and the table {len(heads)} columns: {list(row)}")
    return {"text": text, "markdown": markdown, "latex": latex}[form](heads, rows, caption)


def text(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Columns two spaces apart."""
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    shown = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        shown.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(([f"{caption}:"] if caption else []) + shown)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A pipe table. Pipes and line breaks inside cells are written so that they do not break it."""
    lines = [_pipes(heads), "| --- |" + " ---: |" * (len(heads) - 1), *map(_pipes, rows)]
    return "\n".join(([f"**{caption}**", ""] if caption else []) + lines)


def latex(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A ``table`` with booktabs rules; every special character of a cell is escaped."""
    lines = [r"\begin{table}", r"\centering"]
    if caption:
        lines.append(rf"\caption{{{escaped(caption)}}}")
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", _ampersands(heads), r"\midrule"]
    lines += [*map(_ampersands, rows), r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines)


def escaped(cell: str) -> str:
    """``cell`` as LaTeX that prints it."""
    return "".join(_LATEX.get(character, character) for character in cell)


def _pipes(cells: Sequence[str]) -> str:
    safe = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(safe)} |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"
