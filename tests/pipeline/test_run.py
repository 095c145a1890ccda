"""Whole tiny runs through the command line: what they leave behind, what they skip, what they refuse."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from rto.cli import main
from rto.data.rows import make_rows
from rto.data.worlds import token_rewards
from rto.recipe import load
from rto.report.log import Progress, read_metrics

STAGES = ["sft", "prefer", "reward", "rl/ppo", "rl/rto", "evaluate"]
NAMES = ["sft", "dpo", "ppo", "rto"]
NO_REPORT = ("--stages", '["sft", "prefer", "reward", "rl", "evaluate"]')  # its plots take longer than a tiny training


def rto(*words: str) -> SimpleNamespace:
    """Exit code, standard output and standard error of one call."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(world_recipe, tmp_path_factory) -> SimpleNamespace:
    """A finished run of the tiny world; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "world"
    done = rto("run", world_recipe, "--output", str(folder))
    assert done.code == 0, done.err
    return SimpleNamespace(folder=folder, out=done.out, err=done.err)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


# --- a whole run --------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
    folder = finished.folder
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "stages.json", "evaluation.json", "credit.json"):
        assert (folder / name).stat().st_size > 0
    for stage in ("sft", "prefer", "reward", "rl/ppo", "rl/rto"):
        assert (folder / stage / "model.safetensors").exists()
        assert (folder / stage / "tokenizer.json").exists()
    assert (folder / "reward" / "scorer.json").exists()
    assert (folder / "report.html").stat().st_size > 1000
    assert list(read(folder, "stages.json")) == STAGES
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert kinds == {".json", ".jsonl", ".safetensors", ".html"}  # no pickle, nothing half-written
    assert "Traceback" not in finished.err


def test_every_stage_is_logged(finished):
    rows = read_metrics(finished.folder)
    assert {row["stage"] for row in rows} == {"sft", "prefer", "reward", "rl/ppo", "rl/rto"}
    for stage, steps in (("sft", 3), ("prefer", 2), ("reward", 2), ("rl/ppo", 2), ("rl/rto", 2)):
        assert [row["step"] for row in rows if row["stage"] == stage] == list(range(1, steps + 1))
    assert not any("nonfinite" in row for row in rows)
    assert [row["stage"] for row in rows if "eval_accuracy" in row] == ["prefer", "reward"]


def test_the_win_rates_are_printed_and_add_up(finished):
    comparison = read(finished.folder, "evaluation.json")["comparison"]
    assert comparison["names"] == NAMES
    matrix = torch.tensor(comparison["matrix"])
    assert_close(matrix + matrix.T, torch.ones(4, 4))
    low, high = torch.tensor(comparison["matrix_low"]), torch.tensor(comparison["matrix_high"])
    assert (low <= matrix).all() and (matrix <= high).all()
    assert_close(low + high.T, torch.ones(4, 4))
    header, *table = finished.out.splitlines()[2:7]
    assert header.split() == NAMES
    assert [line.split()[0] for line in table] == NAMES
    assert f"{100 * comparison['matrix'][1][0]:.1f}" in table[1]
    assert f"report: {finished.folder / 'report.html'}" in finished.out


def test_the_answers_score_what_is_logged(finished):
    comparison = read(finished.folder, "evaluation.json")["comparison"]
    for name in NAMES:
        answers = lines(finished.folder / "evaluation" / f"answers-{name}.jsonl")
        mean = sum(row["score"] for row in answers) / len(answers)
        assert comparison["policies"][name]["score"] == pytest.approx(mean)
        whole = [row for row in answers if len(row["answer"].split()) == 12]  # no special token among the words
        assert whole
        for row in whole:
            words = row["answer"].split()
            assert row["score"] == pytest.approx(sum(token_rewards(row["prompt"], words, False)))


def test_saved_policies_are_plain_causal_models(finished, copy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert rto("evaluate", str(copy), "--evaluation.temperature", "0").code == 0
    config = load(copy_recipe(copy))
    for name, place in (("sft", "sft"), ("dpo", "prefer"), ("rto", "rl/rto")):
        model = AutoModelForCausalLM.from_pretrained(copy / place)
        tokenizer = AutoTokenizer.from_pretrained(copy / place)
        rows = make_rows(config, tokenizer)
        logged = {row["prompt"]: row for row in lines(copy / "evaluation" / f"answers-{name}.jsonl")}
        for prompt in rows.test_prompts[:4]:
            ids = torch.tensor([prompt.ids])
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
            )
            text = tokenizer.decode(made[0, len(prompt.ids) :], skip_special_tokens=True)
            assert text == logged[prompt.text]["answer"]


def copy_recipe(folder: Path) -> Path:
    """The resolved recipe of a run as TOML text can hold it: world data need the data table only."""
    path = folder / "again.toml"
    data = read(folder, "config.json")["data"]
    table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in data.items())
    path.write_text(f"[data]\n{table}\n[model]\ntype = 'scratch'\n[evaluation.oracle]\ntype = 'world'\n")
    return path


# --- again, changed, in parts -------------------------------------------------------------------------


def test_the_same_call_again_does_nothing(finished, world_recipe, copy):
    before = hashes(copy)
    again = rto("run", world_recipe, "--output", str(copy))
    assert again.code == 0
    assert [line.partition(":")[0] for line in again.err.splitlines()] == STAGES
    assert all(": done before, in " in line for line in again.err.splitlines())
    assert again.out.replace(str(copy), str(finished.folder)) == finished.out
    after = hashes(copy)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {"report.html", "config.json"}  # config.json names its folder
    assert rto("run", str(copy), "--quiet", *NO_REPORT).err == ""  # the folder is a recipe, too


@pytest.mark.parametrize("verb", ["run", "sft", "rl", "evaluate"])
def test_a_changed_recipe_is_refused(finished, world_recipe, verb):
    """Whatever the verb: a policy must not be trained on the reference of another recipe."""
    before = hashes(finished.folder)
    refused = rto(verb, world_recipe, "--output", str(finished.folder), "--sft.lr", "0.5")
    assert refused.code == 2
    assert "sft.lr was 0.01 and is 0.5" in refused.err
    assert str(finished.folder) in refused.err
    assert "--output" in refused.err
    assert hashes(finished.folder) == before


def test_a_changed_prerequisite_is_refused_before_the_stage_is_there(world_recipe, tmp_path):
    call = [world_recipe, "--output", str(tmp_path / "run")]
    assert rto("sft", *call).code == 0
    before = hashes(tmp_path)
    refused = rto("prefer", *call, "--sft.lr", "0.5")
    assert refused.code == 2
    assert "stage sft was made with another recipe (sft.lr was 0.01 and is 0.5)" in refused.err
    assert hashes(tmp_path) == before


def test_a_changed_evaluation_is_done_again(copy):
    before = hashes(copy)
    again = rto("run", str(copy), "--evaluation.prompts", "6", *NO_REPORT)
    assert again.code == 0
    assert "rl/rto: done before" in again.err
    assert "evaluate: done before" not in again.err
    assert {row["n"] for row in read(copy, "evaluation.json")["comparison"]["policies"].values()} == {6}
    after = hashes(copy)
    assert all(after[name] == before[name] for name in before if name.endswith(".safetensors"))


def test_single_verbs_reach_the_same_numbers(finished, world_recipe, tmp_path):
    call = [world_recipe, "--output", str(tmp_path), "--quiet"]
    for verb in ("sft", "prefer", "reward", "rl", "evaluate", "report"):
        done = rto(verb, *call)
        assert done.code == 0, done.err
    assert read(tmp_path, "evaluation.json") == read(finished.folder, "evaluation.json")
    assert read(tmp_path, "credit.json") == read(finished.folder, "credit.json")
    assert hashes(tmp_path)["rl/rto/model.safetensors"] == hashes(finished.folder)["rl/rto/model.safetensors"]
    assert (tmp_path / "report.html").exists()


def test_a_policy_trained_later_joins_the_comparison(finished, copy):
    stages = read(copy, "stages.json")
    for name in ("rl/rto", "evaluate"):
        del stages[name]
    (copy / "stages.json").write_text(json.dumps(stages))
    assert rto("evaluate", str(copy)).code == 0
    assert read(copy, "evaluation.json")["comparison"]["names"] == ["sft", "dpo", "ppo"]
    assert rto("rl", str(copy)).code == 0
    assert rto("evaluate", str(copy)).code == 0
    assert read(copy, "evaluation.json") == read(finished.folder, "evaluation.json")


@pytest.mark.parametrize("verb", ["prefer", "reward", "rl", "evaluate"])
def test_a_stage_before_its_time_names_the_remedy(world_recipe, tmp_path, verb):
    early = rto(verb, world_recipe, "--output", str(tmp_path))
    assert early.code == 2
    assert "stage sft is not finished: do `rto sft` or `rto run` first" in early.err
    assert not (tmp_path / "stages.json").exists()


def test_a_report_of_nothing_is_refused(world_recipe, tmp_path):
    refused = rto("report", world_recipe, "--output", str(tmp_path / "typo"))
    assert refused.code == 2
    assert "there is no run to report" in refused.err
    assert not (tmp_path / "typo").exists()


def test_sft_outside_the_recipe_is_refused(world_recipe, tmp_path):
    refused = rto("sft", world_recipe, "--output", str(tmp_path), "--stages", '["evaluate"]')
    assert refused.code == 2
    assert "add 'sft' to stages" in refused.err


def test_an_interrupted_run_goes_on(finished, world_recipe, tmp_path, monkeypatch):
    update = Progress.update

    def impatient(self, step, metrics):
        update(self, step, metrics)
        if self._stage == "reward":
            raise KeyboardInterrupt  # what Ctrl-C does at this moment

    call = ["run", world_recipe, "--output", str(tmp_path), *NO_REPORT]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", impatient)
        cut = rto(*call)
    assert cut.code == 130
    assert cut.err.splitlines()[-1].startswith("rto: interrupted; the same command goes on")
    assert list(read(tmp_path, "stages.json")) == ["sft", "prefer"]
    assert len(read_metrics(tmp_path, "reward")) == 1
    again = rto(*call)
    assert again.code == 0
    assert [line for line in again.err.splitlines() if "done before" in line] == [
        f"{stage}: done before, in {tmp_path / stage}" for stage in ("sft", "prefer")
    ]
    assert read(tmp_path, "evaluation.json") == read(finished.folder, "evaluation.json")
    assert [row["step"] for row in read_metrics(tmp_path, "reward")] == [1, 2]


def test_a_training_that_blows_up_saves_nothing(world_recipe, tmp_path):
    failed = rto("run", world_recipe, "--output", str(tmp_path), "--sft.lr", "1e30", "--sft.epochs", "3")
    assert failed.code == 1
    assert "rto: training stopped: sft, step 5: the " in failed.err
    assert " is nan " in failed.err
    assert "rows: the weights are suspect)" in failed.err
    assert not (tmp_path / "stages.json").exists()
    assert not (tmp_path / "sft").exists()


# --- generate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["sft", "dpo", "ppo", "rto"])
def test_generate_answers_as_the_evaluation_did(finished, tmp_path, policy):
    out = tmp_path / "new folder" / "answers.jsonl"
    done = rto("generate", str(finished.folder), "--policy", policy, "--out", str(out))
    assert done.code == 0, done.err
    assert (done.out, done.err) == ("", f"8 answers in {out}\n")
    evaluated = lines(finished.folder / "evaluation" / f"answers-{policy}.jsonl")
    made = lines(out)
    for key in ("prompt", "answer", "finished"):
        assert [row[key] for row in made] == [row[key] for row in evaluated]
    assert {row["policy"] for row in made} == {policy}


def test_generate_answers_prompts(finished, tmp_path):
    call = ["generate", str(finished.folder), "--prompt", "a review of the hotel :", "--temperature", "0"]
    done = rto(*call, "--prompt", "a review of the soup :")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a review of the hotel :", "a review of the soup :"]
    assert {row["policy"] for row in rows} == {"rto"}  # the run's method
    assert rto(*call).out == done.out.splitlines(keepends=True)[0]  # greedy, whatever stands beside it

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a review of the hotel :"}\n{"prompt": "a review of the soup :"}\n')
    from_file = rto("generate", str(finished.folder), "--prompts", str(prompts), "--limit", "1", "--temperature", "0")
    assert [json.loads(line) for line in from_file.out.splitlines()] == rows[:1]
    before = hashes(finished.folder)
    assert rto("generate", str(finished.folder), "--limit", "2", "--seed", "5").code == 0
    assert hashes(finished.folder) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "rlo"], "no policy 'rlo', did you mean rto?; the recipe has sft, dpo, ppo, rto"),
        (["--temperature", "-1"], "temperature: Input should be greater than or equal to 0 (given: -1.0)"),
        (["--top-p", "1.5"], "top_p: Input should be less than or equal to 1 (given: 1.5)"),
        (["--limit", "0"], "limit: at least 1 prompt"),
        (["--limit", "many"], "argument --limit: invalid int value: 'many'"),
        (["--polcy", "rto"], "unrecognized arguments: --polcy rto"),
        (["--prompts", "nowhere.jsonl"], "data.prompts: file not found: 'nowhere.jsonl'"),
        (["--prompt", "a", "--prompts", "b.jsonl"], "--prompt and --prompts b.jsonl do not go together"),
    ],
)
def test_generate_refuses(finished, words, said):
    refused = rto("generate", str(finished.folder), *words)
    assert refused.code == 2
    assert said in refused.err
    assert refused.err.count("\n") == 1


def test_generate_before_training_names_the_remedy(world_recipe, tmp_path):
    call = [world_recipe, "--output", str(tmp_path)]
    assert rto("sft", *call, "--quiet").code == 0
    early = rto("generate", str(tmp_path))
    assert early.code == 2
    assert "stage rl/rto is not finished: do `rto rl` or `rto run` first" in early.err
    assert rto("generate", str(tmp_path), "--policy", "sft", "--limit", "1").code == 0


# --- LoRA, files, a held-out oracle -------------------------------------------------------------------


def test_lora_on_pairs_from_a_file(files_recipe, tiny_model, pairs_file, tmp_path):
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run"
    call = ["run", files_recipe, "--output", str(folder), "--model.name", tiny_model, "--data.pairs", pairs_file]
    call += NO_REPORT
    done = rto(*call, "--model.lora.r", "2")
    assert done.code == 0, done.err
    assert list(read(folder, "stages.json")) == ["sft", "prefer", "reward", "rl/ppo", "rl/rto", "oracle", "evaluate"]
    with safe_open(folder / "sft" / "model.safetensors", "pt") as weights:
        assert not [key for key in weights.keys() if "lora" in key]  # noqa: SIM118
    assert not (folder / "sft" / "adapter_config.json").exists()
    for stage in ("prefer", "reward", "rl/ppo", "rl/rto", "oracle"):
        settings = read(folder / stage, "adapter_config.json")
        assert (settings["r"], settings["base_model_name_or_path"]) == (2, str(folder / "sft"))
        assert not (folder / stage / "model.safetensors").exists()
        with safe_open(folder / stage / "adapter_model.safetensors", "pt") as weights:
            keys = list(weights.keys())
            assert all(".lora_" in key or key.endswith("score.weight") for key in keys)
            assert any("score" in key for key in keys) == (stage in ("reward", "oracle"))
            assert any(weights.get_tensor(key).abs().max() > 0 for key in keys if "lora_B" in key)  # it was trained
    found = read(folder, "evaluation.json")
    assert "a scorer trained on 12 pairs that no other stage saw" in found["oracle"]
    assert found["comparison"]["names"] == NAMES
    assert found["comparison"]["policies"]["sft"]["kl"] == 0.0
    assert any(found["comparison"]["policies"][name]["kl"] != 0.0 for name in ("dpo", "ppo", "rto"))

    # What PEFT makes of the adapter is what rto generates.
    written = rto("generate", str(folder), "--limit", "3", "--temperature", "0")
    base = AutoModelForCausalLM.from_pretrained(folder / "sft")
    model = PeftModel.from_pretrained(base, folder / "rl" / "rto")
    tokenizer = AutoTokenizer.from_pretrained(folder / "rl" / "rto")
    for row in map(json.loads, written.out.splitlines()):
        ids = torch.tensor([tokenizer(row["prompt"], add_special_tokens=False).input_ids])
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.strip() == row["answer"].strip()
    assert rto(*call, "--model.lora.r", "2").err.count("done before") == 7
    refused = rto(*call, "--model.lora.r", "3")
    assert refused.code == 2
    assert "model.lora.r was 2 and is 3" in refused.err
