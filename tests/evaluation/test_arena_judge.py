"""Verdicts read both ways, two games a question, and judging through a real loopback server."""

from __future__ import annotations

import pytest

from rto.evaluation.arena import Game, score_rows, win_rates
from rto.evaluation.arena_judge import arena_tasks, judge_messages, judgments_of_replies, read_verdict
from rto.evaluation.formats import Question


def question(uid: str, prompt: str = "Why?", category: str = "hard_prompt") -> Question:
    return Question(uid, [prompt], {"uid": uid, "category": category, "prompt": prompt})


@pytest.mark.parametrize(
    ("text", "current", "classic"),
    [
        ("My final verdict is: [[A>B]]", "A>B", "A>B"),
        ("[[A>B]] at first, then [[B>A]]", "B>A", None),  # the last, or none of several
        ("[[A=B]] and again [[A=B]]", "A=B", "A=B"),
        ("[[a>>b]]", "A>>B", None),  # upper-cased, or case kept
        ("verdict [B>>A]", "B>>A", None),  # single brackets
        ("[B>A] but then [[A>B]]", "A>B", "A>B"),  # double ones come first
        ("[[B]]", "B", "B"),  # no label, yet a verdict string
        ("[[A>>>B]]", "A>>>B", "A>>>B"),
        ("[[A<B]]", "A<B", "A<B"),
        ("[[A > B]]", None, None),
        ("[[]] [[C]] no verdict", None, None),
        ("", None, None),
    ],
)
def test_verdicts(text, current, classic):
    assert read_verdict(text, "current") == current
    assert read_verdict(text, "classic") == classic


def test_two_games_with_exchanged_places():
    first, second = arena_tasks([question("q1")], {"q1": "BASE {x}"}, {"q1": "MINE {a}"}, model="m", baseline="base")
    about = {"uid": "q1", "category": "hard_prompt", "model": "m", "baseline": "base"}
    assert first.about == about | {"game": 1} and second.about == about | {"game": 2}
    assert first.key != second.key
    for task, order in ((first, ("BASE {x}", "MINE {a}")), (second, ("MINE {a}", "BASE {x}"))):
        system, user = task.messages
        assert (system["role"], user["role"]) == ("system", "user")
        places = [user["content"].index(text) for text in ("Why?", *order)]
        assert places == sorted(places)
        assert all(f"[[{label}]]" in system["content"] for label in ("A>>B", "A>B", "A=B", "B>A", "B>>A"))


def test_a_creative_question_is_judged_without_an_own_answer():
    plain, creative = (judge_messages("p", "a", "b", category) for category in ("hard_prompt", "creative_writing"))
    assert "your own answer" in plain[0]["content"] and "your own answer" not in creative[0]["content"]
    assert plain[1] == creative[1]
    assert "{own}" not in plain[0]["content"] + creative[0]["content"]


def test_missing_answers_are_named():
    with pytest.raises(ValueError, match=r"m has no answer to 1 of 2 questions \(q2\)"):
        arena_tasks([question("q1"), question("q2")], {"q1": "", "q2": ""}, {"q1": ""}, model="m", baseline="base")
    chat = Question("q1", [[{"role": "user", "content": "Why?"}]], {"uid": "q1"})
    with pytest.raises(ValueError, match="question q1: its prompt is a chat"):
        arena_tasks([chat], {"q1": ""}, {"q1": ""}, model="m", baseline="base")


def row(game: int, reply: str | None, uid: str = "q1", **more):
    about = {"uid": uid, "category": "c", "model": "m", "baseline": "base", "game": game}
    return about | {"key": f"{uid}/{game}", "reply": reply, "error": None if reply is not None else "timeout"} | more


def test_replies_become_judgments():
    rows = [row(2, "[[A>>B]]", judge="j"), row(1, None, judge="j"), row(1, "[[B>A]]", "q2", judge="j")]
    first, second = judgments_of_replies(rows, "current")
    assert first.games == (None, Game("A>>B", "[[A>>B]]"))
    assert second.games == (Game("B>A", "[[B>A]]"), None)
    assert (first.uid, first.category, first.model, first.baseline, first.judge) == ("q1", "c", "m", "base", "j")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(3, "", judge="j")], "row 1: game = 3"),
        ([row(1, "")], "row 1: judge = None is no str"),
        ([row(1, "", judge="j"), row(1, "", judge="j")], "row 2: game 1 of question q1 was judged"),
        ([row(1, "", judge="j") | {"reply": 5}], "row 1: reply = 5"),
    ],
)
def test_rows_that_cannot_be_read(rows, message):
    with pytest.raises(ValueError, match=f"replies, {message}"):
        judgments_of_replies(rows, "current")


def test_swapping_answers_and_replies_mirrors_the_rate():
    """A judge that always prefers the longer answer: model against baseline, and baseline against model."""
    questions = [question(f"q{i}") for i in range(9)]
    short = {f"q{i}": "x" * 5 for i in range(9)}
    mixed = {f"q{i}": "x" * (i + 1) for i in range(9)}

    def rate(baseline, model):
        rows = []
        for task in arena_tasks(questions, baseline, model, model="m", baseline="base"):
            blocks = task.messages[1]["content"].split("\n")
            a, b = (len(blocks[blocks.index(f"<|answer of assistant {side}|>") + 1]) for side in "AB")
            verdict = "A=B" if a == b else "A>B" if a > b else "B>A"
            rows.append(task.about | {"key": task.key, "reply": f"[[{verdict}]]", "error": None, "judge": "longer"})
        found = score_rows(judgments_of_replies(rows, "current"), "current")
        return win_rates(found, "current", rounds=2)["m"].estimate

    assert rate(short, mixed) == pytest.approx((4 + 0.5) / 9)
    assert rate(short, mixed) + rate(mixed, short) == pytest.approx(1, abs=1e-12)
    assert rate(short, short) == 0.5
