"""The objectives of issue-sized recipes through the command line: guides, scorers, segments, and wrong use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rto.cli import main
from rto.rewards.normaliser import Normaliser

MANY = """
[guides.kto]
loss = { type = "kto" }
[guides.tdpo]
loss = { type = "tdpo2" }
cache_reference = false
[guides.apo]
rounds = { count = 2, extrapolation = 0.5 }
[scorers.segment]
cutoff = 1.0
[scorers.token]
cutoff = 0
[baselines.segment-ppo]
method = "segment-ppo"
scorer = "segment"
[baselines.token-ppo]
method = "token-ppo"
scorer = "token"
[baselines.rloo]
method = "rto"
guide = "kto"
group = 4
advantage = { type = "rloo" }
[baselines.p3o]
method = "rto"
group = 2
loss = { type = "p3o" }
"""


@pytest.fixture(scope="module")
def many(world_recipe, tmp_path_factory) -> Path:
    """A finished run with further guides and scorers, one RL iteration a policy."""
    folder = tmp_path_factory.mktemp("many")
    recipe = folder / "many.toml"
    recipe.write_text(Path(world_recipe).read_text() + MANY)
    run = folder / "run"
    assert main(["run", str(recipe), "--output", str(run), "--policy.max_steps", "1", "--quiet"]) == 0
    shutil.copy(recipe, run / "many.toml")
    return run


@pytest.fixture
def said(capsys):
    """Run the command line and give its exit code and its one line of error."""

    def call(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(list(words))
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return code, error

    return call


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_every_policy_is_compared_with_its_credit(many):
    names = ["sft", "dpo", "kto", "tdpo", "apo", "ppo", "segment-ppo", "token-ppo", "rloo", "p3o", "rto"]
    found = read(many / "evaluation.json")
    assert found["comparison"]["names"] == names
    assert {"guide kto", "scorer segment", "scorer token"} <= set(found["accuracy"])
    credit = read(many / "credit.json")
    assert set(credit["methods"]) == set(names) - {"sft"}
    ends = {view["policy"]: view["segment_ends"] for view in credit["answers"]}
    assert ends["rto"] is None and any(ends["token-ppo"])
    page = (many / "report.html").read_text()
    assert "normaliser of the scorer reward/segment" in page and "end of a segment" in page


def test_the_normaliser_lies_with_its_scorer(many):
    for name, cutoff in (("segment", 1.0), ("token", 0.0)):
        stored = read(many / "reward" / name / "normaliser.json")
        assert stored["cutoff"] == cutoff and len(stored["scorer"]) == 64
        assert Normaliser(**stored["normaliser"]).segments > 0
        assert (many / "reward" / name / "normaliser.png").stat().st_size > 1000
    assert not (many / "reward" / "normaliser.json").exists()


def test_rounds_are_more_steps_and_another_policy(many):
    steps = [json.loads(line) for line in (many / "metrics.jsonl").read_text().splitlines()]
    counted = {stage: sum(row["stage"] == stage for row in steps) for stage in ("prefer", "prefer/apo")}
    assert counted == {"prefer": 2, "prefer/apo": 2}  # 32 pairs in sixteens: once, or in two rounds of one step
    one, other = (load_file(many / f"prefer{name}" / "model.safetensors") for name in ("", "/apo"))
    assert any((one[key] != other[key]).any() for key in one)


def test_generate_knows_the_further_guides(many, capsys):
    assert main(["generate", str(many), "--policy", "kto", "--limit", "2"]) == 0
    assert [json.loads(line)["policy"] for line in capsys.readouterr().out.splitlines()] == ["kto", "kto"]


def test_the_same_command_does_nothing_twice(many, said):
    before = (many / "stages.json").read_bytes()
    code, _ = said("run", str(many / "many.toml"), "--output", str(many), "--policy.max_steps", "1", "--quiet")
    assert code == 0
    assert (many / "stages.json").read_bytes() == before


def test_the_normaliser_alone(world_recipe, tmp_path, said):
    words = ["reward", world_recipe, "--reward.cutoff", "0", "--output", str(tmp_path / "run"), "--quiet"]
    assert said("sft", *words[1:])[0] == 0
    assert said(*words)[0] == 0
    assert not (tmp_path / "run" / "reward" / "normaliser.json").exists()  # no policy reads segments
    code, _ = said(*words, "--fit-normaliser", "--reward.normaliser.answers", "pairs")
    assert code == 0 and (tmp_path / "run" / "reward" / "normaliser.json").exists()


def test_a_normaliser_of_another_scorer_is_refused(many, tmp_path, said):
    run = tmp_path / "run"
    shutil.copytree(many, run)
    shutil.copy(run / "reward/model.safetensors", run / "reward/segment/model.safetensors")
    stages = read(run / "stages.json")
    del stages["rl/segment-ppo"]
    (run / "stages.json").write_text(json.dumps(stages))
    code, error = said("rl", str(run), "--quiet")
    assert code == 2 and "belongs to another scorer" in error and "--fit-normaliser" in error


def test_a_function_may_be_the_oracle(many, tmp_path, said, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    shutil.copytree(many, run)
    oracle = '{type = "function", function = "rewards_of_mine:brief"}'
    assert said("evaluate", str(run), "--quiet", "--evaluation.oracle", oracle)[0] == 0
    found = read(run / "evaluation.json")
    assert found["oracle"] == "the function rewards_of_mine:brief" and found["oracle_used_in_training"] is None
    rows = [json.loads(line) for line in (run / "evaluation/answers-rto.jsonl").read_text().splitlines()]
    assert rows[3]["score"] is None and rows[0]["score"] == -len(rows[0]["answer"].split())
    assert all(pair["missing"] == 1 for pair in found["comparison"]["pairs"])


def test_a_scorer_with_another_tokenizer_pays_tokens(files_recipe, tiny_model, pairs_file, tmp_path, said):
    """A finished token scorer whose ids mean other characters: fitted, read by character spans, its share logged."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    scorer, run = tmp_path / "scorer", tmp_path / "run"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(scorer)
    words = json.loads((scorer / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    plain = sorted((i for token, i in ids.items() if not token.startswith("<")), reverse=True)
    turned = iter(plain)
    words["model"]["vocab"] = {t: i if t.startswith("<") else next(turned) for t, i in ids.items()}
    (scorer / "tokenizer.json").write_text(json.dumps(words))
    settings = LlamaConfig.from_pretrained(tiny_model, num_labels=1)
    LlamaForSequenceClassification(settings).save_pretrained(scorer)
    notes = {"mean": 0.0, "std": 1.0, "accuracy": 0.5, "pairs": 8, "cutoff": 0.0}
    (scorer / "scorer.json").write_text(json.dumps(notes))
    keys = {"model.name": tiny_model, "data.pairs": pairs_file, "reward.checkpoint": str(scorer), "reward.cutoff": "0"}
    keys |= {"policy.method": "token-ppo", "policy.critic.init": "reference", "output": str(run)}
    keys |= {"stages": '["sft", "reward", "rl"]', "baselines.ppo.max_steps": "1", "policy.max_steps": "1"}
    more = [word for key, value in keys.items() for word in (f"--{key}", value)]
    code, error = said("run", files_recipe, "--quiet", *more)
    assert code == 0, error
    assert read(run / "reward" / "normaliser.json")["cutoff"] == 0.0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["scorer_misaligned"] for row in rows if row["stage"] == "rl/token-ppo"] == [0.0]  # bytes are bytes


WRONG = [
    (["--prefer.loss.type", "dpoo"], "prefer.loss.type = 'dpoo' is unknown, did you mean dpo?"),
    (["--guides.x.loss.type", "symp"], "guides.x.loss.type = 'symp' is unknown, did you mean simpo?"),
    (["--policy.method", "segmnt-ppo"], "policy.method = 'segmnt-ppo' is unknown, did you mean segment-ppo?"),
    (
        ["--policy.method", "segment-ppo"],
        "needs a scorer with cutoff = a number of nats above 0; reward.",
    ),
    (["--policy.method", "token-ppo", "--reward.cutoff", "2"], "needs a scorer with cutoff = 0"),
    (["--policy.scorer", "big"], "policy.scorer = 'big' is not in [scorers]"),
    (["--policy.guide", "big"], "policy.guide = 'big' is not in [guides]"),
    (["--policy.advantage.type", "rlo"], "policy.advantage.type = 'rlo' is unknown, did you mean rloo?"),
    (["--policy.advantage.type", "rloo"], "policy.advantage rloo compares answers to the same prompt"),
    (["--policy.loss.type", "p3o"], "set policy.group = 2"),
    (["--policy.loss.dual", "0.5"], "policy.loss: "),
    (["--prefer.loss", '{type="simpo", ratio=0.5}'], "prefer.loss: "),
    (["--prefer.loss.beta", "-1"], "prefer.loss: beta: Input should be greater than 0"),
    (["--prefer.rounds.extrapolation", "1.5"], "prefer.rounds.extrapolation"),
    (["--prefer.loss.type", "rebel"], "no pair says so"),
]
LISTS = [
    ('[{type = "segment", layout = "evn"}]', "layout: Input should be 'even', 'last' or 'same'"),
    ('[{type = "segmnt"}]', "policy.rewards[0].type = 'segmnt' is unknown, did you mean segment?"),
    ('[{type = "function"}]', "the term function has no function"),
    ('[{type = "function", function = "no_such_module:f"}]', "no_such_module"),
    ('[{type = "function", function = "rewards_of_mine:nan"}]', "nan"),
    ('[{type = "function", function = "rewards_of_mine:short"}]', "rewards_of_mine:short"),
    ('[{type = "function", function = "rewards_of_mine:fails"}]', "ZeroDivisionError"),
    ('[{type = "http", url = "file:///etc/passwd"}]', "http"),
]
MODULE = """
def brief(prompts, answers): return [None if i == 3 else -float(len(a.split())) for i, a in enumerate(answers)]
def nan(prompts, answers): return [float("nan")] * len(answers)
def short(prompts, answers): return [0.0]
def fails(prompts, answers): return 1 / 0
"""


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_keys_are_one_line(changes, message, world_recipe, tmp_path, said):
    code, error = said("run", world_recipe, "--output", str(tmp_path / "run"), "--quiet", *changes)
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("rto: ") and message in error
    if "rebel" not in changes:  # that is seen in the data, after the sft stage
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("terms", "message"), LISTS, ids=[terms for terms, _ in LISTS])
def test_wrong_terms_are_one_line_and_write_nothing_over(terms, message, many, tmp_path, said, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    shutil.copytree(many, run)
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    kept = {name: stage for name, stage in read(run / "stages.json").items() if name != "rl/rto"}
    stages = json.dumps(kept).encode()
    (run / "stages.json").write_bytes(stages)
    more = ["--policy.method", "custom", "--policy.rewards", terms]
    code, error = said("rl", str(run), "--quiet", *more)
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    assert (run / "stages.json").read_bytes() == stages
