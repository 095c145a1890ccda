"""The resume check finds what differs, and nothing where nothing does."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from rto import recipe
from rto.cli import main
from rto.pipeline.resume_check import differences, shortened


def test_a_short_run_of_a_recipe(world_recipe, tmp_path, capsys):
    words = ["resume-check", world_recipe, "--steps", "1", "--kills", "1", "--folder", str(tmp_path / "both")]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "all equal to the bit" in said and "sft, prefer, reward, rl/ppo, rl/rto" in said

    whole, cut = tmp_path / "both" / "whole", tmp_path / "both" / "cut0"
    assert not list(differences(whole, cut))
    weights = load_file(cut / "rl/rto/model.safetensors")
    name = sorted(weights)[1]
    weights[name] = weights[name] + 1e-3
    save_file(weights, cut / "rl/rto/model.safetensors")
    rows = (cut / "metrics.jsonl").read_text().splitlines()
    (cut / "metrics.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    shutil.rmtree(cut / "sft")
    found = list(differences(whole, cut))
    assert any(line.startswith(f"rl/rto/model.safetensors: {name}") for line in found)
    assert any(line.startswith(f"metrics.jsonl, row {len(rows)}") for line in found)
    assert "sft/model.safetensors is only in one of the runs" in found
    assert main(words) == 2  # the folder is not empty
    assert json.loads((whole / "config.json").read_text())["checkpoints"] == {"every": 1, "rl_every": 1, "keep": 2}


def test_every_stage_is_shortened(world_recipe, tmp_path):
    """Also one with a max_steps of its own."""
    own = [(f"{named}.max_steps", "9") for named in ("guides.kto", "scorers.token", "baselines.ppo", "sft", "policy")]
    config = shortened(recipe.load(world_recipe, [*own, ("guides.kto.loss.type", "kto")]), 2, tmp_path)
    stages = [config.sft, *(config.preferences() | config.rewards() | config.policies()).values()]
    assert len(stages) == 7 and {stage.max_steps for stage in stages} == {2}
    assert config.preferences()["prefer/kto"].loss == {"type": "kto"}


def test_a_warm_up_is_shortened_too(world_recipe, tmp_path):
    """2 steps leave it one, so that the policy has the other; a baseline keeps what else its critic says."""
    keys = [("policy.critic.warmup", "5"), ("baselines.ppo.critic.warmup", "3"), ("baselines.ppo.critic.lr", "0.5")]
    policies = shortened(recipe.load(world_recipe, keys), 2, tmp_path).policies()
    assert [(name, policy.critic.warmup) for name, policy in policies.items()] == [("ppo", 1), ("rto", 1)]
    assert policies["ppo"].critic.lr == 0.5 and policies["rto"].critic.lr != 0.5
    none = shortened(recipe.load(world_recipe, keys), 1, tmp_path).policies()
    assert [policy.critic.warmup for policy in none.values()] == [0, 0]


@pytest.mark.parametrize("words", [["--kills", "0"], ["--steps", "0"], ["--set", "seed"]])
def test_wrong_words(words, world_recipe, capsys):
    assert main(["resume-check", world_recipe, *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
