"""Hundreds of damaged recipes and overrides: each is read, or refused in a line that names file or key. Seeded."""

from __future__ import annotations

import datetime
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mutate import DEEP, Hang, Raw, attempt, faults_of, spoil_bytes, spoil_value, watchdog
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rto import recipe
from rto.cli import main
from rto.config import Config
from rto.pipeline.resolve import resolve

ROOT = Path(__file__).parents[1]
TABLES, BYTES, OVERRIDES = 30, 10, 15  # mutants of every recipe

FULL = """
output = "runs/full"
seed = 3
device = "cpu"
trackers = ["tensorboard"]
stages = ["sft", "prefer", "reward", "rl", "evaluate"]
[model]
name = "owner/model"
lora = { r = 8, targets = ["q_proj", "v_proj"] }
[data]
pairs = "prefs.jsonl"
prompts = "prompts.parquet"
limit = 100
[checkpoints]
every = 10
[prefer]
loss = { type = "simpo" }
betas = [0.9, 0.99]
rounds = { count = 2, extrapolation = 0.3 }
[reward]
cutoff = 1.75
model = { type = "scratch" }
normaliser = { answers = "sampled" }
[policy]
method = "custom"
rewards = [{ type = "implicit", scale = 0.1, clip = "none" }, { type = "terminal" }]
advantage = { type = "gae", lam = 0.95 }
loss = { clip = 0.1 }
kl = { controller = "adaptive", target = 6.0, ema = 0.9 }
critic = { init = "reference" }
[guides.other]
loss = { type = "ipo", beta = 0.2 }
[scorers.tokens]
cutoff = 0
[baselines.ppo]
method = "ppo"
[baselines.remax]
method = "ppo"
scorer = "tokens"
advantage = { type = "remax" }
[evaluation]
oracle = { type = "http", url = "http://127.0.0.1:8000" }
"""
RECIPES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("recipes/*.toml"))}
RECIPES["full.toml"] = FULL
assert len(RECIPES) * (TABLES + BYTES + OVERRIDES) >= 300

NUMBERS: list[Any] = [0, -1, 7, 2.5, 10**18, 10**30, -1e-9, 5e-324, 1e308, float("nan"), float("inf"), float("-inf")]
NUMBERS += [Raw("0x" + "f" * 5000), Raw("9" * 5000), Raw("1e999")]
WORDS: list[Any] = ["", "none", "abc", "5", "名前", "\x00", "\x1b[31m\nrto: done", "../../etc", "a" * 5000, "~nobody/x"]
TREES: list[Any] = [True, [], [[]], ["none"], [1, "a"], {}, {"type": "x"}, {"type": ["dpo"]}, {"type": {}}, {"type": 3}]
TREES += [{"": {}}, {"a": {"b": {"c": "none"}}}, datetime.date(2026, 1, 1), Raw("[" * DEEP + "]" * DEEP)]
TREES += [Raw("{a=" * 3000 + "1" + "}" * 3000), [3] * 1000, "[policy]"]
ODD = NUMBERS + WORDS + TREES


def to_toml(value: Any) -> str:
    """An inline value."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {to_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value)
    return str(value)  # numbers, nan and inf too, and dates: as Python writes them


@pytest.fixture(scope="module")
def tally(request) -> Iterator[Counter[str]]:
    """Counted here, told at the end of the module."""
    count: Counter[str] = Counter()
    yield count
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{count.total()} mutated recipes: {count['loaded']} loaded, {count['refused']} refused")


def pairs(name: str) -> list[tuple[str, str]]:
    """Some of the recipes leave the pairs to the user."""
    data = recipe.tomllib.loads(RECIPES[name])["data"]
    return [] if data.get("type") == "world" or "pairs" in data else [("data.pairs", "prefs.jsonl")]


def read(path: Path, overrides: list[tuple[str, str]]) -> Config:
    return resolve(recipe.load(path, overrides))


def check(path: Path, overrides: list[tuple[str, str]], tally: Counter[str], which: str) -> None:
    try:
        config = attempt(lambda: read(path, overrides))
        if isinstance(config, ValueError):
            message = str(config)
            faults = faults_of(message, 6000)  # some messages quote a value in full
            assert not faults, (faults, message[:2000])
            known = "|".join(["recipe", *Config.model_fields])
            for line in message.split("\n"):
                assert line.startswith((f"{path}: ", "--")) or re.match(rf"({known})\b", line), line
        else:
            again = recipe.build(json.loads(config.model_dump_json()))
            assert again == config  # the run's config.json says the same
    except (Exception, Hang) as error:
        raise AssertionError(f"{which}: {error!r}"[:3000]) from error
    tally["refused" if isinstance(config, ValueError) else "loaded"] += 1


@pytest.fixture(params=RECIPES)
def name(request) -> str:
    return request.param


def test_tables(name, tmp_path, tally):
    """Keys and values of the wrong kind, place and size."""
    path = tmp_path / name
    for number in range(TABLES):
        chance = random.Random(f"{name} table {number}")
        table = recipe.tomllib.loads(RECIPES[name])
        table = spoil_value(table, chance, ODD)
        path.write_text("".join(f"{json.dumps(key)} = {to_toml(value)}\n" for key, value in table.items()))
        check(path, pairs(name), tally, f"table {number}")


def test_bytes(name, tmp_path, tally):
    path = tmp_path / name
    for number in range(BYTES):
        path.write_bytes(spoil_bytes(RECIPES[name].encode(), random.Random(f"{name} bytes {number}")))
        check(path, pairs(name), tally, f"bytes {number}")


def keys_of(table: dict[str, Any], before: str = "") -> Iterator[str]:
    for key, value in table.items():
        yield before + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{before}{key}.")


def test_overrides(name, tmp_path, tally):
    path = tmp_path / name
    path.write_text(RECIPES[name], encoding="utf-8")
    settings = json.loads(recipe.load(path, pairs(name)).model_dump_json())
    keys = [*keys_of(settings), "", ".", "a..b", "policy.", ".policy", "policy.kl.coef.x", "名前.x", "a." * 900 + "b"]
    keys += [
        "policy.loss.type",
        "policy.rewards.0.type",
        "model.lora.r",
        "policy..kl",
        "--policy",
        "\x1b[0m.\n",
        "k" * 9000,
    ]
    for number in range(OVERRIDES):
        chance = random.Random(f"{name} overrides {number}")
        values = [to_toml(value) if chance.random() < 0.7 else str(value) for value in chance.choices(ODD, k=2)]
        found = [(chance.choice(keys), value) for value in values]
        check(path, [*pairs(name), *found], tally, f"overrides {[(k[:50], v[:50]) for k, v in found]}")


def test_the_watchdog_and_the_rule_bite():
    with pytest.raises(Hang), watchdog(0.05):
        while True:
            pass
    with pytest.raises(json.JSONDecodeError):  # a ValueError, but of a library: it names no file
        attempt(lambda: json.loads("{"))
    assert faults_of("a\x1bb") == ["line 1 is not printable"] and not faults_of("a\nb")


# --- through the command line --------------------------------------------------------------------------


def refused(capsys, *arguments: str) -> str:
    """What the person reads on standard error."""
    with watchdog(30):
        assert main(list(arguments)) == 2
    out, told = capsys.readouterr()
    assert told.startswith("rto: ") and not faults_of(told.rstrip("\n")) and out == ""
    return told


# Content of the recipe, overrides, and how the message begins.
REFUSED: list[tuple[bytes, list[str], str]] = [
    (b"\xff\xfe[\x00m\x00", [], "{path}: not a TOML file: 'utf-8' codec can't decode byte 0xff"),
    (b"[model]\n[model]\n", [], "{path}: not a TOML file: Cannot declare"),
    (b"a = " + b"[" * DEEP, [], "{path}: not a TOML file: "),
    (b"seed = " + b"9" * 5000, [], "{path}: not a TOML file: "),
    (b"model.name = 5", [], "{path}: model.name: Input should be a valid string"),
    (FULL.encode(), ["--policy.kl.coef", "abc"], "{path}: policy.kl.coef: this is no number"),
    (FULL.encode(), ["--policy.kl.coef=nan"], "{path}: policy.kl.coef: nan is no number"),
    (FULL.encode(), ["--prefer.loss.beta", "inf"], "{path}: prefer.loss.beta: inf is no number"),
    (FULL.encode(), ["--a..b", "1"], "{path}: unknown key a"),
    (FULL.encode(), ["--policy", "3"], "{path}: policy: Input should be a valid dictionary"),
    (FULL.encode(), ["--seed.x.y", "1"], "--seed.x.y: seed is a value, not a table"),
    (FULL.encode(), ["--seed", "0x" + "f" * 40], "{path}: seed: a whole number has 64 bits at most, this one has 160"),
    (FULL.encode(), ["--seed", "[" * DEEP], "--seed: not a value: "),
    (
        FULL.encode(),
        ["--data.limit", "{a=" * 20 + "1" + "}" * 20],
        "{path}: data.limit.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a: nest",
    ),
    (FULL.encode(), ["--\x1b[2J", "1"], "{path}: unknown key '\\x1b[2J'"),
    (FULL.encode(), ["--guides.other.lr", "fast"], "{path}: in [guides.other]: lr: this is no number"),
    (FULL.encode(), ["--scorers.tokens", "{loss = [1]}"], "{path}: in [scorers.tokens]: loss: Input should be"),
    (FULL.encode(), ["--policy.loss.type", "[]"], "{path}: policy.loss.type: a type is a name, not list"),
]


@pytest.mark.parametrize(("content", "overrides", "line"), REFUSED, ids=range(len(REFUSED)))
def test_a_recipe_on_the_command_line(content, overrides, line, tmp_path, capsys):
    path = tmp_path / "my.toml"
    path.write_bytes(content + b"\n[data]\npairs = 'p.jsonl'\n" * content.startswith(b"model"))
    told = refused(capsys, "run", str(path), *overrides)
    assert told.startswith("rto: " + line.format(path=path)) and told.count("\n") == 1


PAIR = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
# Name and content of the pairs, and what is said of them after data.pairs = 'FILE'.
DAMAGED: list[tuple[str, bytes, str]] = [
    ("cut.jsonl.gz", gzip.compress(PAIR * 99, mtime=0)[:-9], ": the gzip file is damaged after line 99 "),
    ("cut.parquet", b"PAR1", ": cannot be read as Parquet after row 0 "),
    ("cut.json", b'[{"prompt": ', ": not JSON "),
    ("none.jsonl", b"\n\n", " has no rows"),
    ("odd.jsonl", b'{"\\u001b[2J": 1}\n', ": no layout is recognised from the keys \\x1b[2J. "),
    ("one.jsonl", PAIR, ": 1 different prompts cannot be split into train, test, oracle"),
    ("bad.jsonl", PAIR + b"null\n", ": 1 bad rows among the 2 read\n  not_an_object: 1 (rows 2; row 2: "),
]


@pytest.mark.parametrize(("name", "content", "line"), DAMAGED, ids=[name for name, _, _ in DAMAGED])
def test_data_on_the_command_line(name, content, line, tmp_path, words, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    (tmp_path / "my.toml").write_text('device = "cpu"\n[model]\n[data]\n')
    arguments = ["--model.name", words, "--data.pairs", str(path), "--output", str(tmp_path / "run"), "--quiet"]
    told = refused(capsys, "sft", str(tmp_path / "my.toml"), *arguments)
    assert told.startswith(f"rto: data.pairs = '{path}'{line}") and told.count("\n") == (3 if "bad" in name else 1)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    """A folder with a tokenizer and no model: data are read before weights."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


# --- what mutants have found ---------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "my.toml").write_bytes(b"\xef\xbb\xbf" + FULL.encode())
    assert recipe.load(tmp_path / "my.toml").seed == 3


def test_a_name_that_no_file_can_have_is_no_recipe():
    with pytest.raises(ValueError, match="no such recipe"):
        recipe.load("x" * 300)


def test_an_override_of_several_lines_is_text():
    """Its second line would be another key, and be lost."""
    table: dict[str, Any] = {}
    recipe.put(table, "output", '"a"\nseed = 3')
    assert table == {"output": '"a"\nseed = 3'}


def test_of_many_mistakes_the_first_are_told():
    with pytest.raises(ValueError) as caught:
        recipe.build({"model": {"name": "x"}, "data": {"pairs": "p"}, "trackers": [3] * 1000})
    lines = str(caught.value).split("\n")
    assert len(lines) == 21 and lines[-1] == "recipe: and 980 more mistakes"


def test_a_huge_value_is_told_in_short():
    with pytest.raises(ValueError) as caught:
        recipe.build({"model": {"name": ["x" * 10_000]}, "data": {"pairs": "p"}})
    assert str(caught.value).startswith("recipe: model.name: Input should be a valid string (given: ['xxx")
    assert len(str(caught.value)) < 300
