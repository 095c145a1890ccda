"""What is in the data of a run: rows, lengths in tokens, what was cut, what comes twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rto.data.chat import Encoder, PairRow, PromptRow
from rto.data.rows import Rows


@dataclass(frozen=True)
class Lengths:
    """In tokens, as training sees them; ``cut`` texts were longer."""

    count: int
    median: int
    most: int  # 90 % have at most so many
    longest: int
    cut: int


@dataclass(frozen=True)
class DataReport:
    """``rows`` by part, ``lengths`` by part and side, ``duplicates`` by kind, and the numbers of the rejected rows by
    reason."""

    rows: dict[str, int]
    lengths: dict[str, Lengths]
    duplicates: dict[str, int]
    rejected: dict[str, list[int]]


def data_report(rows: Rows) -> DataReport:
    """Texts count as the same when they differ in case and white space only."""
    parts: dict[str, Sequence[Any]] = {
        "demonstrations": rows.answers,
        "training pairs": rows.pairs,
        "RL prompts": rows.prompts,
        "held-out pairs": rows.test_pairs,
        "held-out prompts": rows.test_prompts,
        "oracle pairs": rows.oracle_pairs,
        "scored answers": rows.scored,
    }
    lengths = {}
    for name, part in parts.items():
        if not part:
            continue
        if name != "held-out prompts":
            lengths[f"{name}: prompts"] = _prompt_lengths(rows.encoder, part)
        if name not in ("RL prompts", "held-out prompts"):
            answers = [answer for row in part for answer in _answers(row)]
            lengths[f"{name}: answers"] = summary([len(ids) for ids, _ in answers], sum(not end for _, end in answers))
    rejected: dict[str, list[int]] = {}
    for bad in rows.rejected:
        rejected.setdefault(bad.reason, []).append(bad.row)
    always = ("scored answers",)
    counts = {name: len(part) for name, part in parts.items() if part or name not in always}
    return DataReport(counts, lengths, duplicates(rows), rejected)


def summary(lengths: Sequence[int], cut: int) -> Lengths:
    """Median (the lower of two), the smallest length that 90 % do not exceed, and the largest."""
    ordered = sorted(lengths)

    def at(share: float) -> int:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Lengths(len(ordered), at(0.5), at(0.9), ordered[-1], cut)


def duplicates(rows: Rows) -> dict[str, int]:
    """How many rows repeat an earlier one, in the training pairs and between them and the held-out pairs."""
    encoder = rows.encoder
    trained, held_out = _by_prompt(rows.pairs), _by_prompt(rows.test_pairs)
    repeated = [same for same in trained.values() if len(same) > 1]
    shared = [prompt for prompt in held_out if prompt in trained]
    answered = 0
    for prompt in shared:
        known = {text for row in trained[prompt] for text in _texts(encoder, row)}
        answered += sum(any(text in known for text in _texts(encoder, row)) for row in held_out[prompt])
    demonstrated = [same for same in _by_prompt(rows.answers).values() if len(same) > 1]
    return {
        "training pairs with the prompt of an earlier one": sum(len(same) - 1 for same in repeated),
        "training pairs with prompt and answers of an earlier one": _repeats(encoder, repeated),
        "demonstrations with prompt and answer of an earlier one": _repeats(encoder, demonstrated),
        "held-out pairs with the prompt of a training pair": sum(len(held_out[prompt]) for prompt in shared),
        "held-out pairs with prompt and an answer of a training pair": answered,
    }


def fold(text: str) -> str:
    """Without differences of case and white space."""
    return " ".join(text.casefold().split())


def _by_prompt(rows: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(fold(row.prompt_text), []).append(row)
    return found


def _repeats(encoder: Encoder, groups: Iterable[list[Any]]) -> int:
    return sum(count - 1 for same in groups for count in Counter(_texts(encoder, row) for row in same).values())


def _texts(encoder: Encoder, row: Any) -> tuple[str, ...]:
    return tuple(fold(encoder.decode(ids)) for ids, _ in _answers(row))


def _answers(row: Any) -> list[tuple[list[int], bool]]:
    """Ids of a row's answers, and whether each is whole."""
    if isinstance(row, PairRow):
        return [(row.chosen, row.chosen_finished), (row.rejected, row.rejected_finished)]
    if hasattr(row, "answers"):
        return list(zip(row.answers, row.finished, strict=True))
    return [(row.answer, row.finished)]


def _prompt_lengths(encoder: Encoder, part: Sequence[Any]) -> Lengths:
    """A prompt at the limit was cut if its text has more tokens."""
    cut, lengths = 0, []
    for row in part:
        ids, text = (row.ids, row.text) if isinstance(row, PromptRow) else (row.prompt, row.prompt_text)
        lengths.append(len(ids))
        cut += len(ids) >= encoder.max_prompt and len(encoder._ids(text)) > encoder.max_prompt
    return summary(lengths, cut)
