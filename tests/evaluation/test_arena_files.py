"""Arena-Hard files: both layouts and ours in, both out again, errors with file, row and key; and ``rto arena``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rto.evaluation.arena import Game, Judgment
from rto.evaluation.arena_files import (
    answer_folder,
    answers_of,
    judge_folder,
    judgment_files,
    read_answers,
    read_judgments,
    style_features,
    write_judgments,
)
from rto.evaluation.arena_style import style_metadata
from rto.evaluation.formats import Answer, arena_classic_row, arena_row, read_questions

BASE = "o3-mini-2025-01-31"
LABELS = ("B>A", "A>>B", "A=B", "A>B", "B>>A")


def lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def current_row(uid: str, first: str | None = "A>B", second: str | None = "A>B", **more):
    games = [
        {"score": label, "judgment": {"answer": f"[[{label}]]"}, "prompt": [{"role": "user", "content": "p"}]}
        for label in (first, second)
    ]
    row = {"uid": uid, "category": "hard_prompt", "judge": "gpt-4.1", "model": "m", "baseline": BASE, "games": games}
    return row | more


def classic_row(uid: str, first: str | None = "A>B", second: str | None = "A>B", **more):
    games = [{"user_prompt": "p", "judgment": f"[[{label}]]", "score": label} for label in (first, second)]
    return {"question_id": uid, "model": "m", "judge": "gpt-4-1106-preview", "games": games} | more


def our_row(uid: str, game: int, reply: str | None, **more):
    row = {
        "uid": uid,
        "category": "hard_prompt",
        "model": "org/m",
        "baseline": BASE,
        "game": game,
        "key": f"{uid}/{game}",
    }
    row |= {"reply": reply, "error": None if reply else "timeout", "judge": "local", "endpoint": "http://x/v1"}
    return row | {"time": f"2026-11-21T00:00:0{game}Z"} | more


def test_current_layout(tmp_path):
    file = lines(tmp_path / "m.jsonl", [current_row("q1"), current_row("q2", None, "B=A", model="org/m")])
    one, two = read_judgments(file, "current")
    assert (one.uid, one.category, one.model, one.baseline, one.judge) == ("q1", "hard_prompt", "m", BASE, "gpt-4.1")
    assert one.games[0] == Game("A>B", "[[A>B]]", ({"role": "user", "content": "p"},))
    assert two.model == "m" and [game.score for game in two.games] == [None, "B=A"]
    lines(file, [current_row("q1") | {"games": [None, {"score": "A>B"}]}])
    assert read_judgments(file, "current")[0].games == (None, Game("A>B"))


def test_classic_layout_has_no_baseline(tmp_path):
    file = lines(tmp_path / "m.jsonl", [classic_row("q1")])
    (one,) = read_judgments(file, "classic")
    assert (one.baseline, one.category, one.games[1].text) == ("gpt-4-0314", "", "[[A>B]]")
    assert read_judgments(file, "classic", "other")[0].baseline == "other"


def test_our_rows_are_read_by_the_scoring(tmp_path):
    """A game that failed and was judged later counts once; a line that was cut off does not count."""
    rows = [our_row("q1", 1, None), our_row("q1", 2, "[a>b]"), our_row("q1", 1, "[[B>A]] [[A>B]]")]
    file = lines(tmp_path / "judgments.jsonl", rows)
    with file.open("a") as out:
        out.write('{"uid": "q2", "ga')
    (current,), (classic,) = (read_judgments(file, scoring) for scoring in ("current", "classic"))
    assert [game.score for game in current.games] == ["A>B", "A>B"]
    assert [game.score for game in classic.games] == [None, None]
    assert (current.model, current.endpoint) == ("m", "http://x/v1")


@pytest.mark.parametrize("layout", ["current", "classic"])
def test_judgments_round_trip(layout, tmp_path):
    prompt = ({"role": "system", "content": "s"}, {"role": "user", "content": "p"})
    judgments = [
        Judgment("q1", "c", "m", "base", "j", (Game("A>B", "text", prompt), Game("B>>A", "more", prompt))),
        Judgment("q2", "c", "m", "base", "j", (Game("A>>>B", "no label", prompt), None)),
    ]
    write_judgments(tmp_path / "j" / "m.jsonl", judgments, layout)
    first, second = read_judgments(tmp_path / "j" / "m.jsonl", layout, "base")
    assert [game.score for game in first.games] == ["A>B", "B>>A"] and first.games[0].text == "text"
    assert second.games[0] == Game(None, "no label", second.games[0].prompt)  # null: the released code would stop
    assert (second.games[1] is None) == (layout == "current")
    row = json.loads((tmp_path / "j" / "m.jsonl").read_text().split("\n")[0])
    if layout == "current":
        assert list(row) == ["uid", "category", "judge", "model", "baseline", "games"]
        assert row["games"][0] == {"score": "A>B", "judgment": {"answer": "text"}, "prompt": list(prompt)}
    else:
        assert list(row) == ["question_id", "model", "judge", "games"]
        assert row["games"][0] == {"user_prompt": "p", "judgment": "text", "score": "A>B"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"uid": "q1"}, "row 1: no baseline"),
        ({"model": "m"}, "row 1: no uid .* and no question_id"),
        (current_row("q1", games=[None]), r"row 1: games = \[None\]"),
        (current_row("q1", games=[None, 3]), "row 1, game 2: 3 is no object"),
        (current_row("q1", games=[{"judgment": "x"}, None]), "row 1, game 1: score"),
        (current_row("q1", games=[{"score": 1}, None]), "row 1, game 1: score = 1"),
        (current_row("q1", model=None), "row 1: model = None"),
    ],
)
def test_bad_judgments_are_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=f"m.jsonl, {message}"):
        read_judgments(lines(tmp_path / "m.jsonl", [row]), "current")


def test_another_baseline_is_told(tmp_path):
    file = lines(tmp_path / "m.jsonl", [current_row("q1")])
    with pytest.raises(ValueError, match=f"no judgment against the baseline 'x'; the baselines there: {BASE}"):
        read_judgments(file, "current", "x")


def written(path: Path, layout: str, texts: dict[str, str], model: str, count=len) -> Path:
    """Answers as `rto generate` writes them, from a question file."""
    questions = lines(
        path.parent / "question.jsonl", [{"uid": uid, "category": "c", "prompt": "Why?"} for uid in texts]
    )
    row = arena_row if layout == "current" else arena_classic_row
    found = read_questions(questions, "arena")
    return lines(path, [row(Answer(q, 1, [texts[q.key]], [True], model, 0.0), count) for q in found])


@pytest.mark.parametrize("layout", ["current", "classic"])
def test_answers_of_both_layouts(layout, tmp_path):
    text = "# Head\n\n- a **b**"
    file = written(tmp_path / "m.jsonl", layout, {"q1": text}, "m")
    answer = read_answers(file)["q1"]
    assert (answer.text, answer.metadata, answer.layout) == (text, style_metadata(text, len), layout)
    assert read_answers(written(tmp_path / "m.jsonl", layout, {"q1": text}, "m", None))["q1"].metadata is None
    with pytest.raises(ValueError, match="row 2: question q1 is answered"):
        read_answers(lines(file, [json.loads(file.read_text())] * 2))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"uid": "q1"}, "neither messages .* nor choices"),
        ({"uid": "q1", "messages": [{"role": "assistant", "content": "text"}]}, "an object with the key answer"),
        ({"question_id": "q1", "choices": [{"turns": []}]}, r"choices\[0\].turns\[0\].content"),
        ({"messages": [{"content": {"answer": "x"}}]}, "uid = None"),
        (
            {"uid": "q1", "messages": [{"content": {"answer": ""}}], "metadata": {"token_len": 1}},
            "metadata: header_count",
        ),
    ],
)
def test_bad_answers_are_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=f"m.jsonl, row 1: .*{message}"):
        read_answers(lines(tmp_path / "m.jsonl", [row]))


def test_one_counter_for_all_answers(tmp_path):
    stored = read_answers(written(tmp_path / "a" / "m.jsonl", "current", {"q1": "one two"}, "m"))
    bare = read_answers(written(tmp_path / "b" / "m.jsonl", "current", {"q1": "one two"}, "m", None))
    found, name = style_features({"m": stored}, "current")
    assert found["m"]["q1"][0] == 7 and name == "stored in the answer files (o200k_base)"
    both, name = style_features({"m": stored, "base": bare}, "current")
    assert both["m"] == both["base"] and "stored" not in name


def test_stored_counts_of_another_tokenizer_are_not_taken(tmp_path):
    """The layouts count with different tokenizers: neither mixed nor under the other scoring do they count."""
    current = read_answers(written(tmp_path / "a" / "m.jsonl", "current", {"q1": "one two"}, "m"))
    classic = read_answers(written(tmp_path / "b" / "m.jsonl", "classic", {"q1": "one two"}, "m"))
    for answers, scoring in (({"m": current, "base": classic}, "current"), ({"m": current}, "classic")):
        found, name = style_features(answers, scoring)
        assert "stored" not in name and {rows["q1"][0] for rows in found.values()} == {2}  # tokens; 7 is stored
    found, name = style_features({"m": classic}, "classic")
    assert found["m"]["q1"][0] == 7 and name == "stored in the answer files (cl100k_base)"


def test_folders(tmp_path):
    for judge in ("one", "two"):
        lines(tmp_path / "model_judgment" / judge / "m.jsonl", [current_row("q1")])
    (tmp_path / "model_answer").mkdir()
    with pytest.raises(ValueError, match="judges are one, two"):
        judgment_files(tmp_path)
    (file,) = judgment_files(tmp_path, "two")
    assert file.parent.name == "two" and judgment_files(file) == [file] and judgment_files(file.parent) == [file]
    for path in (tmp_path, tmp_path / "model_judgment", file.parent, file):
        assert answer_folder(path) == tmp_path / "model_answer"
    assert answer_folder(tmp_path / "model_answer") is None
    with pytest.raises(ValueError, match="judges are one, two, and judgments of lab/one lie in lab_one"):
        judgment_files(tmp_path, "lab/one")
    lines(tmp_path / "model_judgment" / judge_folder("lab/one") / "m.jsonl", [current_row("q1")])
    assert judgment_files(tmp_path, "lab/one")[0].parent.name == "lab_one"
    with pytest.raises(ValueError, match="no .jsonl files"):
        judgment_files(tmp_path / "model_answer")
    with pytest.raises(ValueError, match="no such file or folder"):
        judgment_files(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no answers of m: .*--answers"):
        answers_of("m", [tmp_path / "model_answer"])
