"""Ratings and verdicts as the released code reads them, means by hand, files there and back, a loopback judge."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pytest

from rto.commands import mtbench as command
from rto.evaluation import mtbench
from rto.evaluation.formats import Question, read_records
from rto.evaluation.mtbench import parse_rating, parse_verdict
from rto.evaluation.mtbench_prompts import pair_tasks, single_tasks

WRITING = Question(81, ["Write a poem.", "Make it shorter."], {"category": "writing"})
MATH = Question(111, ["What is 2 + 2?", "And squared?"], {"category": "math"})
ANSWERS = {81: ["Roses are red.", "Roses."], 111: ["4", "16"]}
REFERENCES = {111: ["It is 4.", "It is 16."]}


def rated(question: int, turn: int, score: float | None, model: str = "m") -> dict:
    row = {"question_id": question, "model": model, "judge": "j", "template": "t", "user_prompt": "u"}
    return row | {"judgment": "", "score": score, "turn": turn, "tstamp": 1.5, "category": None}


def compared(question: int, turn: int, one: str, other: str) -> dict:
    row = {"question_id": question, "model_1": "x", "model_2": "y", "g1_winner": one, "g2_winner": other}
    return row | {"judge": ["j", "t"], "turn": turn}


# --- reading replies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("[[3]] and later [[9]]", 3),
        ("[9] but then [[3]]", 3),  # double brackets first, wherever they stand
        ("Rating: [8]", 8),
        ("see [1]", 1),
        ("[[100]]", 100),
        ("[[7.]]", 7),
        ("[[10/10]]", None),
        ("[[ 8 ]]", None),
        ("[[rating: 8]]", None),
        ("[[-3]]", None),
        ("8 of 10", None),
        ("", None),
    ],
)
def test_ratings(reply, rating):
    assert parse_rating(reply) == rating


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("so [[A]]", "A"),
        ("so [[B]]", "B"),
        ("so [[C]]", "tie"),
        ("[[C]] or [[B]] or [[A]]", "A"),
        ("[[C]], no: [[B]]", "B"),
        ("[A]", "error"),
        ("[[a]]", "error"),
        ("", "error"),
    ],
)
def test_verdicts(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_categories_of_the_published_questions():
    found = [mtbench.category_of(i) for i in (80, 81, 90, 91, 101, 111, 121, 131, 141, 151, 160, 161)]
    assert found == [None, "writing", "writing", *mtbench.CATEGORIES[1:], "humanities", None]
    assert set(mtbench.TEMPERATURES) == set(mtbench.CATEGORIES)


# --- prompts ------------------------------------------------------------------------------------------


def test_the_first_turn_is_shown_alone_and_the_second_with_the_whole_conversation():
    first, second = single_tasks([WRITING], "m", ANSWERS)
    assert (first.key, second.key) == ("m/81/1", "m/81/2")
    assert [task.about["template"] for task in (first, second)] == ["rto-single-v1", "rto-single-v1-multi-turn"]
    system, user = (message["content"] for message in first.messages)
    assert "judge" not in system and "[[rating]]" in user  # turn 1: the rules stand in the user's message
    assert "Roses are red." in user and "Make it shorter." not in user
    system, user = (message["content"] for message in second.messages)
    assert "[[rating]]" in system and "second question" in system
    places = [user.index(text) for text in (WRITING.turns[0], "Roses are red.", WRITING.turns[1], "Roses.\n")]
    assert places == sorted(places)
    assert second.about["user_prompt"] == user
    assert (second.about["turn"], second.about["category"]) == (2, "writing")


def test_math_is_graded_beside_a_reference():
    first, second = single_tasks([MATH], "m", ANSWERS, REFERENCES)
    assert [task.about["template"] for task in (first, second)] == [
        "rto-single-math-v1",
        "rto-single-math-v1-multi-turn",
    ]
    assert "It is 4." in first.messages[1]["content"] and "It is 16." not in first.messages[1]["content"]
    assert "It is 16." in second.messages[1]["content"]
    assert "It is 4." not in str(single_tasks([WRITING], "m", ANSWERS, {81: ["It is 4.", "x"]})[0].messages)
    with pytest.raises(ValueError, match=r"question 111 \(math\) is graded beside a reference.*--references"):
        single_tasks([MATH], "m", ANSWERS)
    with pytest.raises(ValueError, match="m has no answer to question 81"):
        single_tasks([WRITING], "m", {})


def test_two_games_show_both_orders():
    answers = {"x": {81: ["xxx", "xx"]}, "y": {81: ["yyy", "yy"]}}
    tasks = pair_tasks([WRITING], ("x", "y"), answers)
    assert [(task.about["turn"], task.about["game"]) for task in tasks] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    shown = [task.messages[1]["content"] for task in tasks]
    assert [text.index("xx") < text.index("yy") for text in shown] == [True, False, True, False]
    assert [task.about["template"] for task in tasks][::2] == ["rto-pair-v2", "rto-pair-v2-multi-turn"]
    assert len({task.key for task in tasks}) == 4


# --- means --------------------------------------------------------------------------------------------


def test_the_average_is_over_rows_not_over_turn_means():
    rows = [rated(81, 1, 9), rated(81, 2, 7), rated(91, 1, 5), rated(91, 2, None)]
    found = mtbench.summarise(rows)["m"]
    assert (found["turn_1"], found["turn_2"], found["average"]) == (7, 7, 7)
    rows[1]["score"] = 1.0
    found = mtbench.summarise(rows)["m"]
    assert (found["turn_1"], found["turn_2"]) == (7, 1)
    assert found["average"] == 5  # (9 + 1 + 5) / 3, not (7 + 1) / 2
    assert (found["rows"], found["questions"], found["dropped"]) == (3, 2, 1)
    # The deviations add up to 4 - 4 = 0 for question 81 and to 0 for 91.
    assert found["se"] == 0.0
    assert list(found["categories"]) == ["writing", "roleplay"]
    assert found["categories"]["writing"]["average"] == 5


def test_with_every_turn_rated_se_is_that_of_the_questions_means():
    scores = {81: (9, 7), 82: (5, 4), 83: (10, 10), 84: (2, 6)}
    rows = [rated(q, turn, s) for q, pair in scores.items() for turn, s in enumerate(pair, 1)]
    means = [sum(pair) / 2 for pair in scores.values()]
    middle = sum(means) / 4
    deviation = math.sqrt(sum((m - middle) ** 2 for m in means) / 3)
    assert mtbench.summarise(rows)["m"]["se"] == pytest.approx(deviation / 2)


def test_ratings_out_of_range_are_counted_and_kept():
    found = mtbench.summarise([rated(81, 1, 100), rated(82, 1, 0), rated(83, 1, 10)])["m"]
    assert (found["out_of_range"], found["average"]) == (2, pytest.approx(110 / 3))


def test_models_stand_best_first_and_nothing_is_made_up():
    rows = [rated(81, 1, 3, "low"), rated(81, 1, 8, "high"), rated(81, 1, None, "none")]
    found = mtbench.summarise(rows, {81: "mine"})
    assert list(found) == ["high", "low", "none"]
    assert found["none"] | {"categories": {}} == {
        "average": None, "se": None, "turn_1": None, "turn_2": None, "rows": 0, "questions": 0,
        "dropped": 1, "out_of_range": 0, "categories": {},
    }  # fmt: skip
    assert list(found["high"]["categories"]) == ["mine"]
    assert found["high"]["se"] is None  # one question


def test_both_games_must_agree():
    rows = [
        compared(81, 1, "model_1", "model_1"),  # win
        compared(81, 2, "model_1", "model_2"),  # tie
        compared(82, 1, "tie", "model_1"),  # tie
        compared(82, 2, "model_2", "model_2"),  # loss
        compared(83, 1, "tie", "tie"),  # tie
        compared(83, 2, "error", "model_1"),  # dropped
    ]
    (found,) = mtbench.summarise_pairs(rows)
    assert [found[key] for key in ("win", "tie", "loss", "n", "dropped")] == [1, 3, 1, 5, 1]
    assert (found["win_rate"], found["loss_rate"], found["win_rate_adjusted"]) == (0.2, 0.2, 0.5)
    assert 0 <= found["low"] <= 0.5 <= found["high"] <= 1
    (nothing,) = mtbench.summarise_pairs(rows[-1:])
    assert (nothing["win_rate_adjusted"], nothing["low"], nothing["dropped"]) == (None, None, 1)


def test_winners_are_mapped_back():
    base = {"model_1": "x", "model_2": "y", "question_id": 81, "turn": 1, "judge": "j", "template": "t"}
    base |= {"user_prompt": "u", "time": "1970-01-01T00:01:00Z"}
    games = [base | {"game": 1, "reply": "[[A]]"}, base | {"game": 2, "reply": "[[A]]"}]
    (row,) = mtbench.pair_judgments(games)
    assert (row["g1_winner"], row["g2_winner"], row["tstamp"]) == ("model_1", "model_2", 60.0)
    assert list(row) == [
        "question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", "g1_user_prompt", "g1_judgment",
        "g2_user_prompt", "g2_judgment", "turn", "tstamp",
    ]  # fmt: skip
    (failed,) = mtbench.pair_judgments([games[0], base | {"game": 2, "reply": None}])
    assert failed["g2_winner"] == "error"
    with pytest.raises(ValueError, match="one game only"):
        mtbench.pair_judgments(games[:1])


# --- files --------------------------------------------------------------------------------------------


def test_judgments_come_back_with_the_official_keys(tmp_path):
    rows = [rated(81, 1, 7.5), rated(81, 2, None)]
    mtbench.write_single(tmp_path / "j_single.jsonl", rows)
    stored = read_records(tmp_path / "j_single.jsonl")
    keys = ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert [list(row) for row in stored] == [keys] * 2
    assert [row["score"] for row in stored] == [7.5, -1]
    assert stored[0]["judge"] == ["j", "t"]
    kind, again = mtbench.read_judgments(tmp_path / "j_single.jsonl")
    assert kind == "single"
    assert mtbench.summarise(again) == mtbench.summarise(rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"judge": "j"}, "no MT-Bench judgment"),
        ({"score": "7"}, "score '7' of turn 1"),
        ({"turn": 3}, "score 7 of turn 3"),
        ({"score": None}, "score None"),
    ],
)
def test_other_judgments_are_refused(tmp_path, change, said):
    row = {
        "question_id": 81,
        "model": "m",
        "judge": ["j", "t"],
        "user_prompt": "",
        "judgment": "",
        "score": 7,
        "turn": 1,
    }
    path = tmp_path / "j_single.jsonl"
    path.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=said):
        mtbench.read_single(path)
    path.write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(ValueError, match="j grades m twice on question 81, turn 1"):
        mtbench.read_single(path)
    path.write_text(json.dumps(compared(81, 1, "model_1", "nobody")) + "\n")
    with pytest.raises(ValueError, match="not model_1, model_2, tie or error"):
        mtbench.read_judgments(path)


def answer_file(path: Path, model: str, answers: dict[int, list[str]]) -> str:
    made = [
        {
            "question_id": key,
            "answer_id": "a",
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": 1.0,
        }
        for key, turns in answers.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def test_answers_are_read_and_wrong_ones_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    assert mtbench.read_answers(answer_file(path, "m", ANSWERS)) == {"m": ANSWERS}
    with pytest.raises(ValueError, match="question 81 has not two answers"):
        mtbench.read_answers(answer_file(path, "m", {81: ["one"]}))
    path.write_text('{"prompt": "Hi", "answer": "Hello"}\n')
    with pytest.raises(ValueError, match="no MT-Bench answer.*--format mtbench"):
        mtbench.read_answers(path)


# --- the command --------------------------------------------------------------------------------------


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser)
    return parser.parse_args(words)


@pytest.fixture
def question_file(tmp_path) -> str:
    rows = [{"question_id": q.key, "category": q.record["category"], "turns": q.turns} for q in (WRITING, MATH)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "question.jsonl")


def test_a_judge_is_asked_and_its_replies_are_kept(judge_server, tmp_path, question_file, capsys):
    judge_server.reply = lambda messages: "[[9]]" if "second question" in messages[0]["content"] else "No idea."
    out = tmp_path / "out"
    call = ["--answers", answer_file(tmp_path / "m.jsonl", "m", ANSWERS), "--questions", question_file, "--quiet"]
    call += ["--references", answer_file(tmp_path / "r.jsonl", "gpt-4", REFERENCES), "--model", "lab/stub"]
    call += ["--base-url", judge_server.url, "--out", str(out)]
    assert command.run(parse(*call)) == 0
    shown = capsys.readouterr().out
    assert "| m | 9.00 | 0.00 | none | 9.00 | 2 | 2 | 0 |" in shown
    report = json.loads((out / "report.json").read_text())
    assert report["judges"]["lab/stub"]["m"]["dropped"] == 2
    assert len(judge_server.asked) == 4
    assert command.run(parse(*call)) == 0
    assert len(judge_server.asked) == 4  # nothing is asked twice
    capsys.readouterr()
    made = ("order", "judged", "endpoint", "served", "settings")
    assert report["order"] == "each answer is graded alone" and report["endpoint"] == [judge_server.url]
    assert report["served"] == ["stub-7b"] and report["settings"]["max_tokens"] == 2048
    for stored in ("replies.jsonl", "lab_stub_single.jsonl"):  # ours and the official file say the same
        assert command.run(parse(str(out / stored), "--out", str(tmp_path / "again"))) == 0
        assert capsys.readouterr().out == shown
        again = json.loads((tmp_path / "again" / "report.json").read_text())
        known = made if stored == "replies.jsonl" else made[:2]  # the official layout has no more
        assert {key: again.get(key) for key in made} == {key: report[key] if key in known else None for key in made}
        assert again["scored"] >= again["judged"][1] >= again["judged"][0]


def test_failed_replies_of_a_file_are_counted(judge_server, tmp_path, question_file, capsys):
    judge_server.plan = lambda n, game: 400
    call = ["--answers", answer_file(tmp_path / "m.jsonl", "m", ANSWERS), "--questions", question_file, "--quiet"]
    call += ["--references", answer_file(tmp_path / "r.jsonl", "gpt-4", REFERENCES), "--model", "stub"]
    call += ["--base-url", judge_server.url, "--out", str(tmp_path / "out")]
    assert command.run(parse(*call)) == 1
    assert "4 of 4 failed: the same command asks them again" in capsys.readouterr().err
    assert command.run(parse(str(tmp_path / "out" / "replies.jsonl"))) == 1
    assert capsys.readouterr().err == "rto mtbench: 4 of 4 failed\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"id": "1", "first": "a"},
            "reply 'k': no MT-Bench judgment: it lacks question_id, user_prompt, turn, model, c",
        ),
        ({"game": 1, "uid": "1"}, "reply 'k': no MT-Bench judgment: it lacks question_id, user_prompt, turn, model_1"),
    ],
)
def test_replies_of_another_verb_are_refused(tmp_path, row, said):
    made = {"key": "k", "reply": "A", "error": None, "judge": "j", "template": "t", "time": "2026-01-01T00:00:00Z"}
    path = tmp_path / "judgments.jsonl"
    path.write_text(json.dumps(made | row) + "\n")
    with pytest.raises(ValueError, match=f"judgments.jsonl, {re.escape(said)}"):
        mtbench.read_judgments(path)


def test_pairs_without_a_judge_are_refused(tmp_path):
    path, row = tmp_path / "pairs.jsonl", compared(81, 1, "model_1", "tie") | {"judge": ["j", "t"]}
    for change, said in (({"judge": "gpt-4"}, "judge = 'gpt-4': a list"), ({"question_id": None}, "lacks question_id")):
        second = {key: value for key, value in (row | change).items() if value is not None}
        path.write_text(json.dumps(row) + "\n" + json.dumps(second) + "\n")
        with pytest.raises(ValueError, match=f"pairs.jsonl, row 2: .*{said}"):
            mtbench.read_judgments(path)


def test_pairs_are_compared(judge_server, tmp_path, question_file, capsys):
    judge_server.reply = lambda messages: "[[B]]"  # whoever stands second: every question is a tie
    files = [answer_file(tmp_path / f"{name}.jsonl", name, ANSWERS) for name in "xy"]
    call = ["--pairwise", "--questions", question_file, "--quiet", "--model", "stub", "--base-url", judge_server.url]
    call += ["--references", answer_file(tmp_path / "r.jsonl", "gpt-4", REFERENCES), "--out", str(tmp_path / "out")]
    assert command.run(parse("--answers", *files, *call)) == 0
    shown = capsys.readouterr().out
    assert "| x | y | 0 | 4 | 0 | 0 | 0.500 | 0.500 to 0.500 |" in shown
    assert "shown first in game 1" in json.loads((tmp_path / "out" / "report.json").read_text())["order"]
    assert command.run(parse(str(tmp_path / "out" / "stub_pair.jsonl"))) == 0
    assert capsys.readouterr().out == shown


def test_wrong_calls_are_refused(tmp_path, question_file):
    path = answer_file(tmp_path / "m.jsonl", "m", ANSWERS)
    for words, said in (
        ([], "give a file of judgments, or --answers"),
        (["j.jsonl", "--answers", path], "give a file of judgments, or --answers"),
        (["--answers", path], "--answers needs --model JUDGE and --questions FILE"),
        (["--answers", path, path, "--questions", question_file, "--model", "j"], "answers of m are in another file"),
        (["--answers", path, "--pairwise", "--questions", question_file, "--model", "j"], "two models or more"),
        (["nowhere.jsonl"], "file not found"),
    ):
        with pytest.raises(ValueError, match=said):
            command.run(parse(*words))
