"""From files of answers to the report, against a judge that fails in every way; killed and resumed; mirrored."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openai")

from rto.commands import judge as command
from rto.evaluation.answers import Answer, prompt_id
from rto.evaluation.endpoint import Endpoint, read_rows
from rto.evaluation.judge import games, judge, outcome
from rto.evaluation.judge_templates import TEMPLATES, load_template
from rto.evaluation.winrate import holm, wilson

HELPFUL, QUALITY = TEMPLATES["helpful"], TEMPLATES["quality"]
KEY = "sk-test-0123456789abcdef"


def system(name: str, texts: list[str]) -> list[Answer]:
    """Answer i to prompt i."""
    return [Answer(prompt_id(f"prompt {i}"), f"prompt {i}", text, name) for i, text in enumerate(texts)]


def two(n: int = 12) -> tuple[list[Answer], list[Answer]]:
    """Under a judge that likes length: a wins, b wins, tie, identical, and so on."""
    a, b = ["xxxx", "x", "ab", "same"], ["y", "yyyy", "cd", "same\n"]
    return system("a", [a[i % 4] + f" {i}" for i in range(n)]), system(
        "b", [b[i % 4].strip() + f" {i}" for i in range(n)]
    )


@pytest.fixture
def endpoint(judge_server) -> Endpoint:
    return Endpoint("judge-1", judge_server.url, timeout=5.0, retries=4, concurrency=4)


def ask(systems, endpoint, folder, template=HELPFUL, **options):
    return judge(systems, template, endpoint, Path(folder), **{"rounds": 200, **options})


# --- games --------------------------------------------------------------------------------------------


def test_both_orders_are_played_and_identical_answers_are_not():
    tasks = games(list(zip(*two(4), strict=True)), HELPFUL, "both", 0)
    assert Counter(task.about["id"] for task in tasks) == {prompt_id(f"prompt {i}"): 2 for i in range(3)}
    text = {task.key: task.messages[-1]["content"] for task in tasks}
    key = prompt_id("prompt 0")
    assert "Response A:\nxxxx 0\n\nResponse B:\ny 0\n" in text[f"{key} a > b"]
    assert "Response A:\ny 0\n\nResponse B:\nxxxx 0\n" in text[f"{key} b > a"]


def test_a_single_game_has_the_same_order_whoever_is_called_a():
    a, b = system("a", ["x"] * 200), system("b", ["y"] * 200)
    tasks = games(list(zip(a, b, strict=True)), HELPFUL, "single", 0)
    assert tasks == games(list(zip(b, a, strict=True)), HELPFUL, "single", 0)
    first = Counter(task.about["first"] for task in tasks)
    assert len(tasks) == 200 and 70 < first["a"] < 130
    assert tasks != games(list(zip(a, b, strict=True)), HELPFUL, "single", 1)


# --- templates ----------------------------------------------------------------------------------------


def test_an_answer_that_looks_like_a_template_stays_what_it_is():
    [message] = HELPFUL.messages("{answer_b} {0}", "{prompt}", "b \\1")
    assert "Query:\n{answer_b} {0}\n\nResponse A:\n{prompt}\n\nResponse B:\nb \\1\n" in message["content"]
    assert [m["role"] for m in QUALITY.messages("p", "a", "b")] == ["system", "user"]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Comparison: fine.\nMore helpful: A", "A"),
        ('Comparison: fine.\n**More helpful:**  "B".', "B"),
        ("more helpful: Response A", "A"),
        ("Comparison: x\nMore helpful: tie\n", "tie"),
        ("More helpful: A\nNo, wait.\nMore helpful: B", None),
        ("More helpful: A tie", None),
        ("More helpful: A or B", None),
        ("A is more helpful: A", None),
        ("I would say A", None),
        ("<think>\nMore helpful: A\nor not?</think>\nMore helpful: B", "B"),
        ("<think>More helpful: A", None),
        ("", None),
    ],
)
def test_verdicts_of_helpful(reply, verdict):
    assert HELPFUL.verdict(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Both are fine, so [[C]].", "tie"),
        ("[[B]] it is: [[B]]", "B"),
        ("Not [[A]] but [[B]]", None),
        ("[A]", None),
        ("[[D]]", None),
    ],
)
def test_verdicts_of_quality(reply, verdict):
    assert QUALITY.verdict(reply) == verdict


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('user = "{prompt}|{answer_a}|{answer_b}"\n[labels]\nA = ["first", "1"]\nB = "second"\n')
    mine = load_template(str(path))
    assert mine.name == "mine" and mine.messages("p", "a", "b") == [{"role": "user", "content": "p|a|b"}]
    assert [mine.verdict(reply) for reply in ("First", "so:\n1", "second.", "tie", "the first")] == [
        *("A", "A", "B"),
        *(None, None),
    ]
    assert mine.hash != replace(mine, whole_line=False).hash and load_template("helpful") is HELPFUL


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user =", "not TOML"),
        ('user = "{prompt}{answer_a}"\nlabels = {A = "1", B = "2"}', "user lacks {answer_b}"),
        ('user = "{prompt}{answer_a}{answer_b}"\nlabels = {A = "1"}', "labels must have A and B"),
        ('user = "{prompt}{answer_a}{answer_b}"\nlabels = {A = "x", B = "X"}', "two labels are the same"),
        ('user = "{prompt}{answer_a}{answer_b}"\nlabels = {A = "1", B = []}', "labels.B"),
        ('users = ""', "unknown key 'users'"),
    ],
)
def test_templates_that_are_refused(tmp_path, text, said):
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_template(str(tmp_path / "t.toml"))
    with pytest.raises(ValueError, match="one of helpful, quality"):
        load_template("nope")


# --- the whole way ------------------------------------------------------------------------------------


def test_numbers_of_a_judge_that_likes_length(judge_server, endpoint, tmp_path):
    report = ask(two(), endpoint, tmp_path)
    [pair] = report["pairs"]
    assert (pair["wins"], pair["ties"], pair["losses"], pair["identical"], pair["dropped"]) == (3, 6, 3, 3, 0)
    assert pair["games"] == {"played": 18, "failed": 0, "invalid": 0} and len(judge_server.asked) == 18
    assert pair["position"]["kappa"] == 1 and pair["length"]["longer_wins"] == {"n": 6, **wilson(6, 6).to_dict()}
    assert report["judge"] == "judge-1" and report["served"] == ["stub-7b"] and report["failures"] == []
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "| a | b | 12 | 3 / 6 / 3 | 50.0 [" in (tmp_path / "report.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    by_prompt = {line["prompt"]: (line["a_first"], line["b_first"], line["identical"]) for line in lines}
    assert by_prompt["prompt 0"] == ("a", "a", False) and by_prompt["prompt 1"] == ("b", "b", False)
    assert by_prompt["prompt 2"] == ("tie", "tie", False) and by_prompt["prompt 3"] == (None, None, True)


def test_a_judge_that_is_switched_around(judge_server, endpoint, tmp_path):
    judge_server.reply = lambda messages: "More helpful: A"
    report = ask(two(), endpoint, tmp_path)
    place = report["pairs"][0]["position"]
    assert (
        place["first_share"]["estimate"] == 1 and place["both_first"] == place["n"] == 9 and place["consistency"] == 0
    )
    assert report["pairs"][0]["ties"] == 12


def test_every_prompt_is_judged_or_listed(judge_server, endpoint, tmp_path):
    """Hangs, 429, 500, connections that break, half replies; some games fail for good, some replies are garbage."""
    kinds = ["hang", 429, 500, "cut", "half", None, "garbage", "dead", None]

    def plan(n: int, game: str):
        kind = kinds[int(game, 16) % len(kinds)]
        if kind == "dead":
            return [500, "cut", "half", 429, "hang"][n % 5]
        return kind if kind == "garbage" or n < 2 else None

    judge_server.plan, judge_server.retry_after = plan, "0.01"
    a, b = two(60)
    report = ask((a, b), replace(endpoint, timeout=0.5, concurrency=16), tmp_path)
    [pair] = report["pairs"]
    rows = read_rows(tmp_path / "judgments.jsonl")
    assert len(rows) == 90 == pair["games"]["played"]
    failed, invalid = pair["games"]["failed"], pair["games"]["invalid"]
    assert failed > 0 and invalid > 0 and len(report["failures"]) == failed + invalid
    listed = {failure["key"] for failure in report["failures"]}
    with_verdict = {row["key"] for row in rows if outcome(row, HELPFUL) in (0, 0.5, 1)}
    assert listed | with_verdict == {row["key"] for row in rows} and not listed & with_verdict
    assert pair["n"] + pair["dropped"] == 60 and pair["dropped"] == len({f["id"] for f in report["failures"]})
    assert {row["reply"] for row in rows if row["key"] in listed} == {None, "I would rather not say."}
    assert f"Games without a verdict: {failed + invalid}" in (tmp_path / "report.md").read_text()
    judge_server.plan = lambda n, game: None  # well again: only what failed is asked, garbage was a reply
    before = len(judge_server.asked)
    again = ask((a, b), endpoint, tmp_path)
    assert len(judge_server.asked) == before + failed
    assert again["pairs"][0]["games"] == {"played": 90, "failed": 0, "invalid": invalid}


def test_killed_and_resumed_without_judging_a_game_twice(judge_server, endpoint, tmp_path, monkeypatch):
    a, b = two(80)
    for name, answers in (("a", a), ("b", b)):
        rows = [{"prompt": one.prompt, "answer": one.answer, "policy": name} for one in answers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge_server.delay = 0.05
    start = "import argparse; from rto.commands import judge; p = argparse.ArgumentParser(); judge.add(p); "
    words = ["a.jsonl", "b.jsonl", "--model", "judge-1", "--base-url", judge_server.url, "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", start + "judge.run(p.parse_args())", *words, "--concurrency", "4"],
        cwd=tmp_path,
        env={**os.environ, "OPENAI_API_KEY": KEY, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while sum(judge_server.served.values()) < 25:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    path = tmp_path / "out" / "judgments.jsonl"
    done = {row["key"] for row in read_rows(path)}
    assert 15 < len(done) < 120
    with open(path, "ab") as file:
        file.write(b'{"id": "half of a li')  # what a kill in the middle of a write leaves
    asked = judge_server.games.copy()
    judge_server.delay = 0.0
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    report = ask((a, b), replace(endpoint, timeout=60.0), path.parent)
    assert report["games"] == {"played": 120, "failed": 0, "invalid": 0} and report["pairs"][0]["n"] == 80
    assert sum((judge_server.games - asked).values()) == 120 - len(done)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 120 == len({row["key"] for row in rows})
    assert judge_server.authorization[0] == f"Bearer {KEY}" == judge_server.authorization[-1]
    assert KEY.encode() not in b"".join(file.read_bytes() for file in path.parent.iterdir())


@pytest.mark.parametrize("order", ["both", "single"])
def test_swapping_the_systems_mirrors_the_report_and_asks_nothing(judge_server, endpoint, tmp_path, order):
    judge_server.reply = lambda m: f"More helpful: {'AAB'[len(m[-1]['content'].split('Response A:')[0]) % 3]}"
    judge_server.plan = lambda n, game: "garbage" if game[0] in "01" else None
    a, b = two(40)
    [x] = ask((a, b), endpoint, tmp_path, order=order)["pairs"]
    before = len(judge_server.asked)
    [y] = ask((b[::-1], a), endpoint, tmp_path, order=order)["pairs"]
    assert len(judge_server.asked) == before
    assert (x["wins"], x["ties"], x["losses"], x["n"]) == (y["losses"], y["ties"], y["wins"], y["n"])
    for name, other in (("estimate", "estimate"), ("low", "high"), ("high", "low")):
        assert x["win_rate"][name] == pytest.approx(1 - y["win_rate"][other], abs=1e-12)
    assert x["position"] == y["position"] and x["p"] == y["p"] and x["games"] == y["games"]
    assert x["length"]["longer_wins"] == y["length"]["longer_wins"]


def test_several_systems_with_holm(judge_server, endpoint, tmp_path):
    texts = (["x" * 9] * 8, ["x" * 5] * 8, ["xx"] * 4 + ["x" * 5] * 4)
    report = ask([system(name, part) for name, part in zip("abc", texts, strict=True)], endpoint, tmp_path)
    pairs = report["pairs"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pair["p_holm"] for pair in pairs] == holm([pair["p"] for pair in pairs]).tolist()
    assert pairs[2]["identical"] == 4 and pairs[0]["verdict"] == "better"


def test_judgments_are_never_mixed(endpoint, tmp_path):
    ask(two(4), endpoint, tmp_path)
    with pytest.raises(ValueError, match="under the template 'helpful'"):
        ask(two(4), endpoint, tmp_path, QUALITY)
    with pytest.raises(ValueError, match="never mixed"):
        ask(two(4), replace(endpoint, model="judge-2"), tmp_path)


def test_limits_and_names(endpoint, judge_server, tmp_path):
    ask(two(), endpoint, tmp_path, limit=2, order="single")
    few = len(judge_server.asked)
    assert few <= 2
    ask([part[::-1] for part in two()], endpoint, tmp_path, order="single")
    assert len(judge_server.asked) == 9  # the first two were there
    with pytest.raises(ValueError, match="names that differ"):
        ask((two()[0], two()[0]), endpoint, tmp_path)
    with pytest.raises(ValueError, match="limit"):
        ask(two(), endpoint, tmp_path, limit=0)


# --- the command --------------------------------------------------------------------------------------


def call(tmp_path: Path, url: str, *words: str) -> int:
    for name, answers in zip("ab", two(8), strict=True):
        rows = [{"instruction": one.prompt, "output": one.answer, "generator": name} for one in answers]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    parser = argparse.ArgumentParser()
    command.add(parser)
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(tmp_path / "out")]
    return command.run(parser.parse_args([*files, "--model", "m", "--base-url", url, "--retries", "0", *words]))


def test_the_command(judge_server, tmp_path, capsys):
    assert call(tmp_path, judge_server.url, "--seed", "3", "--max-tokens", "99", "--limit", "3") == 0
    out, err = capsys.readouterr()
    assert out == (tmp_path / "out" / "report.md").read_text() and " games" in err
    assert judge_server.asked[0]["max_tokens"] == 99 and judge_server.asked[0]["seed"] == 3
    assert call(tmp_path, judge_server.url, "--no-seed", "--limit", "3", "--out", str(tmp_path / "two")) == 0
    assert "seed" not in judge_server.asked[-1]


def test_some_failures_are_loud_and_all_are_an_error(judge_server, tmp_path, capsys):
    judge_server.plan = lambda n, game: 500 if len(judge_server.asked) == 1 else None
    assert call(tmp_path, judge_server.url, "--concurrency", "1", "--quiet") == 0
    assert "1 of 12 games have NO VERDICT: 1 failed" in capsys.readouterr().err
    judge_server.plan = lambda n, game: "garbage"
    assert call(tmp_path, judge_server.url, "--out", str(tmp_path / "other")) == 1
    assert "12 replies were invalid" in capsys.readouterr().err
