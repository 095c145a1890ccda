"""Scored answers: both layouts are read, bad rows are counted with their numbers, held-out prompts stay out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rto.config import Files
from rto.data import Encoder, TextScored, encode_scored, read_scored
from rto.data.chat import PairRow
from rto.data.rows import make_rows, make_tokenizer, scored_from_pairs
from rto.data.sources import Loaded
from rto.recipe import build

HELLO = [{"role": "user", "content": "hi"}]
BYE = [{"role": "user", "content": "bye"}]
GOOD = {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "go away"}
LABELLED = {"prompt": "hi", "completion": "hello", "label": True}
SCORED = {"prompt": "hi", "answers": ["hello", "go away"], "scores": [7, 2.5]}


def save(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(tmp_path: Path, *records: object, **keys: Any) -> Loaded[TextScored]:
    return read_scored(Files(scored=save(tmp_path / "scored.jsonl", *records), **keys))


@pytest.mark.parametrize(
    ("record", "prompt", "answers", "scores"),
    [
        (LABELLED, "hi", ["hello"], [1.0]),
        (LABELLED | {"label": False}, "hi", ["hello"], [0.0]),
        (LABELLED | {"label": 0}, "hi", ["hello"], [0.0]),
        ({"prompt": HELLO, "completion": [GOOD], "label": True}, HELLO, ["hello"], [1.0]),
        ({"prompt": HELLO, "response": [*HELLO, GOOD], "label": True}, HELLO, ["hello"], [1.0]),
        ({"completion": [*HELLO, GOOD], "label": True}, HELLO, ["hello"], [1.0]),
        (SCORED, "hi", ["hello", "go away"], [7.0, 2.5]),
        ({"prompt": "hi", "completions": ["hello"], "scores": [-1]}, "hi", ["hello"], [-1.0]),
        ({"prompt": HELLO, "responses": [[GOOD], BAD], "scores": [1, 0]}, HELLO, ["hello", "go away"], [1.0, 0.0]),
        ({"answers": [[*HELLO, GOOD], [*HELLO, BAD]], "scores": [1, 0]}, HELLO, ["hello", "go away"], [1.0, 0.0]),
        ({"prompt": "hi", "answers": ["a", "a"], "scores": [1, 1]}, "hi", ["a", "a"], [1.0, 1.0]),
    ],
)
def test_layouts(tmp_path, record, prompt, answers, scores):
    assert read(tmp_path, record).rows == [TextScored(1, prompt, answers, scores)]


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"scores": [1]}, "lengths_differ", "2 answers and 1 scores"),
        ({"answers": [], "scores": []}, "no_answers", "answers is an empty list"),
        ({"scores": [1, math.nan]}, "wrong_type", "number 2 of scores is nan, not a finite number"),
        ({"scores": [math.inf, 1]}, "wrong_type", "number 1 of scores is inf, not a finite number"),
        ({"scores": [10**400, 1]}, "wrong_type", "not a finite number"),
        ({"scores": [True, 1]}, "wrong_type", "number 1 of scores is True, not a finite number"),
        ({"scores": ["7", 1]}, "wrong_type", "number 1 of scores is str, not a finite number"),
        ({"scores": 3}, "wrong_type", "scores is 3, not a list"),
        ({"answers": "hello"}, "wrong_type", "answers is str, not a list"),
        ({"answers": ["hello", 3]}, "wrong_type", "number 2 of answers is 3, not text"),
        ({"answers": ["hello", " "]}, "empty_answer", "number 2 of answers is empty"),
        ({"answers": ["hello", [*BYE, GOOD]]}, "prompts_differ", "number 2 of answers"),
        ({"prompt": None, "answers": [[*HELLO, GOOD], [*BYE, GOOD]]}, "prompts_differ", "do not share everything"),
        ({"answers": ["hello", HELLO]}, "roles_out_of_order", "number 2 of answers ends with user"),
        ({"prompt": " "}, "empty_prompt", "the prompt is empty"),
        ({"prompt": None}, "missing_field", "prompt (only whole conversations go without"),
        ({"scores": None, "completion": None}, "missing_field", "scores"),
    ],
)
def test_bad_rows_are_counted_with_their_numbers(tmp_path, change, reason, detail):
    loaded = read(tmp_path, SCORED, SCORED | change, SCORED, on_bad_row="skip")
    assert [row.row for row in loaded.rows] == [1, 3]
    (bad,) = loaded.rejected
    assert (bad.row, bad.reason) == (2, reason) and detail in bad.detail
    assert loaded.counts() == {reason: 1}
    with pytest.raises(ValueError, match=rf"1 bad rows among the 3 read\n  {reason}: 1 \(rows 2; row 2: "):
        read(tmp_path, SCORED, SCORED | change, SCORED)


@pytest.mark.parametrize(
    ("change", "detail"),
    [({"label": 2}, "label is 2"), ({"label": "yes"}, "label is str"), ({"label": 0.5}, "label is 0.5")],
)
def test_bad_labels(tmp_path, change, detail):
    (bad,) = read(tmp_path, LABELLED, LABELLED | change, on_bad_row="skip").rejected
    assert (bad.row, bad.reason, bad.detail) == (2, "wrong_type", f"{detail}, not true or false")


def test_an_unknown_layout_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"data\.scored = .*no layout is recognised from the keys prompt, chosen"):
        read(tmp_path, {"prompt": "hi", "chosen": "a", "rejected": "b"})
    with pytest.raises(ValueError, match=r"data\.scored is missing"):
        read_scored(Files())


# --- encoding ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config = build(
        {"model": {"type": "scratch"}, "data": {"type": "world"}, "evaluation": {"oracle": {"type": "world"}}}
    )
    return Encoder(make_tokenizer(config, None), max_prompt=16, max_response=4)


def test_encoding(encoder):
    words = [word for word in encoder.tokenizer.get_vocab() if word.isalpha()]
    short, long = words[0], " ".join(words[:6])
    loaded = Loaded(
        "f", [TextScored(1, words[1], [short, long], [1.0, 2.0]), TextScored(2, words[1], [short] * 2, [1, 1])]
    )
    first, second = encode_scored(encoder, loaded).rows
    assert first.prompt == encoder.prompt(words[1]) and first.prompt_text == words[1]
    assert first.answers[0] == encoder.answer(words[1], short)[0] and first.answers[0][-1] == encoder.end
    assert len(first.answers[1]) == 4 and first.finished == [True, False]  # cut
    assert first.scores == [1.0, 2.0]
    assert second.answers[0] == second.answers[1]  # the same twice is no error here


def test_a_row_with_one_answer_that_has_no_tokens_is_rejected(encoder):
    word = next(word for word in encoder.tokenizer.get_vocab() if word.isalpha())
    end = encoder.tokenizer.convert_ids_to_tokens(encoder.end)
    out = encode_scored(
        encoder, Loaded("f", [TextScored(3, word, [word], [1]), TextScored(4, word, [word, end], [1, 0])])
    )
    assert [row.row for row in out.rows] == [3]
    assert [(bad.row, bad.reason) for bad in out.rejected] == [(4, "empty_answer")]


def test_pairs_as_scored_answers():
    pair = PairRow(5, "p", [1, 2], [3, 9], True, [4], False, margin=0.25)
    (row,) = scored_from_pairs([pair])
    assert (row.row, row.prompt_text, row.prompt) == (5, "p", [1, 2])
    assert (row.answers, row.finished, row.scores) == ([[3, 9], [4]], [True, False], [1.0, 0.0])


# --- the rows of a run ---------------------------------------------------------------------------------


def test_held_out_prompts_stay_out(encoder, tmp_path):
    words = [word for word in encoder.tokenizer.get_vocab() if word.isalpha()][:8]
    pairs = [{"prompt": word, "chosen": "a", "rejected": "b"} for word in words]
    scored = [{"prompt": word, "completion": word, "label": True} for word in words]
    bad = {"prompt": words[0], "completion": "", "label": True}
    files = {"pairs": save(tmp_path / "pairs.jsonl", *pairs), "test": 0.25, "oracle": 0, "on_bad_row": "skip"}
    config = build({"model": {"name": "any"}, "data": files})
    without = make_rows(config, encoder.tokenizer)
    assert without.scored == []
    files["scored"] = save(tmp_path / "scored.jsonl", *scored, bad)
    rows = make_rows(build({"model": {"name": "any"}, "data": files}), encoder.tokenizer)
    held_out = {row.prompt_text for row in rows.test_pairs}
    assert len(held_out) == 2
    assert [row.prompt_text for row in rows.scored] == [word for word in words if word not in held_out]
    assert [(bad.row, bad.reason) for bad in rows.rejected] == [(9, "empty_answer")]
    only = [{"prompt": word, "completion": word, "label": True} for word in held_out]
    files["scored"] = save(tmp_path / "only.jsonl", *only)
    with pytest.raises(ValueError, match=r"data\.scored = .*all of its prompts are held out"):
        make_rows(build({"model": {"name": "any"}, "data": files}), encoder.tokenizer)
