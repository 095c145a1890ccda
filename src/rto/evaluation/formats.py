"""The files of the public benchmarks: their questions in, a model's answers out, with the keys in the official order.

The answers can be judged by the official programs. What they need beyond the text stands in the question's own line
(``record``): ids, data set, category.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto.data.layouts import BadRow, Prompt, plain, prompt_of, text_of
from rto.evaluation.arena_style import Scoring, style_metadata

Record = dict[str, Any]
Counter = Callable[[str], int]  # text -> tokens

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # of short ids, 22 characters for 128 bits


@dataclass(frozen=True)
class Question:
    """``key`` names the question in its file. ``turns`` are what the user says; a chat is one turn."""

    key: str | int
    turns: list[Prompt]
    record: Record


@dataclass(frozen=True)
class Answer:
    """One text a turn, and how each ended. ``number`` counts the questions of the file from 1."""

    question: Question
    number: int
    texts: list[str]
    finished: list[bool]
    model: str
    time: float  # Unix seconds


# --- questions ----------------------------------------------------------------------------------------


def read_records(path: str | Path) -> list[Record]:
    """The objects of a JSON array or of JSON lines. Raises ValueError with the file and the line."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{path}: file not found (looked for {file.absolute()})")
    found: list[tuple[int, Any]] = []
    where = ""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            found = list(enumerate(json.loads(text), 1))
        else:
            for number, line in enumerate(text.split("\n"), 1):
                where = f", line {number}"
                if line.strip():
                    found.append((number, json.loads(line)))
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8
        raise ValueError(f"{path}{where}: not JSON ({error}): give a JSON array, or an object a line") from None
    for number, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, row {number}: {type(record).__name__}, not an object")
    if not found:
        raise ValueError(f"{path}: no rows")
    return [record for _, record in found]


def read_questions(path: str | Path, format: str) -> list[Question]:
    """The questions of a file in the layout that ``format`` reads, each key once.

    Raises:
        ValueError: an unknown format, or a row of another layout.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: {', '.join(FORMATS)}")
    questions: list[Question] = []
    seen: dict[str | int, int] = {}
    for number, record in enumerate(read_records(path), 1):
        try:
            question = FORMATS[format].question(record, number)
        except (LookupError, TypeError, BadRow) as error:
            detail = str(error) if isinstance(error, BadRow) else f"found the keys {plain(', '.join(record)) or 'none'}"
            wants = FORMATS[format].wants
            raise ValueError(
                f"{path}, row {number}: --format {format} reads questions with {wants} ({detail})"
            ) from None
        if question.key in seen:
            raise ValueError(f"{path}, row {number}: {_short(question.key)} stands in row {seen[question.key]} already")
        seen[question.key] = number
        questions.append(question)
    return questions


def _short(key: str | int) -> str:
    text = repr(key)
    return text if len(text) <= 60 else text[:57] + "..."


def _asked(value: Any, where: str) -> str:
    text = text_of(value, where)
    if not text.strip():
        raise BadRow("empty_prompt", f"{where} is empty")
    return text


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _plain_question(record: Record, number: int) -> Question:
    return Question(number, [prompt_of(record)], record)


def _alpaca_question(record: Record, number: int) -> Question:
    text = _asked(record["instruction"], "instruction")
    return Question(text, [text], record)


def _arena_question(record: Record, number: int) -> Question:
    """Both layouts, whichever of the two is to be written. Only the first turn is used, as the judges do."""
    if "prompt" in record:
        return Question(text_of(record["uid"], "uid"), [_asked(record["prompt"], "prompt")], record)
    asked = _asked(record["turns"][0]["content"], "the first turn")
    return Question(text_of(record["question_id"], "question_id"), [asked], record)


def _mtbench_question(record: Record, number: int) -> Question:
    turns = record["turns"]
    if not (isinstance(turns, list) and len(turns) == 2):
        raise BadRow("wrong_type", "turns is not a list of two")
    text_of(record["category"], "category")
    asked: list[Prompt] = [_asked(turn, f"turn {count}") for count, turn in enumerate(turns, 1)]
    return Question(_number(record["question_id"]), asked, record)


# --- answers ------------------------------------------------------------------------------------------


def short_id(*names: str | int) -> str:
    """22 characters that depend on the names alone, so that the same answer has the same id in every run."""
    number = int.from_bytes(hashlib.blake2b(json.dumps(names).encode(), digest_size=16).digest(), "big")
    out = ""
    for _ in range(22):
        number, digit = divmod(number, len(_ALPHABET))
        out += _ALPHABET[digit]
    return out


def plain_row(answer: Answer, count: Counter | None) -> Record:
    """Ours. ``prompt`` is the prompt as its file has it; ``question`` is its number there, from 1."""
    (text,), (finished,) = answer.texts, answer.finished
    prompt = answer.question.turns[0]
    return {
        "question": answer.number,
        "prompt": prompt,
        "answer": text,
        "finished": finished,
        "model": answer.model,
    }


def alpaca_row(answer: Answer, count: Counter | None) -> Record:
    """One object of AlpacaEval's ``model_outputs.json``."""
    row = {"instruction": answer.question.key, "output": answer.texts[0], "generator": answer.model}
    return row | {key: answer.question.record[key] for key in ("dataset", "datasplit") if key in answer.question.record}


def arena_row(answer: Answer, count: Counter | None) -> Record:
    """One line of Arena-Hard's ``model_answer/MODEL.jsonl``; without ``count`` (tokens) there is no ``metadata``."""
    text = answer.texts[0]
    row = {
        "uid": answer.question.key,
        "ans_id": _answer_id(answer),
        "model": answer.model,
        "messages": [
            {"role": "user", "content": answer.question.turns[0]},
            {"role": "assistant", "content": {"answer": text}},
        ],
        "tstamp": answer.time,
    }
    return row | ({"metadata": style_metadata(text, count)} if count else {})


def arena_classic_row(answer: Answer, count: Counter | None) -> Record:
    """The same before April 2025; without ``count`` there is no ``token_len`` and no ``conv_metadata``."""
    text = answer.texts[0]
    turn = {"content": text} | ({"token_len": count(text)} if count else {})
    row = _choices(answer, [turn])
    return row | ({"conv_metadata": style_metadata(text, count)} if count else {})


def mtbench_row(answer: Answer, count: Counter | None) -> Record:
    """One line of MT-Bench's ``model_answer/MODEL.jsonl``."""
    return _choices(answer, list(answer.texts))


def _choices(answer: Answer, turns: Sequence[Any]) -> Record:
    return {
        "question_id": answer.question.key,
        "answer_id": _answer_id(answer),
        "model_id": answer.model,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": answer.time,
    }


def _answer_id(answer: Answer) -> str:
    return short_id(answer.model, answer.question.key, *answer.texts)


@dataclass(frozen=True)
class Format:
    """A layout: what its questions look like, the row of an answer, and how a written row names its question."""

    wants: str
    question: Callable[[Record, int], Question]
    row: Callable[[Answer, Counter | None], Record]
    key: str
    model: str
    array: bool = False  # one JSON array; else JSON lines
    counted: Scoring | None = None  # whose tokens ``token_len`` counts, see arena_style.token_counter

    def key_of(self, row: Mapping[str, Any]) -> str | int:
        """The question that a written row answers. Raises ValueError for a row of another format."""
        if self.key not in row or self.model not in row:
            keys = plain(", ".join(row)) or "none"
            raise ValueError(f"a row with the keys {keys} and without {self.key} and {self.model}")
        return row[self.key]


FORMATS: dict[str, Format] = {
    "jsonl": Format("prompt or messages", _plain_question, plain_row, "question", "model"),
    "alpaca": Format("instruction", _alpaca_question, alpaca_row, "instruction", "generator", array=True),
    "arena": Format("uid and prompt", _arena_question, arena_row, "uid", "model", counted="current"),
    "arena-classic": Format(
        "question_id and turns of content",
        _arena_question,
        arena_classic_row,
        "question_id",
        "model_id",
        False,
        "classic",
    ),
    "mtbench": Format(
        "a whole question_id, category and two turns", _mtbench_question, mtbench_row, "question_id", "model_id"
    ),
}
