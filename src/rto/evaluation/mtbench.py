"""MT-Bench (arXiv 2306.05685): a judge grades both turns of every conversation, or compares two models.

How ratings and verdicts are read, and what is averaged, is as released (FastChat ``llm_judge``).
A judgment is one row: ``question_id, model, judge, template, user_prompt, judgment, score, turn, tstamp, category``,
``score`` None where the reply has no rating.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rto.evaluation.endpoint import read_rows, utc
from rto.evaluation.formats import read_records
from rto.evaluation.mtbench_prompts import Turns
from rto.evaluation.winrate import paired_bootstrap

Row = dict[str, Any]
Verdict = Literal["A", "B", "tie", "error"]

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # of the answers
TEMPERATURES |= dict.fromkeys(("reasoning", "math", "coding", "extraction"), 0.0)
OTHER_TEMPERATURE = 0.7
ASKED = ("question_id", "judge", "template", "user_prompt", "turn", "time")  # keys of every reply
FIRST = 81  # question_id of the first of the 80 published questions: ten a category, in the order of CATEGORIES

_DOUBLE = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_SINGLE = re.compile(r"\[(\d+\.?\d*)\]")


def parse_rating(reply: str) -> float | None:
    """The first number in double brackets, else in single ones; None without any. The range is not checked here."""
    found = _DOUBLE.search(reply) or _SINGLE.search(reply)
    return float(found[1]) if found else None


def parse_verdict(reply: str) -> Verdict:
    """[[A]], [[B]] and [[C]] are looked for in this order, so a reply with two of them counts as the first."""
    found: dict[str, Verdict] = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
    return next((verdict for mark, verdict in found.items() if mark in reply), "error")


def category_of(question_id: int) -> str | None:
    """The category of a published question, by its id (81 to 160)."""
    place = (question_id - FIRST) // 10
    return CATEGORIES[place] if 0 <= place < len(CATEGORIES) else None


def read_answers(path: str | Path) -> dict[str, Turns]:
    """Model -> question -> answers, from an answer file (of references too). Raises ValueError naming the row."""
    found: dict[str, Turns] = {}
    for number, row in enumerate(read_records(path), 1):
        try:
            key, model, turns = row["question_id"], row["model_id"], row["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"{path}, row {number}: no MT-Bench answer (question_id, model_id, choices); write them with "
                "`rto generate --format mtbench`"
            ) from None
        if len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{path}, row {number}: question {key} has not two answers as text")
        if key in found.setdefault(model, {}):
            raise ValueError(f"{path}, row {number}: a second answer of {model} to question {key}")
        found[model][key] = list(turns)
    return found


# --- judgments ----------------------------------------------------------------------------------------


def single_judgments(replies: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rated judgments from rows of :func:`~rto.evaluation.endpoint.ask_all`; a failed call has no score."""
    rows = []
    for reply in replies:
        text = reply["reply"]
        row = {key: reply[key] for key in ("question_id", "model", "judge", "template", "user_prompt")}
        row |= {"judgment": text or "", "score": None if text is None else parse_rating(text)}
        rows.append(row | {"turn": reply["turn"], "tstamp": _seconds(reply["time"]), "category": reply["category"]})
    return rows


def read_single(path: str | Path) -> list[Row]:
    """Judgments from ``JUDGE_single.jsonl`` (a score of -1: none), or from a file of replies that ``rto`` asked for.

    Raises:
        ValueError: a row is something else, or a judge graded a turn twice.
    """
    if replies := read_replies(path):
        _need(path, replies, (*ASKED, "model", "category"))
        return _once(path, single_judgments(replies))
    found = []
    for number, row in enumerate(read_records(path), 1):
        try:
            judge, template = row["judge"]
            score = row["score"]
            kept = {key: row[key] for key in ("question_id", "model", "user_prompt", "judgment")}
            kept |= {"judge": judge, "template": template, "turn": row["turn"], "tstamp": row.get("tstamp")}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, row {number}: no MT-Bench judgment (found {', '.join(row)})") from None
        if not isinstance(score, int | float) or isinstance(score, bool) or row["turn"] not in (1, 2):
            raise ValueError(f"{path}, row {number}: score {score!r} of turn {row['turn']!r}: a number, turn 1 or 2")
        found.append(kept | {"score": None if score == -1 else float(score)})
    return _once(path, found)


def read_judgments(path: str | Path) -> tuple[Literal["single", "pair"], list[Row]]:
    """What kind of judgments a file holds, and they themselves. Raises as the readers of either kind."""
    replies = read_replies(path)
    pair = "game" in replies[0] if replies else "g1_winner" in read_records(path)[0]
    return ("pair", read_pairs(path)) if pair else ("single", read_single(path))


def read_replies(path: str | Path) -> list[Row]:
    """The rows of a file of replies that ``rto`` asked for; none of any other file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{path}: file not found (looked for {file.absolute()})")
    with file.open("rb") as lines:
        return read_rows(file) if b'"reply":' in lines.readline() else []


def _need(path: str | Path, rows: Sequence[Row], keys: Sequence[str]) -> None:
    for number, row in enumerate(rows, 1):
        if missing := [key for key in keys if key not in row]:
            where = f"reply {row['key']!r}" if "reply" in row else f"row {number}"
            raise ValueError(f"{path}, {where}: no MT-Bench judgment: it lacks {', '.join(missing)}")


def _seconds(time: str) -> float:
    """The time of a reply as Unix seconds."""
    return datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()


def judged(rows: Iterable[Row]) -> list[str | None]:
    """The first and the last time (UTC) of judgments, where they tell it."""
    times = [row["tstamp"] for row in rows if isinstance(row.get("tstamp"), (int, float))]
    return [utc(min(times)), utc(max(times))] if times else [None, None]


def _once(path: str | Path, rows: list[Row]) -> list[Row]:
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        key = (row["judge"], row["model"], row["question_id"], row["turn"])
        if key in seen:
            raise ValueError(f"{path}: {key[0]} grades {key[1]} twice on question {key[2]}, turn {key[3]}: keep one")
        seen.add(key)
    return rows


def write_single(path: str | Path, rows: Sequence[Row]) -> None:
    """``JUDGE_single.jsonl`` with the official keys in their order; -1 where there is no rating."""
    lines = []
    for row in rows:
        official = {"question_id": row["question_id"], "model": row["model"], "judge": [row["judge"], row["template"]]}
        official |= {"user_prompt": row["user_prompt"], "judgment": row["judgment"]}
        official |= {
            "score": -1 if row["score"] is None else row["score"],
            "turn": row["turn"],
            "tstamp": row["tstamp"],
        }
        lines.append(json.dumps(official, ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def summarise(rows: Sequence[Row], categories: Mapping[int, str] | None = None) -> dict[str, dict[str, Any]]:
    """Scores of every model under one judge, best first; JSON-ready.

    ``average`` is the mean over all rated (question, turn) rows, not over the two turn means. ``se`` is its standard
    error over questions: with e_q the sum of a question's deviations from the average, N rated rows and Q questions,
    sqrt(Q / (Q - 1) sum e_q^2) / N; with every turn rated that is the deviation of the questions' means over sqrt(Q).
    Rows without a rating are ``dropped``; ratings outside 1..10 are counted and kept, as released.
    ``categories``: by question_id; default: that of the row, else of the published question.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {}
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        rated = [row for row in mine if row["score"] is not None]
        named: dict[str, list[Row]] = {}
        for row in rated:
            known = (categories or {}).get(row["question_id"]) or row.get("category") or category_of(row["question_id"])
            named.setdefault(known or "other", []).append(row)
        order = [name for name in CATEGORIES if name in named] + [name for name in named if name not in CATEGORIES]
        found[model] = _scores(rated) | {
            "dropped": len(mine) - len(rated),
            "out_of_range": sum(not 1 <= row["score"] <= 10 for row in rated),
            "categories": {name: _scores(named[name]) for name in order},
        }
    return dict(sorted(found.items(), key=lambda item: -(item[1]["average"] or -math.inf)))


def _scores(rated: Sequence[Row]) -> dict[str, Any]:
    values = [row["score"] for row in rated]
    average = math.fsum(values) / len(values) if values else None
    apart: dict[int, float] = {}
    for row in rated:
        assert average is not None
        apart[row["question_id"]] = apart.get(row["question_id"], 0.0) + row["score"] - average
    se = None
    if len(apart) > 1:
        se = math.sqrt(len(apart) / (len(apart) - 1) * math.fsum(e * e for e in apart.values())) / len(values)
    turns = {turn: [row["score"] for row in rated if row["turn"] == turn] for turn in (1, 2)}
    means = {f"turn_{turn}": math.fsum(v) / len(v) if v else None for turn, v in turns.items()}
    return {"average": average, "se": se} | means | {"rows": len(values), "questions": len(apart)}


# --- pairs --------------------------------------------------------------------------------------------


def pair_judgments(replies: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row a question and turn, as ``JUDGE_pair.jsonl`` has them, from the two games; winners are mapped back.

    Raises:
        ValueError: a game is missing.
    """
    games: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for reply in replies:
        key = (reply["model_1"], reply["model_2"], reply["question_id"], reply["turn"])
        games.setdefault(key, {})[reply["game"]] = reply
    rows = []
    for (first, second, question, turn), both in games.items():
        if len(both) < 2:
            raise ValueError(
                f"{first} against {second}, question {question}, turn {turn}: one game only: judge the rest"
            )
        texts = {game: both[game]["reply"] or "" for game in (1, 2)}
        row = {"question_id": question, "model_1": first, "model_2": second}
        row |= {f"g{game}_winner": _winner(parse_verdict(texts[game]), game) for game in (1, 2)}
        row["judge"] = [both[1]["judge"], both[1]["template"]]
        for game in (1, 2):
            row |= {f"g{game}_user_prompt": both[game]["user_prompt"], f"g{game}_judgment": texts[game]}
        rows.append(row | {"turn": turn, "tstamp": _seconds(both[2]["time"])})
    return rows


def _winner(verdict: Verdict, game: int) -> str:
    if verdict in ("tie", "error"):
        return verdict
    return "model_1" if (verdict == "A") == (game == 1) else "model_2"


def summarise_pairs(rows: Sequence[Row], rounds: int = 10_000, seed: int = 0) -> list[dict[str, Any]]:
    """Win, tie and loss of model_1 for every pair of models: both games agree, or it is a tie; JSON-ready.

    A row with an error in either game is dropped. ``win_rate_adjusted`` = (win + tie / 2) / n, with a percentile
    bootstrap interval of the questions' means.
    """
    found = []
    for first, second in dict.fromkeys((row["model_1"], row["model_2"]) for row in rows):
        mine = [row for row in rows if (row["model_1"], row["model_2"]) == (first, second)]
        points: dict[int, list[float]] = {}
        for row in mine:
            one, other = row["g1_winner"], row["g2_winner"]
            if "error" in (one, other):
                continue
            points.setdefault(row["question_id"], []).append(
                0.5 if one != other or one == "tie" else float(one == "model_1")
            )
        flat = [p for values in points.values() for p in values]
        n, win, loss = len(flat), flat.count(1.0), flat.count(0.0)
        entry: dict[str, Any] = {"model_1": first, "model_2": second, "win": win, "tie": n - win - loss, "loss": loss}
        entry |= {"n": n, "dropped": len(mine) - n}
        entry |= {"win_rate": win / n if n else None, "loss_rate": loss / n if n else None}
        entry["win_rate_adjusted"] = sum(flat) / n if n else None
        interval = None
        if len(points) > 1:
            means = np.array([np.mean(values) for values in points.values()])
            interval = paired_bootstrap(means, rounds, seed)
        found.append(entry | {"low": interval and interval.low, "high": interval and interval.high})
    return found


def read_pairs(path: str | Path) -> list[Row]:
    """Rows of ``JUDGE_pair.jsonl``, or of a file of replies that ``rto`` asked for.

    Raises:
        ValueError: a row is something else.
    """
    if replies := read_replies(path):
        _need(path, replies, (*ASKED, "model_1", "model_2", "game"))
        return pair_judgments(replies)
    rows = read_records(path)
    _need(path, rows, ("question_id", "model_1", "model_2", "judge"))
    for number, row in enumerate(rows, 1):
        if not (isinstance(row["judge"], list) and row["judge"]):
            raise ValueError(f"{path}, row {number}: judge = {row['judge']!r}: a list, [JUDGE, TEMPLATE]")
        winners = {row.get("g1_winner"), row.get("g2_winner")}
        if not winners <= {"model_1", "model_2", "tie", "error"}:
            raise ValueError(f"{path}, row {number}: winners {winners}, not model_1, model_2, tie or error")
    return rows


def write_pairs(path: str | Path, rows: Sequence[Row]) -> None:
    """``JUDGE_pair.jsonl``."""
    Path(path).write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", errors="backslashreplace"
    )
