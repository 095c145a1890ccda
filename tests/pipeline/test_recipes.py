"""The recipes that come with rto: they resolve, and carry the published values, one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rto import recipe
from rto.pipeline import resolve, steps_of, terms_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_resolves(path):
    config = recipe.load(path, [("data.pairs", "mine.jsonl")] if path.stem.startswith(("smollm2", "own")) else [])
    resolved = resolve(config)
    assert recipe.build(json.loads(resolved.model_dump_json())) == resolved  # a run folder reads as its recipe
    assert [step.name for step in steps_of(resolved, resolved.stages)]
    assert "rl" in resolved.stages and resolved.policies()


def test_rto_on_llama_3_has_the_published_values():
    """RTO v4, section 5 and the released script (formula sheet 5.1 and 5.2)."""
    config = resolve(recipe.load(RECIPES / "rto-llama3-8b-ultrafeedback.toml"))
    rto_run, ppo_run = config.policies()["rto"], config.policies()["ppo"]
    assert config.model.name == "OpenRLHF/Llama-3-8b-sft-mixture"
    assert (config.model.dtype, config.model.attention) == ("bfloat16", "flash_attention_2")
    assert config.model.gradient_checkpointing is True
    assert (config.data.max_prompt, config.data.max_response) == (1024, 1024)
    assert config.seed == 42
    for stage in (config.prefer, config.reward, rto_run, ppo_run):
        assert (stage.optimizer, stage.betas, stage.weight_decay) == ("adam", (0.9, 0.95), 0.0)
        assert (stage.schedule, stage.warmup, stage.floor, stage.epochs) == ("cosine", 0.03, 0.1, 1)
        assert (stage.max_norm, stage.max_steps) == (1.0, None)
    assert (config.reward.lr, config.reward.batch) == (1e-6, 128)
    assert config.reward.model.name == "meta-llama/Llama-3.2-1B-Instruct"
    assert config.reward.normalize is True
    assert (config.prefer.lr, config.prefer.batch, config.prefer.loss["beta"]) == (5e-7, 256, 0.1)
    assert config.prefer.checkpoint == "RTO-RL/Llama3-8B-DPO"
    assert (rto_run.lr, ppo_run.lr) == (5e-7, 8e-7)
    for run in (rto_run, ppo_run):
        assert (run.rollouts, run.batch, run.rollouts // run.batch, run.updates) == (1024, 128, 8, 1)
        assert (run.critic.lr, run.critic.init, run.critic.clip) == (9e-6, "scorer", 0.2)
        assert (run.kl.coef, run.kl.controller) == (0.01, "fixed")
        assert run.temperature == 1.0
    assert rto_run.loss == {"type": "ppo", "clip": 0.2, "clip_high": None, "dual": None}
    assert rto_run.advantage == {"type": "gae", "gamma": 1.0, "lam": 0.95}
    implicit, terminal = terms_of(rto_run)
    assert implicit == {"type": "implicit", "scale": 0.05, "clip": 0.05, "placement": "token"}
    assert (terminal["type"], terminal["scale"]) == ("terminal", 1.0)
    assert [term["type"] for term in terms_of(ppo_run)] == ["terminal"]
    assert (config.evaluation.prompts, config.evaluation.temperature) == (805, 0.7)


def test_rto_on_pythia_has_the_published_values():
    """RTO v1, appendix D (formula sheet 5.3)."""
    config = resolve(recipe.load(RECIPES / "rto-pythia-2.8b-hh.toml"))
    rto_run, ppo_run = config.policies()["rto-v1"], config.policies()["ppo"]
    assert config.model.name == "EleutherAI/pythia-2.8b"
    assert (config.data.pairs, config.data.data_dir) == ("Anthropic/hh-rlhf", "helpful-base")
    assert config.data.max_prompt + config.data.max_response == 512
    assert (config.sft.optimizer, config.sft.lr, config.sft.batch, config.sft.epochs) == ("adamw", 1e-5, 32, 1)
    guide = config.prefer
    assert (guide.optimizer, guide.lr, guide.batch, guide.epochs, guide.loss["beta"]) == ("adamw", 5e-6, 32, 1, 0.1)
    assert (config.reward.optimizer, config.reward.lr, config.reward.batch) == ("adamw", 1e-5, 128)
    for run in (rto_run, ppo_run):
        assert (run.optimizer, run.lr, run.critic.lr) == ("adam", 5e-6, 5e-6)
        assert (run.batch, run.rollouts, run.updates, run.epochs) == (16, 256, 2, 1)
    assert (rto_run.kl.coef, ppo_run.kl.coef) == (0.03, 0.05)
    assert terms_of(rto_run) == [{"type": "implicit", "scale": 0.1, "clip": None, "placement": "token"}]
    assert [term["type"] for term in terms_of(ppo_run)] == ["terminal"]
    assert config.evaluation.prompts == 400


def test_rto_on_one_gpu_shares_one_backbone():
    config = resolve(recipe.load(RECIPES / "rto-qwen-7b-1gpu.toml"))
    model, (policy,) = config.model, config.policies().values()
    assert model.lora.r == 16 and (model.dtype, model.attention) == ("bfloat16", "flash_attention_2")
    assert model.packing and model.gradient_checkpointing
    assert config.reward.model is None and config.prefer.checkpoint is None  # each an adapter on the same weights
    assert policy.critic.trunk == "policy" and policy.loss["type"] == "ppo"
    assert [term["type"] for term in terms_of(policy)] == ["implicit", "terminal"]
