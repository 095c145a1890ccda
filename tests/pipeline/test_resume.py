"""A run that is cut at any step goes on to the bit: weights, metrics and answers are those of the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rto import recipe
from rto.cli import main
from rto.pipeline import run
from rto.pipeline.job import Job
from rto.pipeline.stop import Stop, Stopped

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
def moving_recipe(world_recipe, tmp_path_factory) -> Path:
    """A recipe in which everything moves that a checkpoint has to hold."""
    text = Path(world_recipe).read_text()
    for part in ("[policy]\nlr = 1e-3\nrollouts = 8\nbatch = 4\n", '[baselines.ppo]\nmethod = "ppo"\n'):
        assert part in text
        text = text.replace(part, "")
    path = tmp_path_factory.mktemp("recipe") / "moving.toml"
    path.write_text(text + MORE)
    return path


def signalled(stop: Stop) -> Stop:
    """SIGTERM has come already."""
    stop.wanted = "SIGTERM"
    return stop


def made(folder: Path) -> dict[str, object]:
    """Everything that a run computed: weights by file, metrics without timings, answers."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found[path.relative_to(folder).as_posix()] = {key: t.tolist() for key, t in load_file(path).items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]
    found["samples"] = (folder / "samples.jsonl").read_text()
    found["answers"] = {p.name: p.read_text() for p in sorted(folder.glob("evaluation/*.jsonl"))}
    return found


@pytest.fixture(scope="module")
def whole(moving_recipe, tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe.load(moving_recipe, [("output", str(folder))]), quiet=True)
    assert not list(folder.glob("checkpoints/*/*"))  # a finished stage needs none
    return made(folder)


def test_stopped_at_every_step_it_goes_on_to_the_bit(moving_recipe, whole, tmp_path, monkeypatch):
    """As if SIGTERM came in every single step."""
    config = recipe.load(moving_recipe, [("output", str(tmp_path / "run"))])
    monkeypatch.setattr(Stop, "__enter__", signalled)
    stops = 0
    while True:
        try:
            run(config, quiet=True)
            break
        except Stopped as stopped:
            assert stopped.signal == "SIGTERM"
            stops += 1
            assert stops < 100
        if "rl/rto" in Job(config, True).finished():  # the evaluation is not saved in parts
            monkeypatch.undo()
    assert stops > 12
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


def test_another_recipe_is_refused_unless_allowed(moving_recipe, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    words = ["run", str(moving_recipe), "--output", str(folder), "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(Stop, "__enter__", signalled)
        assert main(words) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert main([*words, "--sft.lr", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "stage sft was begun with another recipe (sft.lr was 0.01 and is 0.5)" in error
    only_sft = ["sft", *words[1:], "--sft.lr", "0.5", "--allow-changed", "sft.lr"]
    assert main(only_sft) == 0
    assert main(["resume", str(folder), "--quiet", "--allow-changed", "sft.lr"]) == 0
