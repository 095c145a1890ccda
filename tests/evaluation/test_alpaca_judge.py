"""AlpacaEval with a judge over HTTP: weighted preferences, seeded order, one request an instruction."""

from __future__ import annotations

import json
import math
import re

import pytest

from rto.cli import main
from rto.evaluation.alpaca import JUDGE_SYSTEM, JUDGE_USER, order_switched
from rto.evaluation.endpoint import digest, read_rows

pytest.importorskip("openai")
WORDS = ["lists", "maps", "poems", "rivers", "stars", "trains"]


def files(tmp_path, change=None):
    """Outputs of a model, longer than the baseline's but for the last, which is the same."""
    base = [{"instruction": f"Tell of {w}", "output": "short", "generator": "base", "dataset": "koala"} for w in WORDS]
    mine = [row | {"output": f"a longer one {i}", "generator": "mine"} for i, row in enumerate(base)]
    mine[-1]["output"] = "short"
    mine = (change or list)(mine)
    for name, rows in (("base", base), ("mine", mine)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    asked = ["alpaca", "--outputs", str(tmp_path / "mine.json"), "--reference", str(tmp_path / "base.json")]
    return [*asked, "--model", "stub", "--out", str(tmp_path / "out"), "--bootstrap", "0"]


def better(messages) -> str:
    """The longer answer, by the name that it is shown under."""
    first, second = (part.split("</answer>")[0] for part in messages[-1]["content"].split('<answer name="')[1:3])
    return "m" if len(first) > len(second) else "M"


def test_the_verdicts_themselves_without_log_probs(tmp_path, judge_server, capsys):
    judge_server.reply = better
    words = [*files(tmp_path), "--base-url", judge_server.url]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "discrete verdicts" in out and f"{100 * 5.5 / 6:.2f} %" in out
    rows = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [row["preference"] for row in rows] == [2.0] * 5 + [1.5]
    assert [row["generator_1"] for row in rows] == ["base"] * 6
    assert len(judge_server.asked) == 5  # identical answers need no judge
    assert main(words) == 0
    assert len(judge_server.asked) == 5  # and nothing is asked twice


def test_the_report_says_who_judged_and_how(tmp_path, judge_server, capsys):
    judge_server.reply = better
    assert main([*files(tmp_path), "--base-url", judge_server.url]) == 0
    assert re.search(r"judge +stub\n", capsys.readouterr().out)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["judge"], report["endpoint"], report["served"]) == ("stub", [judge_server.url], ["stub-7b"])
    assert report["settings"] == {"temperature": 1.0, "max_tokens": 1, "top_logprobs": 5, "seed": 0}
    times = [row["time"] for row in read_rows(tmp_path / "out" / "replies.jsonl")]
    assert report["judged"] == [min(times), max(times)] and report["scored"] >= max(times)
    assert report["order"].startswith("one game an instruction")
    assert report["prompt_hash"] == digest([JUDGE_SYSTEM, JUDGE_USER])
    assert main(["alpaca", str(tmp_path / "out" / "annotations.json"), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["judge"] == "stub" and "endpoint" not in again  # annotations hold no more than the name


def test_log_probs_give_a_weighted_preference(tmp_path, judge_server):
    judge_server.reply = better
    judge_server.top = [
        {"token": "m", "logprob": math.log(0.3), "bytes": None},
        {"token": "M", "logprob": math.log(0.1), "bytes": None},
    ]
    assert main([*files(tmp_path), "--base-url", judge_server.url]) == 0
    rows = json.loads((tmp_path / "out" / "annotations.json").read_text())
    for row in rows[:-1]:
        # P(first) = 0.75, and the first shown is the model where the order is switched
        assert row["preference"] == pytest.approx(1.75 if order_switched(row["instruction"]) else 1.25)
    assert {order_switched(row["instruction"]) for row in rows} == {True, False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], "1 instructions have no output of the model, first 'Tell of lists'"),
        (lambda rows: [*rows, rows[0] | {"instruction": "more"}], "1 instructions are not in the reference file"),
    ],
)
def test_other_instructions_are_refused(tmp_path, judge_server, capsys, change, message):
    assert main([*files(tmp_path, change), "--base-url", judge_server.url]) == 2
    assert message in capsys.readouterr().err
    assert not judge_server.asked
