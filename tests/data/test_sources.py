"""Sources: every layout and file kind gives the same text, and every bad row is counted with its number."""

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from rto.config import Files
from rto.data.sources import (
    RejectedRow,
    TextAnswer,
    TextPair,
    TextPrompt,
    read_answers,
    read_pairs,
    read_prompts,
    split_rows,
    write_rejected,
)

SHARED = Path(__file__).parents[2] / "../shared/data"
HELLO = [{"role": "user", "content": "hi"}]
GOOD = {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "go away"}
TALK = [*HELLO, GOOD, {"role": "user", "content": "bye"}]
PLAIN = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}


def save(path: Path, *records: object) -> str:
    """JSONL of the records; bytes are written as they are, as a line."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def one_pair(tmp_path: Path, record: dict, layout: str = "auto") -> TextPair:
    return read_pairs(Files(pairs=save(tmp_path / "one.jsonl", record), layout=layout)).rows[0]


# --- layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "layout", "prompt"),
    [
        (PLAIN, "trl", "hi"),
        ({"prompt": HELLO, "chosen": [GOOD], "rejected": [BAD]}, "trl", HELLO),
        ({"prompt": HELLO, "chosen": "hello", "rejected": "go away"}, "trl", HELLO),
        ({"prompt": HELLO, "chosen": [*HELLO, GOOD], "rejected": [*HELLO, BAD]}, "trl", HELLO),
        ({"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]}, "trl", TALK),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, "trl", HELLO),
        ({"prompt": "hi", "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]}, "trl", TALK),  # UltraFeedback
        ({"prompt": None, "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]}, "trl", TALK),  # null is missing
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: hello",
                "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: go away",
            },
            "hh",
            TALK,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "hello"},
                "rejected": {"from": "gpt", "value": "go away"},
            },
            "sharegpt",
            HELLO,
        ),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "hello"},
                "rejected": {"from": "gpt", "value": "go away"},
            },
            "sharegpt",
            [{"role": "system", "content": "Be kind."}, *HELLO],
        ),
    ],
)
def test_pair_layouts_are_recognised_and_can_be_named(tmp_path, record, layout, prompt):
    wanted = TextPair(1, prompt, "hello", "go away", 0.0)
    assert one_pair(tmp_path, record) == wanted
    assert one_pair(tmp_path, record, layout) == wanted


def test_named_layout_is_not_guessed(tmp_path):
    """A plain string that happens to begin with 'Human:' stays plain under layout = 'trl'."""
    record = {"prompt": "p", "chosen": "Human: a", "rejected": "Human: b"}
    assert one_pair(tmp_path, record, "trl").chosen == "Human: a"


@pytest.mark.parametrize(
    ("keys", "margin"),
    [
        ({}, 0.0),
        ({"margin": 2}, 2.0),
        ({"score_chosen": 8.5, "score_rejected": 6.0}, 2.5),
        ({"margin": 1.0, "score_chosen": 8.5, "score_rejected": 6.0}, 1.0),
        ({"score_chosen": 8.5}, 0.0),
        ({"margin": None}, 0.0),
    ],
)
def test_margin(tmp_path, keys, margin):
    assert one_pair(tmp_path, PLAIN | keys).margin == margin


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "hi"}, "hi"),
        ({"prompt": HELLO}, HELLO),
        ({"messages": HELLO}, HELLO),
        ({"messages": [*TALK, GOOD]}, TALK),
        ({"conversations": [{"from": "human", "value": "hi"}]}, HELLO),
        (PLAIN | {"chosen": "go away"}, "hi"),  # equal answers do not matter to a prompt
    ],
)
def test_prompts(tmp_path, record, prompt):
    loaded = read_prompts(Files(prompts=save(tmp_path / "p.jsonl", record)))
    assert loaded.rows == [TextPrompt(1, prompt)]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"messages": [*TALK, GOOD]}, TALK),
        ({"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]}, HELLO),
        ({"prompt": "hi", "completion": "hello"}, "hi"),
        ({"prompt": "hi", "response": "hello"}, "hi"),
        ({"prompt": HELLO, "completion": [GOOD]}, HELLO),
        (PLAIN, "hi"),
    ],
)
def test_demonstrations(tmp_path, record, prompt):
    loaded = read_answers(Files(sft=save(tmp_path / "s.jsonl", record)))
    assert loaded.rows == [TextAnswer(1, prompt, "hello")]


def test_prompts_and_demonstrations_fall_back_to_the_pairs_row_for_row(tmp_path):
    config = Files(pairs=save(tmp_path / "p.jsonl", PLAIN, {}, PLAIN | {"prompt": "ho"}), on_bad_row="skip")
    assert read_prompts(config).rows == [TextPrompt(1, "hi"), TextPrompt(3, "ho")]
    assert read_answers(config).rows == [TextAnswer(1, "hi", "hello"), TextAnswer(3, "ho", "hello")]
    with pytest.raises(ValueError, match="data.pairs is missing"):
        read_prompts(Files())


def test_layout_of_the_pairs_does_not_bind_the_other_files(tmp_path):
    config = Files(prompts=save(tmp_path / "p.jsonl", {"prompt": "hi"}), layout="hh")
    assert read_prompts(config).rows == [TextPrompt(1, "hi")]


# --- kinds of files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.parquet.gz"])
def test_every_file_kind_gives_the_same_rows(tmp_path, name):
    records = [{"chosen": [*HELLO, GOOD], "rejected": [*HELLO, BAD], "margin": float(i)} for i in range(3)]
    path = tmp_path / name
    if ".jsonl" in name:
        save(path, *records)
    elif ".json" in name:
        data = json.dumps(records).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    else:
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
        data = buffer.getvalue()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    wanted = [TextPair(i + 1, HELLO, "hello", "go away", float(i)) for i in range(3)]
    assert read_pairs(Files(pairs=str(path))).rows == wanted
    assert read_pairs(Files(pairs=str(path), limit=2)).rows == wanted[:2]


def test_bom_blank_lines_and_unicode_line_ends(tmp_path):
    """U+2028 inside a string is no line end; blank lines count as lines, not as rows."""
    odd = PLAIN | {"chosen": "a\u2028b\x85c"}
    data = b"\xef\xbb\xbf" + json.dumps(odd, ensure_ascii=False).encode() + b"\r\n\r\n" + json.dumps(PLAIN).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    rows = read_pairs(Files(pairs=str(tmp_path / "a.jsonl"))).rows
    assert [(row.row, row.chosen) for row in rows] == [(1, "a\u2028b\x85c"), (3, "hello")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{}", "holds dict, not an array"),
        ("a.json", b'{"a": 1}\n{"a": 1}', "name the file .jsonl"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b'["\xff"]', "not JSON"),
        ("a.jsonl", b"", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9], "gzip file is damaged after line 99"),
        ("a.json.gz", b"not gzip", "gzip file is damaged"),
        ("a.csv", b"prompt", "is none of .jsonl, .json, .parquet"),
        ("a.parquet", b"PAR0", "cannot be read as Parquet"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_pairs(Files(pairs=str(tmp_path / name), on_bad_row="skip"))
    assert str(caught.value).startswith("data.pairs") and name in str(caught.value)


MISSING = ["prefs.jsonl", "no/such/prefs", "./prefs", "owner/prefs.json.gz", "~nobody/prefs.jsonl", "./" + "p" * 5000]


@pytest.mark.parametrize("name", MISSING, ids=range(len(MISSING)))
def test_missing_file(name):
    with pytest.raises(ValueError, match="file not found.*looked for /"):
        read_pairs(Files(pairs=name))


def test_unreachable_hub_name(monkeypatch):
    import datasets  # slow to import, and only this test needs it

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'owner/prefs'.*Give a local file"):
        read_pairs(Files(pairs="owner/prefs"))


def test_unknown_layout_names_the_keys_and_the_layouts(tmp_path):
    path = save(tmp_path / "a.jsonl", {"question": "hi", "better": "a", "worse": "b"})
    with pytest.raises(ValueError, match="question, better, worse.*trl and hh.*sharegpt"):
        read_pairs(Files(pairs=path, on_bad_row="skip"))
    with pytest.raises(ValueError, match="data.prompts.*Known layouts: prompts"):
        read_prompts(Files(prompts=path))
    with pytest.raises(ValueError, match="data.sft.*Known layouts: messages"):
        read_answers(Files(sft=path))


# --- bad rows ------------------------------------------------------------------------------------------


def chat(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": role[0]} for role in roles]


BAD_ROWS: list[tuple[object, str]] = [
    (b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}', "undecodable"),  # Latin-1
    (b'{"prompt": "hi", "chosen": "a", "reje', "undecodable"),  # cut line
    (b"[" * 100_000, "undecodable"),  # deeper than the parser goes
    (b'{"prompt": "hi", "chosen": "\\ud83d", "rejected": "b"}', "undecodable"),  # half of an emoji
    (["hi", "a", "b"], "not_an_object"),
    (b"null", "not_an_object"),
    ({"prompt": "hi", "chosen": "a"}, "missing_field"),
    ({"prompt": "hi", "chosen": "a", "rejected": None}, "missing_field"),
    ({"chosen": "a", "rejected": "b"}, "missing_field"),  # no prompt
    ({"prompt": HELLO, "chosen": [{"role": "assistant"}], "rejected": [BAD]}, "missing_field"),
    ({"prompt": "hi", "chosen": [], "rejected": []}, "missing_field"),
    ({"prompt": 7, "chosen": "a", "rejected": "b"}, "wrong_type"),
    ({"prompt": "hi", "chosen": 1.5, "rejected": "b"}, "wrong_type"),
    ({"prompt": ["hi"], "chosen": "a", "rejected": "b"}, "wrong_type"),
    (PLAIN | {"margin": "large"}, "wrong_type"),
    (PLAIN | {"margin": float("nan")}, "wrong_type"),
    (PLAIN | {"prompt": " \n"}, "empty_prompt"),
    (PLAIN | {"prompt": chat("system")}, "empty_prompt"),
    (PLAIN | {"prompt": [{"role": "user", "content": ""}]}, "empty_prompt"),
    (PLAIN | {"chosen": " "}, "empty_answer"),
    (PLAIN | {"rejected": ""}, "empty_answer"),
    (PLAIN | {"rejected": "hello"}, "same_answers"),
    (PLAIN | {"prompt": chat("user", "user")}, "roles_out_of_order"),
    (PLAIN | {"prompt": chat("user", "assistant")}, "roles_out_of_order"),
    (PLAIN | {"prompt": chat("user", "system", "user")}, "roles_out_of_order"),
    (PLAIN | {"prompt": chat("tool")}, "roles_out_of_order"),
    ({"chosen": TALK, "rejected": TALK}, "roles_out_of_order"),  # no answer at the end
    ({"chosen": [*HELLO, GOOD], "rejected": [*TALK, BAD]}, "prompts_differ"),
    ({"prompt": "ho", "chosen": [*HELLO, GOOD], "rejected": [*HELLO, BAD]}, "prompts_differ"),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
        "prompts_differ",
    ),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "wrong_type"),
]


def test_bad_rows_are_counted_with_number_and_reason(tmp_path):
    path = save(tmp_path / "bad.jsonl", PLAIN, *(row for row, _ in BAD_ROWS), PLAIN)
    loaded = read_pairs(Files(pairs=path, on_bad_row="skip"))
    assert [row.row for row in loaded.rows] == [1, len(BAD_ROWS) + 2]
    assert [(bad.row, bad.reason) for bad in loaded.rejected] == [(i + 2, why) for i, (_, why) in enumerate(BAD_ROWS)]
    assert loaded.counts() == {
        "wrong_type": 6,
        "missing_field": 5,
        "roles_out_of_order": 5,
        "undecodable": 4,
        "empty_prompt": 3,
        "prompts_differ": 3,
        "not_an_object": 2,
        "empty_answer": 2,
        "same_answers": 1,
    }
    write_rejected(tmp_path / "rejected_rows.jsonl", loaded.rejected)
    written = (tmp_path / "rejected_rows.jsonl").read_text().splitlines()
    assert [RejectedRow(**json.loads(line)) for line in written] == loaded.rejected


def test_scores_too_far_apart_are_no_margin(tmp_path):
    """Each is finite, their difference is not."""
    record = PLAIN | {"score_chosen": 1.5e308, "score_rejected": -1.5e308}
    loaded = read_pairs(Files(pairs=save(tmp_path / "p.jsonl", PLAIN, record), on_bad_row="skip"))
    (bad,) = loaded.rejected
    assert (bad.row, bad.reason) == (2, "wrong_type")
    assert bad.detail == "score_chosen - score_rejected is inf, not a finite number"


def test_what_a_row_holds_is_quoted_on_one_short_line(tmp_path):
    """Keys and roles of a file go into messages and logs: they must not steer a terminal or fill a screen."""
    odd = {"prompt": "hi", "\x1b[2J\n": "a", "\ud83d": "b", "k" * 9000: "c"}
    role = PLAIN | {"prompt": [{"role": "\x07" + "r" * 9000, "content": "hi"}]}
    loaded = read_pairs(Files(pairs=save(tmp_path / "p.jsonl", PLAIN, odd, role), on_bad_row="skip"))
    missing, unknown = (bad.detail for bad in loaded.rejected)
    assert missing.startswith(r"chosen (keys found: prompt, \x1b[2J\n, \ud83d, kkk") and missing.endswith("kkk)")
    assert unknown.startswith(r"unknown role '\x07rrr") and unknown.endswith("in prompt, message 1")
    assert all(text.isprintable() and len(text) < 350 for text in (missing, unknown))


def test_bad_rows_are_an_error_unless_skipped(tmp_path):
    path = save(tmp_path / "bad.jsonl", PLAIN, {"prompt": "hi"}, b"{", PLAIN, {"prompt": "ho"})
    with pytest.raises(ValueError) as caught:
        read_pairs(Files(pairs=path))
    text = str(caught.value)
    assert path in text and "3 bad rows among the 5 read" in text and "--data.on_bad_row skip" in text
    assert "missing_field: 2 (rows 2, 5; row 2: chosen (keys found: prompt))" in text
    assert "undecodable: 1 (rows 3; row 3: not JSON" in text


def test_the_limit_counts_good_rows_and_reads_no_further(tmp_path):
    path = save(tmp_path / "bad.jsonl", b"{", PLAIN, PLAIN, b"{")
    loaded = read_pairs(Files(pairs=path, on_bad_row="skip", limit=2))
    assert [row.row for row in loaded.rows] == [2, 3] and [bad.row for bad in loaded.rejected] == [1]


def test_no_good_row_is_an_error_even_when_skipping(tmp_path):
    path = save(tmp_path / "bad.jsonl", PLAIN | {"chosen": ""})
    with pytest.raises(ValueError, match="No row is good"):
        read_pairs(Files(pairs=path, on_bad_row="skip"))


# --- splits --------------------------------------------------------------------------------------------


def test_split_is_disjoint_complete_and_seeded():
    prompts = [f"prompt {i}" for i in range(100)]
    parts = split_rows(prompts, test=0.05, oracle=0.2, seed=3)
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 75, "test": 5, "oracle": 20}
    assert sorted(sum(parts.values(), [])) == list(range(100))
    assert parts == split_rows(prompts, test=0.05, oracle=0.2, seed=3)
    assert parts != split_rows(prompts, test=0.05, oracle=0.2, seed=4)


@pytest.mark.parametrize("seed", range(20))
def test_rows_with_one_prompt_stay_together(seed):
    prompts = [[{"role": "user", "content": str(i % 7)}] for i in range(28)]
    parts = split_rows(prompts, test=0.05, oracle=0.3, seed=seed)
    seen = [{prompts[i][0]["content"] for i in rows} for rows in parts.values()]
    assert sum(map(len, seen)) == 7 == len(set.union(*seen))
    # 5 % of 28 rows is 1, no group of 4 fits, one goes there all the same; 30 % is 8: two groups.
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 16, "test": 4, "oracle": 8}


def test_small_splits():
    parts = split_rows(["a", "b"], test=0.01, oracle=0.0, seed=0)
    assert sorted(map(len, parts.values())) == [0, 1, 1] and parts["oracle"] == []
    parts = split_rows(["a", "b", "c"], test=0.9, oracle=0.9, seed=0)
    assert all(len(rows) == 1 for rows in parts.values())
    with pytest.raises(ValueError, match="2 different prompts.*train, test, oracle.*data.oracle = 0"):
        split_rows(["a", "b", "a"], test=0.05, oracle=0.2, seed=0)
    with pytest.raises(ValueError, match="1 different prompts"):
        split_rows(["a", "a"], test=0.05, oracle=0.0, seed=0)


# --- real data -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data (../shared/data beside the repository) is not here")
def test_real_data():
    """Seven HH rows are really bad: two empty answers, four assistants that speak twice in a row, one mix-up."""
    harmless = read_pairs(Files(pairs=str(SHARED / "hh_harmless_pairs.jsonl.gz"), on_bad_row="skip"))
    assert len(harmless.rows) == 1493
    assert harmless.counts() == {"roles_out_of_order": 4, "empty_answer": 2, "prompts_differ": 1}
    assert harmless.rows[0].prompt[0] == {"role": "user", "content": "what are some pranks with a pen i can do?"}
    chats = read_pairs(Files(pairs=str(SHARED / "chat_pairs.json")))
    assert len(chats.rows) == 300 and not chats.rejected
