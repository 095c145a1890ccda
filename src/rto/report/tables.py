"""The outcome of a run as text for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

MANY = 6  # policies


def summary(folder: Path) -> str:
    """The win-rate matrix (of many policies two columns), each policy's oracle score, KL and length, a dash for what is
    missing, and the report's path; "" without any."""
    lines: list[str] = []
    path = folder / "evaluation.json"
    if path.exists():
        found = json.loads(path.read_text())
        comparison = found["comparison"]
        names = comparison["names"]
        width = max(map(len, names)) + 2
        # A matrix of many policies fits no terminal: then only the first column and the run's own method, the last.
        columns = list(range(len(names))) if len(names) <= MANY else [0, len(names) - 1]
        lines += [f"oracle: {found['oracle']}", "win rate of the row against the column in %, with the 95 % interval:"]
        lines.append(" " * width + "".join(f"{names[j]:>20}" for j in columns))
        for i, name in enumerate(names):
            shares = [[comparison[key][i][j] for key in ("matrix", "matrix_low", "matrix_high")] for j in columns]
            cells = ["-" if i == j else _cell(share, 100, 1) for j, share in zip(columns, shares, strict=True)]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
        lines.append(" " * width + "".join(f"{head:>20}" for head in ("oracle score", "KL (nats)", "tokens")))
        for name, row in comparison["policies"].items():
            score = _cell([row["score"], row["low"], row["high"]], 1, 2)
            lines.append(f"{name:<{width}}{score:>20}{row['kl']:>20.2f}{row['length']:>20.1f}")
        for name, row in comparison["policies"].items():
            if missing := row.get("missing"):
                lines.append(f"{name}: the oracle left {missing} of {missing + row['n']} prompts without a score")
    if (folder / "report.html").exists():
        lines.append(f"report: {folder / 'report.html'}")
    return "\n".join(lines)


def _cell(interval: Sequence[float | None], factor: float, digits: int) -> str:
    """``1.20 [1.00, 1.40]``; without brackets where there are no bounds, a dash where there is no estimate."""
    estimate, low, high = ("-" if value is None else f"{factor * value:.{digits}f}" for value in interval)
    return estimate if low == "-" or high == "-" else f"{estimate} [{low}, {high}]"
