"""Files of Arena-Hard: judgments in and out, answers in, in the current layout, the classic one and our own.

``current``: uid, games with {score, judgment: {answer}, prompt}. ``classic`` (before April 2025): question_id, games
with {score, judgment, user_prompt}. Ours: the endpoint's JSONL, one game a row. Questions are read, and answers
written, by ``formats``. Model names lose their path, as in the released scoring.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rto.evaluation.arena import Game, Judgment, known_label
from rto.evaluation.arena_judge import judgments_of_replies
from rto.evaluation.arena_style import ENCODINGS, Scoring, features, style_metadata, token_counter
from rto.evaluation.endpoint import read_rows
from rto.evaluation.formats import Record, read_records

CLASSIC_BASELINE = "gpt-4-0314"  # classic files do not name it

FeatureRow = tuple[float, float, float, float]


@dataclass(frozen=True)
class StoredAnswer:
    """``metadata`` are the stored style counts, ``layout`` says with which tokenizer; None: the file has none."""

    text: str
    metadata: Record | None
    layout: Scoring


# --- judgments ----------------------------------------------------------------------------------------


def judgment_files(path: str | Path, judge: str | None = None) -> list[Path]:
    """The JSONL files of a path: itself, those in it, or those of the one judge in its ``model_judgment``.

    ``judge``, as the judgments name it, chooses between several. Raises ValueError when there is none or more than one.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder of judgments")
    if (path / "model_judgment").is_dir():
        judges = sorted(folder for folder in (path / "model_judgment").iterdir() if folder.is_dir())
        chosen = [folder for folder in judges if judge is None or folder.name == judge_folder(judge)]
        if len(chosen) != 1:
            names = ", ".join(folder.name for folder in judges) or "none"
            wanted = "" if judge is None else f", and judgments of {judge} lie in {judge_folder(judge)}"
            raise ValueError(f"{path / 'model_judgment'}: judges are {names}{wanted}: name the folder of one of them")
        path = chosen[0]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{path}: no .jsonl files of judgments there")
    return files


def judge_folder(judge: str) -> str:
    """The name of a judge's folder in ``model_judgment``."""
    return judge.replace("/", "_")


def answer_folder(path: str | Path) -> Path | None:
    """``model_answer`` beside the ``model_judgment`` that ``path`` is, holds or lies in."""
    path = Path(path).expanduser().absolute()
    for folder in (path / "model_judgment", path, *path.parents):
        if folder.name == "model_judgment" and (folder.parent / "model_answer").is_dir():
            return folder.parent / "model_answer"
    return None


def read_judgments(path: str | Path, scoring: Scoring, baseline: str | None = None) -> list[Judgment]:
    """The judgments of one file, in its own layout. ``scoring`` reads the verdicts of our own rows.

    ``baseline`` keeps the judgments against it, and names it where the file does not (classic files: gpt-4-0314
    without it). Raises ValueError naming file, row and key.
    """
    path = Path(path).expanduser()
    if _is_ours(path):
        found = judgments_of_replies(read_rows(path), scoring, str(path))
        judgments = [replace(j, model=_name(j.model), baseline=_name(j.baseline)) for j in found]
    else:
        rows = enumerate(read_records(path), start=1)
        judgments = [_judgment(row, f"{path}, row {number}", baseline) for number, row in rows]
    kept = [j for j in judgments if baseline is None or j.baseline == _name(baseline)]
    if not kept:
        others = ", ".join(sorted({j.baseline for j in judgments})) or "none"
        raise ValueError(f"{path}: no judgment against the baseline {baseline!r}; the baselines there: {others}")
    return kept


def write_judgments(path: str | Path, judgments: Sequence[Judgment], layout: Scoring) -> None:
    """One file for the official scoring, normally ``model_judgment/JUDGE/MODEL.jsonl``.

    A score that is no label of the layout is written as null: the released code of ``current`` fails on others. In
    ``classic`` a missing game becomes one without a score.
    """
    lines = []
    for judgment in judgments:
        games = [_game_row(game, layout) for game in judgment.games]
        if layout == "current":
            row = {"uid": judgment.uid, "category": judgment.category, "judge": judgment.judge}
            row |= {"model": judgment.model, "baseline": judgment.baseline}
        else:
            row = {"question_id": judgment.uid, "model": judgment.model, "judge": judgment.judge}
        lines.append(json.dumps(row | {"games": games}, ensure_ascii=False) + "\n")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


# --- answers and their style --------------------------------------------------------------------------


def read_answers(path: str | Path) -> dict[str, StoredAnswer]:
    """Answers by question id, of a ``model_answer/MODEL.jsonl`` in either layout. Raises ValueError naming the row."""
    answers: dict[str, StoredAnswer] = {}
    for number, row in enumerate(read_records(path), start=1):
        where = f"{path}, row {number}"
        if "messages" in row:
            uid, text = _text(row, "uid", where), _current_text(row, where)
            answer = StoredAnswer(text, _metadata(row, "metadata", where), "current")
        elif "choices" in row:
            uid, text = _text(row, "question_id", where), _classic_text(row, where)
            answer = StoredAnswer(text, _metadata(row, "conv_metadata", where), "classic")
        else:
            keys = ", ".join(row) or "none"
            raise ValueError(f"{where}: neither messages (current) nor choices (classic); it has {keys}")
        if uid in answers:
            raise ValueError(f"{where}: question {uid} is answered in a row before: remove one of them")
        answers[uid] = answer
    return answers


def answers_of(model: str, folders: Sequence[str | Path]) -> dict[str, StoredAnswer]:
    """The answers of a model from the first folder that has ``MODEL.jsonl``. Raises ValueError when none has."""
    for folder in folders:
        file = Path(folder).expanduser() / f"{model}.jsonl"
        if file.is_file():
            return read_answers(file)
    looked = ", ".join(map(str, folders)) or "nowhere"
    raise ValueError(f"no answers of {model}: no {model}.jsonl in {looked}; name its folder with --answers DIR")


def style_features(
    answers: Mapping[str, Mapping[str, StoredAnswer]], scoring: Scoring
) -> tuple[dict[str, dict[str, FeatureRow]], str]:
    """Feature rows by model and question, and whose tokens they count.

    Stored counts are taken when every answer has them in the layout of ``scoring``, which is that of its tokenizer.
    Else all answers are counted here: two counters in one ratio would be a style of their own.
    """
    everything = [answer for of_model in answers.values() for answer in of_model.values()]
    if all(answer.metadata is not None and answer.layout == scoring for answer in everything):
        read = {
            model: {uid: features(answer.metadata or {}) for uid, answer in of_model.items()}
            for model, of_model in answers.items()
        }
        return read, f"stored in the answer files ({ENCODINGS[scoring]})"
    name, count = token_counter(scoring)
    counted = {
        model: {uid: features(style_metadata(answer.text, count)) for uid, answer in of_model.items()}
        for model, of_model in answers.items()
    }
    return counted, name


# --- rows ---------------------------------------------------------------------------------------------


def _is_ours(path: Path) -> bool:
    """Whether the file has one game a row: told from its first row, the last may be cut."""
    if not path.is_file():
        return False  # read_records says so
    with path.open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and "game" in row


def _judgment(row: Record, where: str, baseline: str | None) -> Judgment:
    if "uid" not in row and "question_id" not in row:
        raise ValueError(f"{where}: no uid (current) and no question_id (classic); it has {', '.join(row) or 'none'}")
    classic = "uid" not in row
    uid = _text(row, "question_id" if classic else "uid", where)
    if classic:
        against = baseline or CLASSIC_BASELINE
    elif "baseline" in row:
        against = _text(row, "baseline", where)
    elif baseline is not None:
        against = baseline
    else:
        raise ValueError(f"{where}: no baseline: name it with --baseline")
    games = row.get("games")
    if not isinstance(games, list) or len(games) != 2:
        raise ValueError(f"{where}: games = {_short(games)}: a list of two games is needed")
    first, second = (_game(game, f"{where}, game {number}") for number, game in enumerate(games, start=1))
    names = (_name(_text(row, "model", where)), _name(against), _text(row, "judge", where))
    return Judgment(uid, str(row.get("category") or ""), *names, (first, second))


def _game(game: Any, where: str) -> Game | None:
    if game is None:
        return None
    if not isinstance(game, dict):
        raise ValueError(f"{where}: {_short(game)} is no object")
    score = game.get("score")
    if "score" not in game or not (score is None or isinstance(score, str)):
        raise ValueError(f"{where}: score = {_short(score)}: a label such as A>B or null is needed")
    said, prompt = game.get("judgment"), game.get("prompt") or ()
    text = said.get("answer") if isinstance(said, dict) else said
    if "user_prompt" in game:
        prompt = ({"role": "user", "content": str(game["user_prompt"])},)
    return Game(score, str(text or ""), tuple(prompt))


def _game_row(game: Game | None, layout: Scoring) -> Record | None:
    if layout == "current":
        if game is None:
            return None
        score = game.score if known_label(game.score, layout) else None
        return {"score": score, "judgment": {"answer": game.text}, "prompt": list(game.prompt)}
    game = game or Game(None)
    user = next((message["content"] for message in game.prompt if message["role"] == "user"), "")
    return {
        "user_prompt": user,
        "judgment": game.text,
        "score": game.score if known_label(game.score, layout) else None,
    }


def _current_text(row: Record, where: str) -> str:
    messages = row["messages"]
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    if not isinstance(content, dict) or not isinstance(content.get("answer"), str):
        raise ValueError(f"{where}: messages: the last one's content is an object with the key answer, a text")
    return content["answer"]


def _classic_text(row: Record, where: str) -> str:
    try:
        text = row["choices"][0]["turns"][0]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{where}: choices[0].turns[0].content is missing or no text")
    return text


def _metadata(row: Record, key: str, where: str) -> Record | None:
    found = row.get(key)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {key} = {_short(found)} is no object of counts")
    try:
        features(found)
    except ValueError as error:
        raise ValueError(f"{where}: {key}: {error}") from None
    return found


def _text(row: Record, key: str, where: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise ValueError(f"{where}: {key} = {_short(row.get(key))}: a text is needed")
    return row[key]


def _name(model: str) -> str:
    return model.rsplit("/", 1)[-1]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
