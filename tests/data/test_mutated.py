"""Hundreds of damaged data files: each loads with every row counted, or is refused with file and row. Seeded."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pytest
from mutate import ODD, Hang, Raw, attempt, faults_of, spoil_bytes, spoil_value, to_json
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rto.config import Files
from rto.data import chat, sources
from rto.data.chat import Encoder
from rto.data.layouts import Reason
from rto.data.rows import make_rows
from rto.data.sources import Loaded
from rto.evaluation.formats import FORMATS, read_questions
from rto.recipe import build
from rto.report import RunLog, read_metrics

EACH = 15  # mutants of every layout and file kind
KINDS = ("jsonl", "jsonl.gz", "json", "json.gz", "parquet", "parquet.gz")
SYSTEM = {"role": "system", "content": "Be kind."}


def turns(number: int, *roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {number}, Grüße 🙂"} for role in roles]


def human(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"ask {number}"}]


def dialogue(number: int, answer: str) -> str:
    return f"\n\nHuman: hi {number}\n\nAssistant: yes?\n\nHuman: 名前?\n\nAssistant: {answer}"


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# Layout -> the key of [data], its reader, and a good record.
LAYOUTS: dict[str, tuple[str, Callable[[Files], Loaded[Any]], Callable[[int], dict[str, Any]]]] = {
    "trl": (
        "pairs",
        sources.read_pairs,
        lambda i: {"prompt": [SYSTEM, *turns(i, "user")], "chosen": answer("a"), "rejected": answer("b"), "margin": i},
    ),
    "hh": ("pairs", sources.read_pairs, lambda i: {"chosen": dialogue(i, "a"), "rejected": dialogue(i, "b")}),
    "sharegpt": (
        "pairs",
        sources.read_pairs,
        lambda i: {
            "system": "Be kind.",
            "conversations": human(i),
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
            "score_chosen": 2.5,
            "score_rejected": -1.0,
        },
    ),
    "prompts": ("prompts", sources.read_prompts, lambda i: {"prompt": f"ask {i}"}),
    "messages": (
        "sft",
        sources.read_answers,
        lambda i: {"messages": turns(i, "system", "user", "assistant", "user", "assistant")},
    ),
    "scored": (
        "scored",
        sources.read_scored,
        lambda i: {"prompt": f"ask {i}", "answers": ["a", "b", "c"], "scores": [i, 0.5, -1]},
    ),
}
ENCODERS: dict[str, Callable[..., Any]] = {
    "pairs": chat.encode_pairs,
    "prompts": chat.encode_prompts,
    "sft": chat.encode_answers,
    "scored": chat.encode_scored,
}
assert len(LAYOUTS) * len(KINDS) * EACH >= 500


@pytest.fixture(scope="module")
def tally(request) -> Iterator[Counter[str]]:
    """Counted here, told at the end of the module."""
    count: Counter[str] = Counter()
    yield count
    told = ", ".join(f"{count[kind]} {kind}" for kind in ("loaded", "counted", "refused"))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{count.total()} mutated data files: {told}")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def written(records: list[Any], kind: str) -> bytes:
    """Not compressed."""
    if kind.startswith("jsonl"):
        return b"".join(to_json(record).encode() + b"\n" for record in records)
    if kind.startswith("json"):
        return to_json(records).encode()
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def mutant(layout: str, kind: str, number: int) -> bytes:
    """The bytes of a file of five records with one to three faults."""
    chance = random.Random(f"{layout} {kind} {number}")
    records: list[Any] = [LAYOUTS[layout][2](i) for i in range(5)]
    place = chance.choice(("value", "value", "bytes", "packed" if kind.endswith("gz") else "bytes"))
    data = written(records, kind)
    if place == "value" and kind.startswith("json"):
        for _ in range(chance.randint(1, 3)):
            row = chance.randrange(5)
            fine = isinstance(records[row], dict) and records[row]
            records[row] = spoil_value(records[row], chance, ODD) if fine else chance.choice(ODD)
        if isinstance(records[0], dict) and records[0]:  # a key that stands twice: JSON's last one counts
            key = json.dumps(chance.choice(list(records[0])))
            records[0] = Raw(f"{to_json(records[0])[:-1]}, {key}: {to_json(chance.choice(ODD))}}}")
        data = written(records, kind)
    elif place == "value":
        data = odd_columns(records, chance)
    elif place == "bytes":
        data = spoil_bytes(data, chance)
    if kind.endswith("gz"):
        data = gzip.compress(data, mtime=0)
    return spoil_bytes(data, chance) if place == "packed" else data


def odd_columns(records: list[dict[str, Any]], chance: random.Random) -> bytes:
    """A column of Parquet has one type: the same change in every row, or in every second one where that fits."""
    typed = [b"\xff", decimal.Decimal("1.5"), datetime.datetime(2020, 1, 1), float("nan"), float("inf"), 2**62]
    odd = typed + [value for value in ODD if not isinstance(value, Raw) and value not in ("\ud83d", {})]
    while True:
        seed, step = chance.random(), chance.choice((1, 2))
        try:
            changed = [r if i % step else spoil_value(r, random.Random(seed), odd) for i, r in enumerate(records)]
            return written(changed, "parquet")
        except (pyarrow.ArrowException, TypeError, UnicodeError, AttributeError):
            continue  # no Parquet file can be so


def rows_in(path: Path) -> int:
    """Counted by other means than the readers'."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    if ".jsonl" in path.name:
        return sum(bool(line.strip()) for line in data.split(b"\n"))
    if ".json" in path.name:
        return len(json.loads(data.decode("utf-8-sig")))
    return parquet.read_table(io.BytesIO(data)).num_rows


def check_refusal(error: ValueError, path: Path) -> str:
    message = str(error)
    assert not faults_of(message), (faults_of(message), message[:3000])
    assert path.name in message, message
    return message


def check_counts(loaded: Any, total: int) -> None:
    """Every row is kept or rejected, none twice, and a rejected one has a reason that fits on a line."""
    numbers = [row.row for row in loaded.rows] + [bad.row for bad in loaded.rejected]
    assert len(numbers) == len(set(numbers)) == total
    assert [row.row for row in loaded.rows] == sorted(row.row for row in loaded.rows)
    for bad in loaded.rejected:
        assert bad.reason in get_args(Reason) and bad.detail and not faults_of(bad.detail), bad
        assert "\n" not in bad.detail
        json.dumps(vars(bad)).encode()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mutants(layout, kind, tmp_path, tokenizer, tally):
    for number in range(EACH):
        path = tmp_path / f"mutant-{number}.{kind}"
        path.write_bytes(mutant(layout, kind, number))
        named = random.Random(number).choice(("auto", "auto", "trl", "hh", "sharegpt", "prompts", "messages"))
        try:
            tally[tried(layout, path, named, tokenizer)] += 1
        except (Exception, Hang) as error:
            raise AssertionError(f"mutant {number} of {layout}, {kind}, read as {named}: {error!r}"[:3000]) from error


def tried(layout: str, path: Path, named: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Read under both rules for bad rows, then encoded under both rules for long ones."""
    key, read, _ = LAYOUTS[layout]
    told = {
        rule: attempt(lambda rule=rule: read(Files(**{key: str(path)}, layout=named, on_bad_row=rule)))
        for rule in ("error", "skip")
    }
    loaded, strict = told["skip"], told["error"]
    if isinstance(loaded, ValueError):
        assert check_refusal(loaded, path).startswith(f"data.{key} = ")
        assert str(strict) == str(loaded)
        return "refused"
    check_counts(loaded, rows_in(path))
    if loaded.rejected:  # then, and only then, the strict rule refuses
        message = check_refusal(strict, path)
        assert f"{len(loaded.rejected)} bad rows among the" in message and "row " in message
    else:
        assert strict == loaded
    for rule in ("truncate", "reject"):
        encoder = Encoder(tokenizer, 60, 40, rule)
        encoded = attempt(lambda encoder=encoder: ENCODERS[key](encoder, loaded))
        if isinstance(encoded, ValueError):
            check_refusal(encoded, path)
        else:
            check_counts(encoded, rows_in(path))
    if key == "pairs":
        split(path, named, tokenizer)
    return "counted" if loaded.rejected else "loaded"


def split(path: Path, named: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """As a run reads its pairs: also into train, test and oracle."""
    data = {"pairs": str(path), "layout": named, "on_bad_row": "skip", "max_prompt": 60, "max_response": 40}
    config = build({"model": {"name": "any"}, "data": data})
    rows = attempt(lambda: make_rows(config, tokenizer))
    if isinstance(rows, ValueError):
        check_refusal(rows, path)
    else:
        parts = (rows.pairs, rows.test_pairs, rows.oracle_pairs)
        assert sum(map(len, parts)) + len(rows.rejected) == rows_in(path) and all(parts)


# --- other files that a person hands in ----------------------------------------------------------------

QUESTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "jsonl": lambda i: {"prompt": turns(i, "user")},
    "alpaca": lambda i: {"instruction": f"ask {i}", "dataset": "helpful_base"},
    "arena": lambda i: {"uid": f"u{i}", "prompt": f"ask {i}", "category": "hard"},
    "arena-classic": lambda i: {"question_id": f"q{i}", "turns": [{"content": f"ask {i}"}]},
    "mtbench": lambda i: {"question_id": 81 + i, "category": "writing", "turns": [f"ask {i}", "again"]},
}


def mutant_lines(records: list[dict[str, Any]], chance: random.Random, array: bool = False) -> bytes:
    row = chance.randrange(len(records))
    spoilt: list[Any] = list(records)
    if chance.random() < 0.7:
        spoilt[row] = spoil_value(records[row], chance, ODD)
        return written(spoilt, "json" if array else "jsonl")
    return spoil_bytes(written(spoilt, "json" if array else "jsonl"), chance)


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_questions(format, tmp_path, tally):
    for number in range(20):
        chance = random.Random(f"{format} {number}")
        path = tmp_path / f"questions-{number}.jsonl"
        path.write_bytes(mutant_lines([QUESTIONS[format](i) for i in range(4)], chance, chance.random() < 0.3))
        questions = attempt(lambda path=path: read_questions(path, format))
        if isinstance(questions, ValueError):
            check_refusal(questions, path)
        else:
            assert all(turn for question in questions for turn in question.turns)
            json.dumps([[question.key, question.turns] for question in questions], ensure_ascii=False).encode()
        tally["refused" if isinstance(questions, ValueError) else "loaded"] += 1


def test_mutated_metrics(tmp_path, tally):
    """The log is read, cut and gone on with, or the broken line is named."""
    for number in range(40):
        chance = random.Random(f"metrics {number}")
        path = tmp_path / str(number) / "metrics.jsonl"
        path.parent.mkdir()
        path.write_bytes(mutant_lines([{"stage": "sft", "step": i, "loss": 0.5} for i in range(1, 5)], chance))
        rows = attempt(lambda path=path: read_metrics(path.parent))
        cut = attempt(lambda path=path: RunLog(path.parent).cut("sft", 2))
        if isinstance(rows, ValueError):
            check_refusal(rows, path)
            assert re.search(r"line \d+", str(rows)) and str(rows) == str(cut)
        else:
            assert [row for row in rows if row["stage"] != "sft" or row["step"] <= 2] == read_metrics(path.parent)
        tally["refused" if isinstance(rows, ValueError) else "loaded"] += 1
