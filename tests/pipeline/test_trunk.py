"""Recipes whose critic is a head on the policy's trunk: end to end, cut and gone on with, planned, on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cut import made, run_cut
from safetensors.torch import load_file
from test_two_processes import two
from torch.testing import assert_close

from rto import recipe
from rto.cli import main
from rto.pipeline.job import Job
from rto.pipeline.memory_plan import Rehearsal
from rto.report.log import read_metrics

MORE = """
[model.lora]
r = 2
[policy]
lr = 1e-3
rollouts = 8
batch = 4
eps = 1e-4
[policy.critic]
trunk = "policy"
lr = 1e-3
warmup = 1
[checkpoints]
rl_every = 1
[baselines.detached]
method = "ppo"
critic = { trunk = "detached", warmup = 0 }
"""


@pytest.fixture(scope="module")
def written(world, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "trunk.toml"
    path.write_text('stages = ["sft", "prefer", "reward", "rl"]\n' + world + MORE)
    return path


@pytest.fixture(scope="module")
def whole(written, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["run", str(written), "--output", str(folder), "--quiet"]) == 0
    return folder


def test_rto_learns_with_its_critic_on_the_trunk(whole):
    rows = {name: read_metrics(whole, f"rl/{name}") for name in ("rto", "detached")}
    assert [("policy/loss" in row, "value/loss" in row) for row in rows["rto"]] == [(False, True), (True, True)]
    assert all({"policy/grad_norm", "value/grad_norm", "value/explained_variance"} <= set(r) for r in rows["detached"])
    assert {p.name for p in (whole / "rl" / "rto").iterdir()} >= {"adapter_model.safetensors"}
    weights = load_file(whole / "rl" / "rto" / "adapter_model.safetensors")
    assert not [key for key in weights if "score" in key]  # the critic is not saved
    assert main(["run", str(whole), "--quiet"]) == 0  # its own config.json is a recipe


def test_cut_after_every_iteration_it_goes_on_to_the_bit(written, whole, tmp_path):
    config = recipe.load(written, [("output", str(tmp_path / "run"))])
    assert run_cut(config, last="rl/detached") >= 4
    assert made(tmp_path / "run") == made(whole)


@pytest.mark.parametrize("lora", ["model.lora.r=2", "model.lora=none"])
def test_the_plan_counts_one_trunk(written, lora):
    """All that the critic adds is the head of 16 weights, with its gradient, two moments and a count of steps."""
    key, _, value = lora.partition("=")
    config = recipe.load(written, [(key, value), ("baselines", "{}")])
    job = Job(config, quiet=True)
    stage = Rehearsal(config, job.rows, job.runtime, None).stages(["rl"])["rl/rto"]()
    own = {kind: size for (role, kind), size in stage.parts.items() if role == "critic"}
    assert own["weights"] == 16 * 4 and 64 <= sum(own.values()) <= 4 * 64 + 4
    policy = stage.saved  # its weights or its adapter, in bytes
    assert stage.state - 3 * (policy + 16 * 4) < 100 * 4  # a checkpoint: weights and moments, and the counts


def test_two_processes_equal_one(written, tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    only = ["--stages", '["sft", "rl"]', "--baselines", "{}", "--policy.method", "custom", "--quiet"]
    only += ["--policy.rewards", '[{ type = "length" }]', "--policy.rollouts", "7", "--policy.batch", "7"]
    with two("-m", "rto.cli", "run", str(written), "--output", str(tmp_path / "two"), *only) as process:
        assert main(["run", str(written), "--output", str(tmp_path / "one"), *only]) == 0
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    alone, together = (read_metrics(tmp_path / name, "rl/custom") for name in ("one", "two"))
    assert len(alone) == len(together) == 3
    for a, b in zip(alone, together, strict=True):
        assert {**b, "tokens_per_second": 0} == pytest.approx({**a, "tokens_per_second": 0}, abs=1e-4)
    weights = [load_file(tmp_path / name / "rl/custom/adapter_model.safetensors") for name in ("one", "two")]
    assert_close(weights[1], weights[0], atol=1e-4, rtol=0)
