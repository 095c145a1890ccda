"""The command line: what it prints without doing anything, and what it says of every mistake."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from rto import recipe
from rto.cli import main, overrides
from rto.data.rows import make_rows, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DPO = {"label_smoothing": 0.0, "variant": "sigmoid", "nll": 0.0}  # the options that most recipes leave alone


def rto(*words: str) -> SimpleNamespace:
    """Exit code, standard output and standard error of one call."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refusal(*words: str) -> str:
    """What is said on standard error; nothing on standard output, no traceback, exit code 2."""
    said = rto(*words)
    assert said.code == 2, said
    assert said.out == ""
    assert said.err.startswith("rto: ")
    assert "Traceback" not in said.err
    assert "pydantic" not in said.err
    return said.err.removeprefix("rto: ").rstrip("\n")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Every call runs in an empty folder: a default output cannot hide."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- dry run ------------------------------------------------------------------------------------------


def parts_of(text: str) -> tuple[dict, dict[str, list[str]]]:
    """The resolved recipe, and the lines under each heading."""
    resolved, end = json.JSONDecoder().raw_decode(text)
    sections: dict[str, list[str]] = {}
    for line in text[end:].splitlines():
        if line and not line.startswith(" "):
            sections[line] = []
        elif line:
            sections[list(sections)[-1]].append(line.strip())
    return resolved, sections


def test_a_dry_run_prints_the_plan_and_writes_nothing(world_recipe, here):
    shown = rto("run", world_recipe, "--dry-run", "--policy.kl.coef", "0.02")
    assert (shown.code, shown.err) == (0, "")
    assert list(here.iterdir()) == []
    resolved, sections = parts_of(shown.out)
    assert list(sections) == ["data", "checks", "stages", "memory", "disk", "verdict"]
    assert resolved["policy"]["kl"]["coef"] == 0.02
    assert resolved["policy"]["loss"] == {"type": "ppo", "clip": 0.2, "clip_high": None, "dual": None}  # spelled out
    assert resolved["prefer"]["loss"] == {"type": "dpo", "beta": 0.1, **DPO}
    assert sections["data"][:3] == ["demonstrations: 48", "training pairs: 32", "RL prompts: 16"]
    assert [line.partition(":")[0] for line in sections["stages"]] == [
        "sft",
        "prefer",
        "reward",
        "rl/ppo",
        "rl/rto",
        "evaluate",
    ]
    assert sections["stages"][0] == "sft: 3 steps of 16 rows, lr 0.01"
    assert "2 iterations of 8 rollouts, 1 x 2 updates each" in sections["stages"][4]
    assert "implicit(scale 0.05, clip 0.05) + terminal(scale 1, clip 10), KL 0.02 (k1) in the" in sections["stages"][4]
    assert sections["verdict"][0].startswith("fits:")


def test_a_dry_run_of_one_verb_shows_its_stage(world_recipe, here):
    _, sections = parts_of(rto("reward", world_recipe, "--dry-run").out)
    assert sections["stages"] == ["reward: 2 steps of 16 rows, lr 0.001"]
    assert list(here.iterdir()) == []


# --- words of the command line ------------------------------------------------------------------------


def test_overrides_stand_anywhere_in_either_form():
    words = [
        "run",
        "--a.b",
        "-1e-3",
        "recipe.toml",
        "--quiet",
        "--c=x=y",
        "--d",
        '["sft", "rl"]',
        "--e",
        "-5",
        "--dry-run",
    ]
    others, found = overrides(words)
    assert others == ["run", "recipe.toml", "--quiet", "--dry-run"]
    assert found == [("a.b", "-1e-3"), ("c", "x=y"), ("d", '["sft", "rl"]'), ("e", "-5")]


def test_values_are_toml_or_text(world_recipe):
    call = [
        "run",
        "--prefer.loss.beta",
        "0.3",
        "--policy.advantage.lam=1",
        "--sft.betas=[0.8, 0.9]",
        "--output",
        "-x",
        world_recipe,
        "--dry-run",
    ]
    resolved, _ = parts_of(rto(*call, "--stages", '["sft","rl"]', "--sft.max_steps=none", "--sft.lr=2e-3").out)
    assert resolved["sft"]["betas"] == [0.8, 0.9]
    assert resolved["prefer"]["loss"] == {"type": "dpo", "beta": 0.3, **DPO}
    assert resolved["policy"]["advantage"] == {"type": "gae", "gamma": 1.0, "lam": 1.0}
    assert resolved["output"] == "-x"
    assert resolved["stages"] == ["sft", "rl"]
    assert (resolved["sft"]["max_steps"], resolved["sft"]["lr"]) == (None, 0.002)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "rnu {}",
            "unknown verb 'rnu', did you mean run?; known: run, sft, prefer, reward, rl, evaluate, report, resume, ",
        ),
        ("run", "the following arguments are required: recipe; see rto run --help"),
        ("generate", "the following arguments are required: run; see rto generate --help"),
        ("run --dryrun {}", "rto run needs a recipe or the folder of a run; --dryrun took '{}' as its value"),
        ("run {} --sft.lr", "--sft.lr has no value: write --sft.lr VALUE"),
        ("run {} --sft.lr --quiet", "--sft.lr has no value: write --sft.lr VALUE"),
        ("run {} --output=", "--output has no value: write --output VALUE"),
        ("run {} sft.lr=1", "'sft.lr=1' is no override: write --key value, for example --policy.kl.coef 0.02"),
        ("run {} -q", "'-q' is no override: write --key value, for example --policy.kl.coef 0.02"),
        ("run nowhere.toml", "nowhere.toml: no such recipe; the recipes that come with rto are in recipes/*.toml"),
        ("run .", ".: no config.json there: not a run folder"),
        ("generate nowhere", "nowhere: no such recipe"),
    ],
)
def test_a_mistake_on_the_command_line(world_recipe, words, said):
    line = refusal(*(word.format(world_recipe) for word in words.split()))
    assert line.startswith(said.format(world_recipe))
    assert "\n" not in line


def test_nothing_at_all_prints_the_help():
    said = rto()
    assert said.code == 2
    assert "usage: rto" in said.err
    assert "generate" in said.err


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["generate", "-h"]])
def test_help_is_no_mistake(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert "usage: rto" in capsys.readouterr().out


# --- keys and values of the recipe --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--polcy.lr", "1"], "unknown key polcy, did you mean policy?"),
        (["--policy.kl.cof", "1"], "unknown key policy.kl.cof, did you mean coef?"),
        (["--sft.lr", "-1"], "sft.lr: Input should be greater than 0 (given: -1)"),
        (["--sft.lr=-1e-5"], "sft.lr: Input should be greater than 0 (given: -1e-05)"),
        (["--sft.batch", "many"], "sft.batch: this is no number (given: 'many')"),
        (["--seed", "-1"], "seed: Input should be greater than or equal to 0 (given: -1)"),
        (["--stages", "sft"], "stages: Input should be a valid list (given: 'sft')"),
        (["--policy.rollouts", "10"], "policy: rollouts = 10 is not a multiple of batch = 4"),
        (["--policy.method", "rtoo"], "policy.method = 'rtoo' is unknown, did you mean rto?; known: ppo, rto"),
        (["--baselines.ppo.method", "pp"], "baselines.ppo.method = 'pp' is unknown, did you mean ppo?"),
        (["--baselines.ppo.lrr", "1"], "in [baselines.ppo]: unknown key lrr, did you mean lr?"),
        (["--baselines.ppo.loss.type", "ppoo"], "baselines.ppo.loss.type = 'ppoo' is unknown, did you mean ppo?"),
        (
            ["--prefer.loss.bata", "1"],
            "prefer.loss: unknown key bata, did you mean beta?; valid: beta, label_smoothing, nll, variant",
        ),
        (["--policy.advantage", "{type = 'gae', lam = 'x'}"], "policy.advantage: lam: this is no number"),
        (["--policy.rewards", "[]"], "a list of rewards goes with method = 'custom', and only with it"),
        (["--policy.method=custom", "--policy.rewards", "[{type='implict'}]"], "policy.rewards[0].type = 'implict' is"),
        (["--device", "gpu"], "device: Input should be 'auto', 'cpu' or 'cuda' (given: 'gpu')"),
        (["--evaluation.oracle.type", "heldout"], "data.type = 'world' has no pairs for an oracle"),
        (["--prefer.checkpoint", "./nowhere"], "prefer.checkpoint = './nowhere': no such folder (looked for /"),
        (["--reward.checkpoint", "runs/a/reward"], "reward.checkpoint = 'runs/a/reward': no such folder"),
        (["--model", "{type='pretrained', name='./nowhere'}"], "model.name = './nowhere': no such folder"),
    ],
)
def test_a_mistake_in_the_recipe(world_recipe, here, words, said):
    line = refusal("run", world_recipe, *words)
    assert said in line
    assert "\n" not in line
    assert not (here / "runs").exists() or not list((here / "runs").rglob("*.jsonl"))


def test_every_mistake_has_a_line(world_recipe):
    lines = refusal("run", world_recipe, "--sft.lr", "-1", "--polcy.lr", "1", "--prefer.batch", "0").splitlines()
    assert len(lines) == 3
    assert all(any(key in line for line in lines) for key in ("sft.lr", "polcy", "prefer.batch"))


def test_a_model_must_know_the_words_of_its_data(world_recipe, tiny_model, files_recipe, pairs_file):
    model = "{type = 'pretrained', name = '" + tiny_model + "'}"
    assert "does not know the tiny world's words" in refusal("run", world_recipe, "--model", model)
    call = ["run", files_recipe, "--data.pairs", pairs_file]
    assert "knows the tiny world's words only: name a model" in refusal(*call, "--model.type", "scratch")


# --- data ---------------------------------------------------------------------------------------------


def turn(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


ASK = [turn("hi", "user")]
BAD = {  # a line of each kind that cannot be used
    "undecodable": "{broken",
    "not_an_object": "[1, 2]",
    "missing_field": json.dumps({"prompt": "hi", "chosen": "a"}),
    "wrong_type": json.dumps({"prompt": "hi", "chosen": 3, "rejected": "b"}),
    "roles_out_of_order": json.dumps({"prompt": [turn("hi"), turn("ho")], "chosen": "a", "rejected": "b"}),
    "empty_prompt": json.dumps({"prompt": " ", "chosen": "a", "rejected": "b"}),
    "empty_answer": json.dumps({"prompt": "hi", "chosen": "a", "rejected": ""}),
    "same_answers": json.dumps({"prompt": "hi", "chosen": "a", "rejected": "a"}),
    "prompts_differ": json.dumps({"chosen": [*ASK, turn("a")], "rejected": [turn("ho", "user"), turn("b")]}),
    "over_long": json.dumps({"prompt": "hi", "chosen": "a" * 50, "rejected": "b"}),
}


@pytest.fixture
def mixed(here, pairs_file) -> Path:
    """40 good pairs and one of every bad kind, in a folder of their own."""
    folder = here / "data"
    folder.mkdir()
    good = Path(pairs_file).read_text().splitlines()
    (folder / "mixed.jsonl").write_text("\n".join([*good[:5], *BAD.values(), *good[5:]]) + "\n")
    return folder / "mixed.jsonl"


def call(recipe_file: str, tiny_model: str, data: object, *more: str) -> list[str]:
    return [recipe_file, "--model.name", tiny_model, "--data.pairs", str(data), "--data.on_over_long", "reject", *more]


def test_a_missing_file_is_named(files_recipe, tiny_model, here):
    line = refusal("run", *call(files_recipe, tiny_model, "nowhere.jsonl"), "--dry-run")
    assert line == f"data.pairs: file not found: 'nowhere.jsonl' (looked for {here / 'nowhere.jsonl'})"
    assert "data.pairs is missing" in refusal("run", files_recipe, "--model.name", tiny_model)


def test_bad_rows_stop_a_run(files_recipe, tiny_model, mixed):
    lines = refusal("run", *call(files_recipe, tiny_model, mixed), "--output", "run").splitlines()
    assert lines[0] == f"data.pairs = '{mixed}': 9 bad rows among the 50 read"  # over_long is found when encoding
    assert {line.split(":")[0].strip() for line in lines[1:-1]} == set(BAD) - {"over_long"}
    assert "undecodable: 1 (rows 6; row 6: not JSON" in lines[1]
    assert lines[-1] == "Mend them, or leave them out with --data.on_bad_row skip"


def test_skipped_rows_are_counted_and_listed(files_recipe, tiny_model, mixed, here):
    skip = call(files_recipe, tiny_model, mixed, "--data.on_bad_row", "skip", "--output", "run", "--quiet")
    shown = rto("run", *skip, "--dry-run")
    assert shown.code == 0, shown.err
    _, sections = parts_of(shown.out)
    rejected = [line for line in sections["data"] if line.startswith("rejected")]
    assert rejected == [f"rejected, {kind}: 1 (rows {row})" for row, kind in enumerate(BAD, 6)]
    assert sections["data"][0] == "demonstrations: 20"  # 40 less 8 held out and 12 for the oracle
    assert sections["stages"][-2:] == ["oracle: 2 steps of 8 rows, lr 0.01", sections["stages"][-1]]
    assert sections["stages"][-1] == "evaluate: 1 answers of every policy to each of 8 prompts"
    assert sorted(path.name for path in here.iterdir()) == ["data"]

    assert rto("sft", *skip).code == 0
    listed = [json.loads(line) for line in (here / "run" / "rejected_rows.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in listed) == dict.fromkeys(BAD, 1)
    assert [(row["row"], row["file"]) for row in listed] == [(row, str(mixed)) for row in range(6, 16)]

    (here / "run" / "rejected_rows.jsonl").unlink()
    assert rto("run", *skip, "--dry-run").code == 0
    assert not (here / "run" / "rejected_rows.jsonl").exists()  # a dry run writes nothing in a run folder either


def test_a_file_without_a_good_row_is_refused(files_recipe, tiny_model, mixed):
    mixed.write_text("\n".join(list(BAD.values())[2:-1]) + "\n")
    skip = call(files_recipe, tiny_model, mixed, "--data.on_bad_row", "skip", "--dry-run")
    lines = refusal("run", *skip).splitlines()
    assert lines[0] == f"data.pairs = '{mixed}': 7 bad rows among the 7 read"
    assert lines[-1] == "No row is good: mend the file, or name its layout with --data.layout"
    mixed.write_text(BAD["over_long"] + "\n")
    line = refusal("run", *skip)
    assert "no row is left after encoding (over_long): raise data.max_prompt" in line


def test_held_out_prompts_are_held_out_of_other_files_too(files_recipe, tiny_model, pairs_file, here):
    good = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    (here / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in good))
    shown = [json.dumps({"messages": [*row["prompt"], *row["chosen"]]}) + "\n" for row in good]
    (here / "sft.jsonl").write_text("".join(shown))
    words = dict(zip(("data.prompts", "data.sft"), ("prompts.jsonl", "sft.jsonl"), strict=True))
    config = recipe.load(files_recipe, {"model.name": tiny_model, "data.pairs": pairs_file, **words}.items())
    rows = make_rows(config, make_tokenizer(config, tiny_model))
    held_out = {pair.prompt_text for pair in (*rows.test_pairs, *rows.oracle_pairs)}
    assert (len(held_out), len(rows.prompts), len(rows.answers)) == (20, 20, 20)
    assert not held_out & {row.text for row in rows.prompts}
    assert not held_out & {row.prompt_text for row in rows.answers}

    only = rows.test_prompts[0].row - 1
    (here / "prompts.jsonl").write_text(json.dumps({"prompt": good[only]["prompt"]}) + "\n")
    with pytest.raises(ValueError, match="data.prompts = 'prompts.jsonl': all of its prompts are held out"):
        make_rows(config, make_tokenizer(config, tiny_model))


def test_real_chat_pairs_are_accepted(files_recipe, tiny_model):
    path = ROOT.parent / "shared" / "data" / "chat_pairs.json"
    if not path.exists():
        pytest.skip("the real pairs are not on this machine: ../shared/data/chat_pairs.json")
    given = {"model.name": tiny_model, "data.pairs": str(path), "data.max_prompt": "256", "data.max_response": "64"}
    config = recipe.load(files_recipe, given.items())
    rows = make_rows(config, make_tokenizer(config, tiny_model))
    assert {row.reason for row in rows.rejected} == {"same_answers"}  # all 300 are read; some are equal once cut
    assert 280 < rows.notes["pairs"] == 300 - len(rows.rejected)
    assert len(rows.pairs) + len(rows.test_pairs) + len(rows.oracle_pairs) == rows.notes["pairs"]
    assert rows.notes["cut answers"] > 0  # answers of up to 5,000 characters
    for pair in (*rows.pairs, *rows.test_pairs, *rows.oracle_pairs):
        assert 0 < len(pair.prompt) <= 256
        for ids, finished in ((pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished)):
            assert 0 < len(ids) <= 64
            assert (ids[-1] == rows.encoder.end) == finished


# --- the machine --------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_traceback(world_recipe, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["run", world_recipe, "--dry-run"]) == 1
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_made_is_named(world_recipe, here):
    (here / "file").write_text("")
    said = rto("sft", world_recipe, "--output", str(here / "file" / "run"))
    assert said.code == 1
    assert said.err == f"rto: [Errno 20] Not a directory: '{here / 'file' / 'run'}'\n"
