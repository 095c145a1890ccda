"""Recipes: what is read, what is refused, and that every refusal says which key and what to write instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from rto import recipe
from rto.advantages import ADVANTAGES
from rto.config import Config, Files, Packaged, Pretrained, Scratch, World
from rto.policy import LOSSES
from rto.preferences import PREFERENCE_LOSSES
from rto.recipe import build, complete, put
from rto.rewards import TERMS

TOML = """
[model]
name = "gpt2"
[data]
pairs = "prefs.jsonl"
"""
TERM_FUNCTIONS = {name: term.function for name, term in TERMS.items()}


def table(**changes: Any) -> dict[str, Any]:
    """The smallest recipe with some tables set."""
    return {"model": {"name": "gpt2"}, "data": {"pairs": "prefs.jsonl"}} | changes


def refusal(**changes: Any) -> str:
    """What the person reads."""
    with pytest.raises(ValueError) as error:
        build(table(**changes), "my.toml")
    assert type(error.value) is ValueError  # not pydantic's
    return str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "my.toml"
    file.write_text(TOML)
    return file


# --- what is read -------------------------------------------------------------------------------------


def test_load_fills_in_the_published_settings(path):
    config = recipe.load(path)
    assert isinstance(config.model, Pretrained) and config.model.name == "gpt2"
    assert isinstance(config.data, Files) and config.data.pairs == "prefs.jsonl"
    policy = config.policy
    assert (policy.method, policy.lr, policy.rollouts, policy.batch) == ("rto", 5e-7, 1024, 128)
    assert (policy.kl.coef, policy.kl.controller, policy.critic.lr, policy.critic.clip) == (0.01, "fixed", 9e-6, 0.2)
    assert (policy.betas, policy.warmup, policy.floor, policy.max_norm) == ((0.9, 0.95), 0.03, 0.1, 1.0)
    assert (config.prefer.batch, config.prefer.loss, config.reward.lr) == (256, {"type": "dpo"}, 1e-6)


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("policy.lr", "5e-7", 5e-7),  # TOML reads this as a number; YAML would not
        ("policy.lr", "1", 1.0),
        ("policy.max_steps", "12", 12),
        ("policy.max_steps", "none", None),
        ("policy.whiten", "false", False),
        ("policy.method", "ppo", "ppo"),
        ("policy.method", '"ppo"', "ppo"),
        ("policy.kl.coef", "0.02", 0.02),
        ("policy.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("policy.loss", '{type = "ppo", clip = 0.1}', {"type": "ppo", "clip": 0.1}),
        ("policy.loss.clip", "0.1", {"type": "ppo", "clip": 0.1}),
        ("model.lora.r", "16", 16),
        ("model.name", "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("data.pairs", "runs/my data, [1].jsonl", "runs/my data, [1].jsonl"),
        ("stages", '["sft", "prefer"]', ["sft", "prefer"]),
        ("data.chat_template", "", ""),
    ],
)
def test_overrides(path, key, value, read):
    changes = [(key, value)]
    if key == "policy.loss.clip":
        changes = [("policy.loss.type", "ppo"), *changes]
    found: Any = recipe.load(path, changes)
    for step in key.removesuffix(".clip").split("."):
        found = getattr(found, step)
    assert found == read and type(found) is type(read)


def test_later_overrides_win(path):
    assert recipe.load(path, [("seed", "1"), ("seed", "2")]).seed == 2


def test_put_makes_tables_and_replaces_null():
    """A resolved recipe holds nulls: an override may still put a table there."""
    settings: dict[str, Any] = {"model": {"lora": None}}
    put(settings, "model.lora.r", "8")
    put(settings, "a.b.c", "x y")
    assert settings == {"model": {"lora": {"r": 8}}, "a": {"b": {"c": "x y"}}}


def test_put_does_not_go_through_a_value():
    with pytest.raises(ValueError, match=r"--model\.name\.x: name is a value, not a table"):
        put({"model": {"name": "gpt2"}}, "model.name.x", "1")


@pytest.mark.parametrize(
    ("model", "kind"),
    [({"name": "gpt2"}, Pretrained), ({"type": "package"}, Packaged), ({"type": "scratch"}, Scratch)],
)
def test_type_chooses_the_model(model, kind):
    assert type(build(table(model=model)).model) is kind


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[1].glob("recipes/*.toml")), ids=lambda file: file.name)
def test_shipped_recipes_are_valid(file):
    open_pairs = "pairs" not in recipe.tomllib.loads(file.read_text())["data"]  # the user names them
    assert recipe.load(file, [("data.pairs", "prefs.jsonl")] * open_pairs).policies()


# --- what is refused: files ---------------------------------------------------------------------------


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.toml: no such recipe; the recipes that come with rto are in"):
        recipe.load(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="is a folder: give a recipe"):
        recipe.load(tmp_path)


@pytest.mark.parametrize("content", [b"model = ", b"lr: 1", b"\xff\xfe"])
def test_no_toml(tmp_path, content):
    (tmp_path / "my.toml").write_bytes(content)
    with pytest.raises(ValueError, match=r"my\.toml: not a TOML file: "):
        recipe.load(tmp_path / "my.toml")


def test_missing_tables_are_named():
    with pytest.raises(ValueError) as error:
        build({}, "my.toml")
    assert str(error.value) == "my.toml: model: Field required\nmy.toml: data: Field required"


# --- what is refused: unknown keys --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"polcy": {}}, "my.toml: unknown key polcy, did you mean policy?; valid: baselines, checkpoints, data,"),
        (
            {"policy": {"lrr": 1}},
            "my.toml: unknown key policy.lrr, did you mean lr?; valid: advantage, advantage_clip,",
        ),
        ({"policy": {"kl": {"coeff": 1}}}, "unknown key policy.kl.coeff, did you mean coef?; valid: coef, controller,"),
        # in a union, also where the type is not written
        ({"model": {"name": "x", "revison": "y"}}, "unknown key model.revison, did you mean revision?; valid: attent"),
        ({"model": {"name": "x", "lora": {"r": 1, "alfa": 2}}}, "unknown key model.lora.alfa, did you mean alpha?"),
        (
            {"model": {"type": "scratch", "layer": 2}},
            "unknown key model.layer, did you mean layers?; valid: attention,",
        ),
        ({"model": {"type": "package", "fle": 2}}, "unknown key model.fle, did you mean file?; valid: attention,"),
        ({"data": {"pairs": "x", "max_promt": 2}}, "unknown key data.max_promt, did you mean max_prompt?"),
        ({"reward": {"model": {"name": "x", "dtyp": 1}}}, "unknown key reward.model.dtyp, did you mean dtype?"),
        (
            {"evaluation": {"oracle": {"type": "model", "name": "x", "nam": "y"}}},
            "unknown key evaluation.oracle.nam, did you mean name?; valid: name, trust_remote_code, type",
        ),
        # keys that are spelt like a type
        ({"files": 1}, "unknown key files, did you mean guides?; valid: baselines,"),
        ({"evaluation": {"world": 1}}, "unknown key evaluation.world, did you mean oracle?; valid: bootstrap,"),
        # nothing is near
        ({"policy": {"xyzzy": 1}}, "unknown key policy.xyzzy; valid: advantage,"),
        ({"baselines": {"ppo": {"lrr": 1}}}, "my.toml: in [baselines.ppo]: unknown key lrr, did you mean lr?; valid: "),
        (
            {"baselines": {"a": {"lr": 1.0}, "b": {"kl": {"coeff": 1}}}},
            "my.toml: in [baselines.b]: unknown key kl.coeff, did you mean coef?; valid: coef, controller,",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(changes, line):
    message = refusal(**changes)
    assert line in message and message.startswith("my.toml: ") and "\n" not in message


def test_every_mistake_has_a_line():
    lines = refusal(polcy={}, policy={"lrr": 1, "lr": "fast"}, seed=-1).splitlines()
    assert len(lines) == 4 and all(line.startswith("my.toml: ") for line in lines)


# --- what is refused: values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "start", "given"),
    [
        ({"policy": {"lr": "fast"}}, "policy.lr: this is no number", "'fast'"),
        ({"policy": {"lr": 0}}, "policy.lr: Input should be greater than 0", "0"),
        ({"policy": {"batch": 1.5}}, "policy.batch: Input should be a valid integer", "1.5"),
        ({"policy": {"kl": 3}}, "policy.kl: Input should be a valid dictionary", "3"),
        ({"policy": {"loss": "ppo"}}, "policy.loss: Input should be a valid dictionary", "'ppo'"),
        ({"policy": {"betas": [0.9]}}, "policy.betas.1: Field required", ""),
        ({"sft": {"optimizer": "sgd"}}, "sft.optimizer: Input should be 'adamw' or 'adam'", "'sgd'"),
        ({"trackers": ["wandbb"]}, "trackers.0: Input should be 'tensorboard', 'wandb' or 'trackio'", "'wandbb'"),
        ({"data": {"type": "world", "pairs": 1}, "evaluation": {"oracle": {"type": "world"}}}, "data.pairs: ", "1"),
        ({"data": {"test": 1.0, "pairs": "x"}}, "data.test: Input should be less than 1", "1.0"),
        ({"model": {"type": "pretrained"}}, "model.name: Field required", ""),
        ({"model": {"type": "package", "package": 5}}, "model.package: Input should be a valid string", "5"),
        ({"model": "gpt2"}, "model: Input should be a valid dictionary", "'gpt2'"),
        ({"data": ["prefs.jsonl"]}, "data: Input should be a valid dictionary", "['prefs.jsonl']"),
        ({"baselines": {"ppo": 3}}, "baselines.ppo: Input should be a valid dictionary", "3"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(changes, start, given):
    message = refusal(**changes)
    assert message.startswith(f"my.toml: {start}")
    assert message.endswith(f"(given: {given})" if given else "required")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": {"type": "peft"}}, "model.type: unknown type peft; known: 'pretrained', 'package', 'scratch'"),
        ({"data": {"type": 3}}, "data.type: unknown type 3; known: 'files', 'world'"),
        ({"reward": {"model": {"type": "x"}}}, "reward.model.type: unknown type x; known: 'pretrained', "),
        ({"evaluation": {"oracle": {"type": "gpt"}}}, "evaluation.oracle.type: unknown type gpt; known: 'world', "),
    ],
)
def test_an_unknown_type_lists_the_known_ones(changes, line):
    assert refusal(**changes).startswith(f"my.toml: {line}")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"policy": {"kl": {"controller": "adaptive"}}}, "policy.kl: controller = 'adaptive' needs a target"),
        ({"policy": {"kl": {"target": 6.0}}}, "policy.kl: controller = 'adaptive' needs a target, and a target needs"),
        ({"policy": {"rollouts": 100, "batch": 64}}, "policy: rollouts = 100 is not a multiple of batch = 64"),
        ({"policy": {"method": "custom"}}, "policy: a list of rewards goes with method = 'custom', and only with it"),
        ({"policy": {"rewards": [{"type": "terminal"}]}}, "policy: a list of rewards goes with method = 'custom'"),
        ({"evaluation": {"oracle": {"type": "world"}}}, "recipe: evaluation.oracle.type = 'world' goes with data.type"),
        ({"data": {"type": "world"}}, "recipe: data.type = 'world' has no pairs for an oracle"),
        ({"data": {}}, "recipe: data.pairs is missing: name a file or a data set, for example --data.pairs"),
        ({"baselines": {"rto": {"lr": 1.0}}}, "baselines.rto has the name of policy.method: give it another name"),
        ({"baselines": {"a": {"batch": 100}}}, "in [baselines.a]: recipe: rollouts = 1024 is not a multiple of batch"),
    ],
)
def test_what_must_go_together(changes, line):
    assert refusal(**changes).startswith(f"my.toml: {line}")


def test_files_without_pairs_are_fine_where_no_stage_reads_them():
    assert build(table(data={"prompts": "p.jsonl"}, stages=["sft", "rl"])).data.pairs is None


def test_a_world_with_its_oracle():
    config = build(table(model={"type": "scratch"}, data={"type": "world"}, evaluation={"oracle": {"type": "world"}}))
    assert isinstance(config.data, World)


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build(table()).seed = 3


# --- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": {"method": "custom", "rewards": [{"type": "implicit", "clip": None}], "betas": [0.8, 0.9]}},
        {"model": {"type": "scratch", "lora": {"r": 4}}, "baselines": {"ppo": {"method": "ppo", "kl": {"coef": 1}}}},
        {"reward": {"model": {"type": "package"}}, "evaluation": {"oracle": {"type": "model", "name": "x"}}},
    ],
)
def test_json_round_trip(changes):
    config = build(table(**changes))
    assert build(json.loads(config.model_dump_json())) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


# --- the options of losses and terms ------------------------------------------------------------------


def test_complete_fills_in_the_defaults():
    usual = {"beta": 0.1, "label_smoothing": 0.0, "variant": "sigmoid", "nll": 0.0}
    assert complete({"type": "dpo"}, PREFERENCE_LOSSES, "prefer.loss") == {"type": "dpo", **usual}
    assert complete({"type": "gae", "lam": 0.9}, {"gae": ADVANTAGES["gae"].function}, "x") == {
        "type": "gae",
        "gamma": 1.0,
        "lam": 0.9,
    }
    done = complete({"type": "implicit", "clip": None}, TERM_FUNCTIONS, "x")
    assert done == {"type": "implicit", "scale": 0.05, "clip": None, "placement": "token"}
    assert complete(done, TERM_FUNCTIONS, "x") == done


def test_complete_takes_a_whole_number_for_a_float():
    clip = complete({"type": "ppo", "clip": 1}, LOSSES, "policy.loss")["clip"]
    assert clip == 1.0 and isinstance(clip, float)


@pytest.mark.parametrize(
    ("spec", "functions", "message"),
    [
        ({"type": "dpoo"}, PREFERENCE_LOSSES, "here.type = 'dpoo' is unknown, did you mean dpo?; known: dpo"),
        ({}, PREFERENCE_LOSSES, "here.type = None is unknown; known: dpo"),
        ({"type": ["dpo"]}, PREFERENCE_LOSSES, "here.type = ['dpo'] is unknown"),
        (
            {"type": "dpo", "bta": 1},
            PREFERENCE_LOSSES,
            "here: unknown key bta, did you mean beta?; valid: beta, label_smoothing, nll, variant",
        ),
        (
            {"type": "implicit", "scal": 1},
            TERM_FUNCTIONS,
            "here: unknown key scal, did you mean scale?; valid: clip, placement, scale",
        ),
        ({"type": "ppo", "logprobs": 1}, LOSSES, "here: unknown key logprobs; valid: clip"),  # an input, no option
        ({"type": "dpo", "beta": "big"}, PREFERENCE_LOSSES, "here: beta: this is no number (given: 'big')"),
        ({"type": "dpo", "beta": None}, PREFERENCE_LOSSES, "here: beta: Input should be a valid number"),
        ({"type": "implicit", "clip": [1]}, TERM_FUNCTIONS, "here: clip: Input should be a valid number"),
    ],
)
def test_complete_refuses(spec, functions, message):
    with pytest.raises(ValueError) as error:
        complete(spec, functions, "here")
    assert str(error.value).startswith(message)


def example(inputs: int, *, needed: int, mode: Literal["a", "b"] = "a", limit: float | None = None) -> int:
    return inputs


def test_complete_knows_every_kind_of_option():
    table = {"example": example}
    assert complete({"type": "example", "needed": 3, "limit": 2}, table, "x") == {
        "type": "example",
        "needed": 3,
        "mode": "a",
        "limit": 2.0,
    }
    with pytest.raises(ValueError, match="x: needed: Field required"):
        complete({"type": "example"}, table, "x")
    with pytest.raises(ValueError, match="x: mode: Input should be 'a' or 'b'"):
        complete({"type": "example", "needed": 3, "mode": "c"}, table, "x")


# --- baselines ----------------------------------------------------------------------------------------


def test_policies_merge_nested_tables():
    config = build(
        table(
            policy={"lr": 1e-6, "kl": {"coef": 0.05, "controller": "adaptive", "target": 6.0}},
            baselines={"ppo": {"method": "ppo", "kl": {"coef": 0.1}}, "slow": {"lr": 1e-8, "critic": {"lr": 1e-7}}},
        )
    )
    policies = config.policies()
    assert list(policies) == ["ppo", "slow", "rto"] and policies["rto"] == config.policy
    ppo = policies["ppo"]
    assert (ppo.method, ppo.lr, ppo.kl.coef, ppo.kl.target) == ("ppo", 1e-6, 0.1, 6.0)
    slow = policies["slow"]
    assert (slow.method, slow.lr, slow.critic.lr, slow.critic.clip) == ("rto", 1e-8, 1e-7, 0.2)


def test_policies_keep_spec_tables_whole():
    """A table with a type replaces the one before; without a type it changes some of its options."""
    base = {"advantage": {"type": "gae", "gamma": 0.99, "lam": 0.9}}
    changed = {"whole": {"advantage": {"type": "gae"}}, "part": {"advantage": {"lam": 0.5}}}
    policies = build(table(policy=base, baselines=changed)).policies()
    assert policies["whole"].advantage == {"type": "gae"}
    assert policies["part"].advantage == {"type": "gae", "gamma": 0.99, "lam": 0.5}
    assert policies["rto"].advantage == base["advantage"]


def test_a_baseline_beside_a_list_of_ones_own():
    """A published method brings its own terms; a baseline without a method keeps the list."""
    own = [{"type": "implicit", "scale": 0.1}]
    other = [{"type": "terminal"}]
    policies = build(
        table(
            policy={"method": "custom", "rewards": own},
            baselines={"ppo": {"method": "ppo"}, "slow": {"lr": 1e-8}, "other": {"rewards": other}},
        )
    ).policies()
    assert policies["ppo"].rewards is None
    assert policies["slow"].rewards == policies["custom"].rewards == own
    assert policies["other"].rewards == other


def test_without_baselines_there_is_one_policy():
    config = build(table())
    assert config.policies() == {"rto": config.policy}
