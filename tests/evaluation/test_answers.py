"""Files of answers: layouts, pairing by prompt, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rto.evaluation.answers import Answer, pair_answers, prompt_id, read_answers


def write(path: Path, rows: list, array: bool = False) -> Path:
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(model: str, prompts: str) -> list[Answer]:
    return [Answer(prompt_id(p), p, f"{model} on {p}", model) for p in prompts]


def test_our_rows(tmp_path):
    rows = [
        {"prompt": "P", "answer": "x", "finished": False, "policy": "rto"},
        {"prompt": "Q\u2028", "answer": "", "finished": True, "policy": "rto", "category": "maths"},
    ]
    assert read_answers(write(tmp_path / "a.jsonl", rows)) == [
        Answer(prompt_id("P"), "P", "x", "rto", None, False),
        Answer(prompt_id("Q\u2028"), "Q\u2028", "", "rto", "maths", True),
    ]


def test_the_answers_of_an_evaluation_are_named_by_their_file(tmp_path):
    rows = [{"prompt": "P", "answer": "x", "finished": True, "score": 0.5, "prompt_ids": [1], "answer_ids": [2]}]
    assert read_answers(write(tmp_path / "answers-rto.jsonl", rows)) == [
        Answer(prompt_id("P"), "P", "x", "rto", None, True)
    ]


@pytest.mark.parametrize("array", [True, False])
def test_model_outputs_of_alpaca_eval(tmp_path, array):
    rows = [{"dataset": "koala", "generator": "m", "instruction": "P", "output": "x"}]
    expected = [Answer(prompt_id("P"), "P", "x", "m", "koala")]
    assert read_answers(write(tmp_path / "model_outputs.json", rows, array)) == expected


def test_a_chat_is_shown_as_text(tmp_path):
    one = {"role": "user", "content": "P"}
    more = [one, {"role": "assistant", "content": "x"}, {"role": "user", "content": "Q"}]
    rows = [{"prompt": [one], "answer": "x"}, {"prompt": more, "answer": "y"}]
    assert [a.prompt for a in read_answers(write(tmp_path / "a.jsonl", rows))] == [
        "P",
        "User: P\n\nAssistant: x\n\nUser: Q",
    ]


def test_the_id_depends_on_the_prompt_alone():
    assert prompt_id("P") == prompt_id("P") != prompt_id("P ")
    assert len(prompt_id("\ud800")) == 16


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no answers"),
        (
            [{"prompt": "P", "answer": "x"}, {"prompt": "P", "answer": "y"}, {"prompt": "P", "answer": "z"}],
            "2 rows too",
        ),
        ([{"prompt": "P"}], "row 1: prompt and answer"),
        ([{"prompt": "", "answer": "x"}], "row 1"),
        ([{"prompt": [{"role": "user"}], "answer": "x"}], "row 1"),
        ([{"instruction": "P", "output": None}], "instruction and output"),
        ([3], "row 1: not a JSON object"),
        ([{"prompt": "P", "answer": "x", "model": "a"}, {"prompt": "Q", "answer": "x", "model": "b"}], "2 models"),
    ],
)
def test_what_is_refused(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        read_answers(write(tmp_path / "a.jsonl", rows))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_answers(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"{oops\n")
    with pytest.raises(ValueError, match="neither JSON lines"):
        read_answers(tmp_path / "a.jsonl")


def test_pairs_do_not_depend_on_the_order_of_the_files():
    pairs, missing = pair_answers(answers("a", "xyz"), answers("b", "zxy"))
    assert missing == (0, 0) and all(a.prompt == b.prompt for a, b in pairs)
    again, _ = pair_answers(answers("b", "yzx"), answers("a", "yxz"))
    assert [(b, a) for a, b in again] == pairs


def test_prompts_without_a_partner():
    with pytest.raises(ValueError, match="2 and 1 answers to prompts that the other lacks, 1 in common"):
        pair_answers(answers("a", "xyz"), answers("b", "zw"))
    pairs, missing = pair_answers(answers("a", "xyz"), answers("b", "zw"), "skip")
    assert [a.prompt for a, _ in pairs] == ["z"] and missing == (2, 1)
    with pytest.raises(ValueError, match="no prompt in common"):
        pair_answers(answers("a", "x"), answers("b", "y"), "skip")
