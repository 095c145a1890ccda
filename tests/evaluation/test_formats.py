"""Question files in, answer files out: exact keys in the official order, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rto.evaluation.formats import FORMATS, Answer, read_questions, read_records, short_id

ALPACA = {"instruction": "Name a colour.", "dataset": "koala", "output": "Red.", "generator": "baseline"}
ARENA = {"uid": "a1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort a list."}
CLASSIC = {"question_id": "b2", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "Sort a list."}]}
MTBENCH = {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."], "reference": []}
METADATA = {
    "token_len": 4,
    "header_count": {"h1": 1, "h2": 0, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
    "list_count": {"ordered": 0, "unordered": 1},
    "bold_count": {"**": 0, "__": 0},
}


def write(path: Path, rows: list[dict], array: bool = False) -> Path:
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def row_of(format: str, record: dict, tmp_path: Path, texts: list[str], count=None) -> dict:
    question = read_questions(write(tmp_path / "questions.jsonl", [record]), format)[0]
    return FORMATS[format].row(Answer(question, 1, texts, [True] * len(texts), "my-model", 12.5), count)


def words(text: str) -> int:
    return len(text.split())


def test_an_alpaca_row(tmp_path):
    row = row_of("alpaca", ALPACA, tmp_path, ["Blue."])
    wanted = {"instruction": "Name a colour.", "output": "Blue.", "generator": "my-model", "dataset": "koala"}
    assert list(row.items()) == list(wanted.items())  # the baseline's output and name are not taken over
    assert list(row_of("alpaca", ALPACA | {"datasplit": "eval"}, tmp_path, [""]))[-1] == "datasplit"


def test_an_arena_row(tmp_path):
    row = row_of("arena", ARENA, tmp_path, ["# Do\n- sort it"], words)
    assert list(row) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
    assert (row["uid"], row["model"], row["tstamp"]) == ("a1", "my-model", 12.5)
    assert row["messages"] == [
        {"role": "user", "content": "Sort a list."},
        {"role": "assistant", "content": {"answer": "# Do\n- sort it"}},
    ]
    assert json.dumps(row["metadata"]) == json.dumps(METADATA | {"token_len": 5})  # the style code goes by position
    assert len(row["ans_id"]) == 22
    assert "metadata" not in row_of("arena", ARENA, tmp_path, ["# Do"])


def test_a_classic_arena_row(tmp_path):
    row = row_of("arena-classic", CLASSIC, tmp_path, ["# Do\n- sort"], words)
    assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"]
    assert row["choices"] == [{"index": 0, "turns": [{"content": "# Do\n- sort", "token_len": 4}]}]
    assert json.dumps(row["conv_metadata"]) == json.dumps(METADATA)
    bare = row_of("arena-classic", CLASSIC, tmp_path, ["# Do"])
    assert bare["choices"][0]["turns"] == [{"content": "# Do"}]
    assert "conv_metadata" not in bare


def test_either_arena_layout_asks_for_either(tmp_path):
    assert row_of("arena", CLASSIC, tmp_path, ["x"])["messages"][0]["content"] == "Sort a list."
    assert row_of("arena-classic", ARENA, tmp_path, ["x"])["question_id"] == "a1"


def test_an_mtbench_row(tmp_path):
    row = row_of("mtbench", MTBENCH, tmp_path, ["Roses.", "Rose."])
    assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert row["question_id"] == 81
    assert row["choices"] == [{"index": 0, "turns": ["Roses.", "Rose."]}]


def test_a_plain_row(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    row = row_of("jsonl", {"messages": chat}, tmp_path, [" Hello"])
    assert row == {"question": 1, "prompt": chat, "answer": " Hello", "finished": True, "model": "my-model"}


def test_ids_depend_on_the_names_alone():
    assert short_id("a", 1) == short_id("a", 1)
    assert len({short_id("a", 1), short_id("a", "1"), short_id("a", 2), short_id("a1"), short_id("b", 1)}) == 5
    assert all(len(short_id("a", i)) == 22 for i in range(50))


def test_every_format_finds_its_own_rows_again(tmp_path):
    records = {"jsonl": {"prompt": "Hi"}, "alpaca": ALPACA, "arena": ARENA, "arena-classic": CLASSIC}
    records["mtbench"] = MTBENCH
    assert set(records) == set(FORMATS)
    for format, record in records.items():
        question = read_questions(write(tmp_path / "q.jsonl", [record]), format)[0]
        row = row_of(format, record, tmp_path, ["x"] * len(question.turns))
        assert FORMATS[format].key_of(json.loads(json.dumps(row))) == question.key
        with pytest.raises(ValueError, match="a row with the keys text and without"):
            FORMATS[format].key_of({"text": "x"})


def test_a_json_array_is_read_too(tmp_path):
    path = write(tmp_path / "eval.json", [ALPACA, ALPACA | {"instruction": "Another."}], array=True)
    assert [question.key for question in read_questions(path, "alpaca")] == ["Name a colour.", "Another."]


@pytest.mark.parametrize(
    ("format", "record", "said"),
    [
        (
            "alpaca",
            {"prompt": "Hi"},
            r"row 1: --format alpaca reads questions with instruction \(found the keys prompt\)",
        ),
        ("alpaca", {"instruction": 5}, "instruction"),
        ("arena", {"prompt": "Hi"}, "reads questions with uid and prompt"),
        ("arena-classic", {"question_id": "a", "turns": []}, "question_id and turns of content"),
        ("mtbench", MTBENCH | {"turns": ["one"]}, "category and two turns"),
        ("mtbench", MTBENCH | {"question_id": "81"}, "whole question_id"),
        ("mtbench", {"question_id": 81, "turns": ["a", "b"]}, "category"),
        ("mtbench", MTBENCH | {"turns": "ab"}, "turns is not a list of two"),
        ("mtbench", MTBENCH | {"turns": ["a", " "]}, "turn 2 is empty"),
        ("alpaca", {"instruction": " "}, "instruction is empty"),
        ("alpaca", {"instruction": "\ud83d"}, "row 1: .*undecodable: instruction"),
        ("arena", {"uid": "\ud83d", "prompt": "Hi"}, "row 1: .*undecodable: uid"),
        ("arena", {"\x1b[2J": "Hi"}, r"found the keys \\x1b\[2J"),
        ("jsonl", {"text": "Hi"}, "prompt or messages"),
        ("jsonl", {"prompt": " "}, "the prompt is empty"),
        ("csv", {"prompt": "Hi"}, "format 'csv' is unknown: jsonl, alpaca"),
    ],
)
def test_a_question_of_another_layout_is_refused(tmp_path, format, record, said):
    with pytest.raises(ValueError, match=said):
        read_questions(write(tmp_path / "questions.jsonl", [record]), format)


def test_a_question_stands_once(tmp_path):
    with pytest.raises(ValueError, match="row 3: 'a1' stands in row 1 already"):
        read_questions(write(tmp_path / "q.jsonl", [ARENA, ARENA | {"uid": "a2"}, ARENA]), "arena")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n{"a"', "line 2: not JSON"),
        ("[1, 2", "not JSON"),
        ("[1, 2]", "row 1: int, not an object"),
        ('{"a": 1}\n7\n', "row 2: int, not an object"),
        ("\n\n", "no rows"),
        ('{"a": "\udcff"}', "broken.jsonl: not JSON .*can't decode byte 0xff"),  # not UTF-8
        ('{"a": 1}\n' + "[" * 100_000, "broken.jsonl, line 2: not JSON"),  # deeper than the parser goes
        ("[" * 100_000, "broken.jsonl: not JSON"),
    ],
    ids=range(8),
)
def test_a_broken_file_is_named(tmp_path, text, said):
    path = tmp_path / "broken.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=said):
        read_records(path)
    with pytest.raises(ValueError, match="file not found"):
        read_records(tmp_path / "nowhere.jsonl")
