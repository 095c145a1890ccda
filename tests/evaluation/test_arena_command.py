"""``rto arena``: from files of judgments, with a pool and without, and from a judge on the loopback."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rto.commands import arena as command
from rto.evaluation.arena import Game, Judgment, score_rows
from rto.evaluation.arena_files import read_judgments, write_judgments
from rto.evaluation.formats import Answer, arena_row, read_questions

BASE = "o3-mini-2025-01-31"
LABELS = ("B>A", "A>>B", "A=B", "A>B", "B>>A")


def known(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser)
    return parser.parse_args(["--bootstrap", "20", *map(str, words)])


def judgment(uid: str, first: str | None = "A>B", second: str | None = "A>B", model: str = "m", **more) -> Judgment:
    one = Judgment(uid, "hard_prompt", model, BASE, "gpt-4.1", (Game(first), Game(second)))
    return replace(one, **more)


def stored(file: Path, *judgments: Judgment) -> Path:
    write_judgments(file, judgments, "current")
    return file


def answered(folder: Path, model: str, texts: dict[str, str]) -> Path:
    """Answers as ``rto generate`` writes them; returns the question file."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder.parent / "question.jsonl"
    rows = [{"uid": uid, "category": "hard_prompt", "prompt": f"Why {uid}?"} for uid in texts]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_questions(questions, "arena")
    rows = [arena_row(Answer(q, 1, [texts[str(q.key)]], [True], model, 0.0), len) for q in found]
    (folder / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions


def bench(folder: Path, models: int, questions: int = 12) -> Path:
    """A data folder of the current layout: judgments and answers of ``models`` models and the baseline."""
    for index in range(models):
        name = f"m{index}"
        rows = [judgment(f"q{i}", LABELS[(i + index) % 5], LABELS[(2 * i + index) % 5], name) for i in range(questions)]
        stored(folder / "model_judgment" / "gpt-4.1" / f"{name}.jsonl", *rows)
    for index, name in enumerate([BASE, *(f"m{i}" for i in range(models))]):
        texts = {
            f"q{i}": f"# A\n{'- b **c**' * (i % (index + 2))}\n" + "word " * (10 + i * index) for i in range(questions)
        }
        answered(folder / "model_answer", name, texts)
    return folder


def test_a_model_in_a_pool(tmp_path, capsys):
    folder = bench(tmp_path / "data", 11)
    mine = folder / "model_judgment" / "gpt-4.1" / "m3.jsonl"
    assert command.run(known(mine, "--pool", folder, "--out", tmp_path / "out")) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pool"]["size"] == 11 and list(report["models"]) == ["m3"]
    assert not [note for note in report["notes"] if note.startswith("warning")]
    assert "m3: its judgments in the pool are left out" in said and "Pool: 11 models" in said
    model = report["models"]["m3"]
    rows = score_rows(read_judgments(mine, "current"), "current")
    assert model["win_rate"]["estimate"] == pytest.approx(100 * rows.score.mean())
    for name in ("win_rate", "style_controlled"):
        for interval in ("rows", "questions"):
            assert 0 <= model[name][interval]["low"] < model[name][interval]["high"] <= 100
    assert (report["judge"], report["baseline"], report["scoring"]) == ("gpt-4.1", BASE, "current")
    assert (tmp_path / "out" / "report.md").read_text() in said + "\n"


def test_a_small_pool_is_warned_of(tmp_path, capsys):
    assert command.run(known(bench(tmp_path / "data", 1), "--scoring", "classic")) == 0
    assert "warning: the pool has 1 model: " in capsys.readouterr().out


def test_without_answers_there_is_no_sc(tmp_path, capsys):
    file = stored(tmp_path / "m.jsonl", judgment("q1"))
    assert command.run(known(file, "--out", tmp_path)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    model = report["models"]["m"]
    assert model["win_rate"]["estimate"] == 50 and model["win_rate"]["questions"]["low"] is None  # of one question
    assert model["style_controlled"] is None and report["tokens"] is None
    assert "no style-controlled win rate without the answers" in capsys.readouterr().out


def test_verdicts_that_are_no_label_are_told(tmp_path, capsys):
    file = stored(tmp_path / "m.jsonl", judgment("q1"), judgment("q2", "A=B", None), judgment("q3"))
    file.write_text(file.read_text().replace("A=B", "B"))
    assert command.run(known(file)) == 0
    assert "m: 1 games without a verdict, 1 with a string that is no label" in capsys.readouterr().out


def test_what_is_refused(tmp_path):
    file = stored(tmp_path / "m.jsonl", judgment("q1"), judgment("q2", baseline="gemini", category="creative_writing"))
    with pytest.raises(ValueError, match="choose one with --baseline"):
        command.run(known(file))
    assert command.run(known(file, "--baseline", "gemini")) == 0
    assert command.run(known(file, "--category", "hard_prompt")) == 0
    with pytest.raises(ValueError, match="the categories of these judgments are creative_writing, hard_prompt"):
        command.run(known(file, "--category", "x"))
    stored(file, judgment("q1"), judgment("q2", judge="other"))
    with pytest.raises(ValueError, match="one judge"):
        command.run(known(file))
    stored(file, judgment("q1"))
    with pytest.raises(ValueError, match="no judgment of another model"):
        command.run(known(file, "--pool", file))
    with pytest.raises(ValueError, match="--bootstrap 0"):
        command.run(known(file, "--bootstrap", "0"))
    with pytest.raises(ValueError, match="give judgments, or"):
        command.run(known())
    with pytest.raises(ValueError, match="--questions needs"):
        command.run(known("--questions", file))


def longer(messages: list[dict[str, str]]) -> str:
    """A judge that prefers the longer answer."""
    parts = messages[1]["content"].split("\n")
    a, b = (len(parts[parts.index(f"<|answer of assistant {side}|>") + 1]) for side in "AB")
    return f"I looked at both.\nVerdict: [[{'A=B' if a == b else 'A>>B' if a > b else 'B>A'}]]"


def test_a_judge_is_asked(tmp_path, judge_server, capsys):
    """Five questions: longer in one, equal in one, shorter in three; asked once, and exported."""
    pytest.importorskip("openai")
    judge_server.reply = longer
    answered(tmp_path / "model_answer", "base", {f"q{i}": "x" * 5 for i in range(5)})
    questions = answered(tmp_path / "model_answer", "m", {f"q{i}": "x" * (i + 2) for i in range(5)})
    words = ["--questions", questions, "--answers", tmp_path / "model_answer", "--baseline", "base", "--quiet"]
    words += ["--model", "stub-7b", "--base-url", judge_server.url, "--out", tmp_path / "out"]
    assert command.run(known(*words)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # Longer: game 1 says B>A (1 row of 1), game 2 A>>B (3 of 1). Shorter: A>>B (3 of 0), B>A (1 of 0). Equal: 2 halves.
    assert report["models"]["m"]["win_rate"]["estimate"] == pytest.approx(100 * (4 + 1) / (4 + 12 + 2))
    assert report["endpoints"] == [judge_server.url] and report["judge"] == "stub-7b"
    asked = len(judge_server.asked)
    assert asked == 10
    assert command.run(known(*words)) == 0
    assert len(judge_server.asked) == asked
    capsys.readouterr()
    for file in (tmp_path / "out" / "judgments.jsonl", tmp_path / "out" / "model_judgment" / "stub-7b" / "m.jsonl"):
        assert command.run(known(file)) == 0
        assert "| m | 27.8 |" in capsys.readouterr().out


def test_a_judge_that_fails_everywhere(tmp_path, judge_server, capsys):
    pytest.importorskip("openai")
    judge_server.plan = lambda n, game: 400
    answered(tmp_path / "model_answer", "base", {"q0": "x"})
    questions = answered(tmp_path / "model_answer", "m", {"q0": "y"})
    words = ["--questions", questions, "--answers", tmp_path / "model_answer", "--baseline", "base", "--quiet"]
    assert command.run(known(*words, "--model", "j", "--base-url", judge_server.url, "--out", tmp_path / "out")) == 1
    assert "every game failed" in capsys.readouterr().err
