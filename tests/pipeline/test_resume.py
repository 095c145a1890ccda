"""A run that is cut at any step goes on to the bit: weights, metrics and answers are those of the uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cut import made, run_cut, signalled

from rto import recipe
from rto.cli import main
from rto.pipeline import run

MORE = """
[checkpoints]
every = 1
rl_every = 1
[guides.kto]
loss = { type = "kto" }
[guides.cached]
cache_reference = true
epochs = 2
micro_tokens = 120
[guides.apo]
batch = 8
rounds = { count = 2, extrapolation = 0.5 }
[policy]
lr = 1e-3
rollouts = 8
batch = 4
updates = 2
reward_scaling = "std"
[policy.kl]
controller = "adaptive"
target = 0.01
ema = 0.9
"""


@pytest.fixture(scope="module")
def moving_recipe(world, tmp_path_factory) -> Path:
    """A recipe in which everything moves that a checkpoint has to hold."""
    path = tmp_path_factory.mktemp("recipe") / "moving.toml"
    path.write_text(world + MORE)
    return path


@pytest.fixture(scope="module")
def whole(moving_recipe, tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe.load(moving_recipe, [("output", str(folder))]), quiet=True)
    assert not list(folder.glob("checkpoints/*/*"))  # a finished stage needs none
    return made(folder)


def test_stopped_at_every_step_it_goes_on_to_the_bit(moving_recipe, whole, tmp_path):
    config = recipe.load(moving_recipe, [("output", str(tmp_path / "run"))])
    assert run_cut(config, last="rl/rto") > 12  # the evaluation is not saved in parts
    assert made(tmp_path / "run") == whole


def test_killed_at_random_moments_it_goes_on_to_the_bit(moving_recipe, whole, tmp_path):
    """SIGKILL, twice, wherever it strikes."""
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "rto.cli", "run", str(moving_recipe), "--output", str(folder), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for seconds in (8.0, 10.0):
        with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            time.sleep(seconds)
            child.send_signal(signal.SIGKILL)
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert made(folder) == whole


def test_another_recipe_is_refused_unless_allowed(moving_recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["run", str(moving_recipe), "--output", str(folder), "--quiet"]
    with signalled():
        assert main(words) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert main([*words, "--sft.lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "stage sft was begun with another recipe (sft.lr was 0.01 and is 0.5)" in error
    only_sft = ["sft", *words[1:], "--sft.lr", "0.5", "--allow-changed", "sft.lr"]
    assert main(only_sft) == 0
    assert main(["resume", str(folder), "--quiet", "--allow-changed", "sft.lr"]) == 0
