"""Accuracy of a scorer on preference pairs with subsets, as RewardBench (arXiv 2403.13787) counts it.

A pair counts as right where the chosen answer scores strictly higher; a tie is wrong. Subset accuracies make sections
and the score is the plain mean of the sections. Beside it stands "the longer answer wins", which needs no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto.data.layouts import BadRow, Prompt, pair
from rto.data.sources import Loaded, RejectedRow, TextPair, records
from rto.evaluation.formats import read_records
from rto.evaluation.winrate import Interval, wilson, without_nan

# RewardBench's sections with the published weight of every subset: its number of examples, but for math-prm, which
# has 447 and weighs as much as the six code subsets together.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984}
    | {f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
}
LENGTHS = ("chosen_length", "rejected_length")


@dataclass(frozen=True)
class Scored:
    """One pair: two scores in any unit, None where missing, and the answers' lengths (characters) where known."""

    subset: str
    chosen: float | None
    rejected: float | None
    lengths: tuple[int, int] | None = None


def read_scores(path: str | Path) -> list[Scored]:
    """Rows of ``subset, chosen, rejected`` and, optional, ``chosen_length, rejected_length``; null: missing.

    Raises:
        ValueError: a key is missing, or a score is no finite number.
    """
    rows = []
    for number, record in enumerate(read_records(path), 1):
        where = f"{path}, row {number}"
        if not isinstance(record.get("subset"), str) or not {"chosen", "rejected"} <= record.keys():
            raise ValueError(f"{where}: needs the keys subset, chosen and rejected (found: {', '.join(record)})")
        for key in ("chosen", "rejected"):
            value = record[key]
            if isinstance(value, str):
                raise ValueError(
                    f"{where}: {key} is text: score the pairs with a run (`rto rewardbench RUN --pairs FILE`)"
                )
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"{where}: {key} is {value!r}, not a finite number (null: missing)")
        sizes = [size for key in LENGTHS if isinstance(size := record.get(key), int)]
        known = (sizes[0], sizes[1]) if len(sizes) == 2 else None
        rows.append(Scored(record["subset"], record["chosen"], record["rejected"], known))
    return rows


def write_scores(path: str | Path, rows: Sequence[Scored]) -> None:
    """What :func:`read_scores` reads."""
    lines = []
    for row in rows:
        record: dict[str, Any] = {"subset": row.subset, "chosen": row.chosen, "rejected": row.rejected}
        if row.lengths is not None:
            record |= dict(zip(LENGTHS, row.lengths, strict=True))
        lines.append(json.dumps(record) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_pairs(path: str, chat: bool) -> tuple[Loaded[TextPair], list[str]]:
    """The pairs of a file (JSON, JSONL, Parquet) that has a column ``subset``, and the subset of each good one.

    With ``chat``, prompts that are strings become a user's message.
    Raises ValueError when no pair can be used, or a row has no subset.
    """
    loaded: Loaded[TextPair] = Loaded(path, [])
    subsets = []
    for number, record in records(path, "train", "pairs"):
        try:
            if isinstance(record, BadRow):
                raise record
            prompt, chosen, rejected, margin = pair(record)
        except BadRow as bad:
            loaded.rejected.append(RejectedRow(path, number, bad.reason, bad.detail))
            continue
        if not isinstance(record.get("subset"), str):
            raise ValueError(f"{path}, row {number}: no subset (keys: {', '.join(record)}): add a column of that name")
        asked: Prompt = [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
        loaded.rows.append(TextPair(number, asked, chosen, rejected, margin))
        subsets.append(record["subset"])
    if not loaded.rows:
        raise ValueError(f"{path}: no pair can be used ({loaded.counts()})")
    return loaded, subsets


def read_sections(path: str | Path) -> dict[str, str]:
    """Subset -> section, from a JSON object. Raises ValueError for anything else."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no JSON file ({error})") from None
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError(f'{path}: give an object {{"subset": "section"}}')
    return table


def accuracy(rows: Sequence[Scored], sections: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Accuracies of subsets, sections and the whole with 95 % intervals, and the length baseline; JSON-ready.

    ``sections`` (subset -> section) weights subsets by their pairs. Without it RewardBench's sections are used, with
    the published weights, where all subsets are hers; else every subset is a section of its own.
    Subsets have Wilson's interval; weighted means combine them (MOVER: a limit lies sqrt(sum w^2 d^2) away, d the
    distance of the subset's limit).

    Raises:
        ValueError: no rows, or ``sections`` lacks a subset.
    """
    if not rows:
        raise ValueError("no pairs to measure")
    names = list(dict.fromkeys(row.subset for row in rows))
    weights: dict[str, dict[str, int]]
    kind = "pairs"
    if sections is not None:
        if lost := [name for name in names if name not in sections]:
            raise ValueError(f"no section for the subsets {', '.join(lost)}: name one for each")
        weights = {}
        for name in names:
            weights.setdefault(sections[name], {})[name] = sum(row.subset == name for row in rows)
    elif all(any(name in known for known in SECTIONS.values()) for name in names):
        found = {section: {k: w for k, w in known.items() if k in names} for section, known in SECTIONS.items()}
        kind = "published"
        weights = {section: known for section, known in found.items() if known}
    else:
        weights = {name: {name: 1} for name in names}
    measured = _measured(rows, weights)
    lengths = [Scored(row.subset, *row.lengths) for row in rows if row.lengths is not None]
    longer = _measured(lengths, weights) if len(lengths) == len(rows) else None
    return without_nan(measured | {"longer_wins": longer, "weights": kind})


def _measured(rows: Sequence[Scored], weights: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    subsets: dict[str, dict[str, Any]] = {}
    intervals: dict[str, Interval] = {}
    for name in [name for part in weights.values() for name in part]:
        pairs = [(r.chosen, r.rejected) for r in rows if r.subset == name]
        whole = [(a, b) for a, b in pairs if a is not None and b is not None]
        right, ties = sum(a > b for a, b in whole), sum(a == b for a, b in whole)
        intervals[name] = wilson(right, len(whole))
        counts = {"right": right, "ties": ties, "n": len(whole), "missing": len(pairs) - len(whole)}
        subsets[name] = _shown(intervals[name]) | counts
    of_section = {section: _mean(part, intervals) for section, part in weights.items()}
    overall = _mean(dict.fromkeys(of_section, 1), of_section)
    total = {key: sum(subset[key] for subset in subsets.values()) for key in ("right", "ties", "n", "missing")}
    pooled = _shown(wilson(total["right"], total["n"])) | total
    shown = {
        section: _shown(interval) | {"subsets": list(weights[section])} for section, interval in of_section.items()
    }
    return {"overall": _shown(overall), "pooled": pooled, "sections": shown, "subsets": subsets}


def _mean(weights: Mapping[str, int], parts: Mapping[str, Interval]) -> Interval:
    """Weighted mean of independent proportions with a MOVER interval (Zou and Donner 2008)."""
    total = sum(weights.values())
    shares = [(weight / total, parts[name]) for name, weight in weights.items()]
    middle = math.fsum(w * p.estimate for w, p in shares)
    below = math.sqrt(math.fsum((w * (p.estimate - p.low)) ** 2 for w, p in shares))
    above = math.sqrt(math.fsum((w * (p.high - p.estimate)) ** 2 for w, p in shares))
    return Interval(middle, middle - below, middle + above)


def _shown(interval: Interval) -> dict[str, Any]:
    return {"accuracy": interval.estimate, "low": interval.low, "high": interval.high}
