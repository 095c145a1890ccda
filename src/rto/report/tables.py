"""The outcome of a run as text for a terminal."""

from __future__ import annotations

import json
from pathlib import Path

MANY = 6  # policies


def summary(folder: Path) -> str:
    """The win-rate matrix (of many policies two columns), each policy's oracle score, KL and length, and the report's
    path; "" without any."""
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
            cells = ["-" if i == j else _cell(*share) for j, share in zip(columns, shares, strict=True)]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
        lines.append(" " * width + "".join(f"{head:>20}" for head in ("oracle score", "KL (nats)", "tokens")))
        for name, row in comparison["policies"].items():
            score = f"{row['score']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            lines.append(f"{name:<{width}}{score:>20}{row['kl']:>20.2f}{row['length']:>20.1f}")
    if (folder / "report.html").exists():
        lines.append(f"report: {folder / 'report.html'}")
    return "\n".join(lines)


def _cell(share: float, low: float, high: float) -> str:
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
