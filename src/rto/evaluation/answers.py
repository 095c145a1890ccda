"""Answers of a model, read from files: our own JSONL, and AlpacaEval's ``model_outputs.json``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

OnMissing = Literal["error", "skip"]


@dataclass(frozen=True)
class Answer:
    """``id`` is a hash of the prompt, the same in every file. ``finished``: False for one cut at the length limit."""

    id: str
    prompt: str
    answer: str
    model: str
    category: str | None = None
    finished: bool | None = None


def prompt_id(prompt: str) -> str:
    """16 hex digits of the prompt's SHA-256."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_answers(path: Path | str) -> list[Answer]:
    """One answer a prompt, in the order of the file, all of one model.

    A row has ``prompt`` (text, or chat messages) and ``answer``, as our answers files, or ``instruction`` and
    ``output``, as AlpacaEval's. A ``conversation`` goes before a ``prompt``, which has the marks of a template. The
    model is the row's ``policy``, ``model`` or ``generator``, else the file's name less ``answers-``. The file is JSONL
    or one JSON array.

    Raises:
        ValueError: no such file; a row lacks text; prompts asked more than once; several models; no rows.
    """
    path = Path(path)
    answers = [_answer(row, f"{path}, row {number}", path) for number, row in enumerate(_rows(path), 1)]
    if not answers:
        raise ValueError(f"{path}: no answers in it")
    again = [count - 1 for count in Counter(answer.id for answer in answers).values() if count > 1]
    if again:
        raise ValueError(
            f"{path}: {len(again)} prompts occur more than once, {sum(again)} rows too many: keep one answer a prompt"
        )
    if len(models := sorted({answer.model for answer in answers})) > 1:
        raise ValueError(f"{path}: answers of {len(models)} models ({', '.join(models[:4])}): give each its own file")
    return answers


def pair_answers(
    a: list[Answer], b: list[Answer], on_missing: OnMissing = "error"
) -> tuple[list[tuple[Answer, Answer]], tuple[int, int]]:
    """The answers of both models to the same prompts, by id; and how many of a's and of b's had no partner.

    The order depends on the prompts alone, so that swapping or sorting the files changes nothing.

    Raises:
        ValueError: prompts without a partner, unless ``on_missing`` is "skip"; no common prompt.
    """
    first, second = {answer.id: answer for answer in a}, {answer.id: answer for answer in b}
    common = sorted(first.keys() & second.keys())
    missing = (len(first) - len(common), len(second) - len(common))
    names = f"{a[0].model if a else 'a'} and {b[0].model if b else 'b'}"
    if not common:
        raise ValueError(f"{names} have no prompt in common ({len(first)} and {len(second)} answers)")
    if any(missing) and on_missing == "error":
        raise ValueError(
            f"{names}: {missing[0]} and {missing[1]} answers to prompts that the other lacks, {len(common)} in common: "
            "answer the same prompts, or leave those out with --on-missing skip"
        )
    return [(first[key], second[key]) for key in common], missing


def _rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file of answers")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path}: neither JSON lines nor a JSON array ({error})") from error


def _answer(row: Any, where: str, path: Path) -> Answer:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    alpaca = "instruction" in row and "output" in row
    prompt = _prompt(row.get("conversation") or row.get("instruction" if alpaca else "prompt"))
    answer = row.get("output" if alpaca else "answer")
    if not prompt or not isinstance(answer, str):
        wanted = "instruction and output" if alpaca else "prompt and answer"
        raise ValueError(f"{where}: {wanted} must be there, as text")
    names = [row[key] for key in ("policy", "model", "generator") if row.get(key)]
    category = row.get("category") or row.get("dataset")
    model = str(names[0]) if names else path.stem.removeprefix("answers-")
    finished = row.get("finished")
    return Answer(
        prompt_id(prompt),
        prompt,
        answer,
        model,
        str(category) if category else None,
        finished if isinstance(finished, bool) else None,
    )


def _prompt(value: Any) -> str | None:
    """Text as it is; of a chat a single message's text, or the turns under their roles."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return None
    turns = [(turn.get("role"), turn.get("content")) for turn in value]
    if not turns or not all(isinstance(part, str) for turn in turns for part in turn):
        return None
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{str(role).capitalize()}: {content}" for role, content in turns)
