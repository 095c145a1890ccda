"""One process and two train the same models: the same global batches, the same losses, the same weights."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from rto.cli import main
from rto.report.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
device = "cpu"
stages = ["sft", "prefer", "reward", "rl", "evaluate"]
[data]
type = "world"
sft = 35
pairs = 35
prompts = 35
test = 7
max_response = 12
[model]
type = "scratch"
hidden = 16
layers = 1
heads = 2
intermediate = 16
[sft]
lr = 1e-2
batch = 7
[prefer]
lr = 1e-3
batch = 7
[reward]
lr = 1e-3
batch = 7
[policy]
lr = 1e-3
rollouts = 7
batch = 7
eps = 1e-4
[evaluation]
bootstrap = 100
[evaluation.oracle]
type = "world"
"""
# An odd batch: the two shares differ. Adam's eps in [policy] keeps rounding from becoming whole steps.
STEPS = 5


def free_port() -> int:
    """A port on loopback, where gloo meets."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            pytest.skip(f"nothing can be bound on 127.0.0.1, so gloo cannot meet: {error}")
        return probe.getsockname()[1]


def two(*words: str) -> subprocess.Popen[str]:
    """Two processes of one run. Not by `accelerate launch --cpu --num_processes 2`, which without mpirun starts one."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    call = [sys.executable, *launcher, f"--master_port={free_port()}", *words]
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipe = subprocess.PIPE
    return subprocess.Popen(call, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True)


def test_a_nan_on_one_process_is_left_out_by_both(tmp_path):
    """The other process hears of it and does not wait for a part that never comes."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    script = str(Path(__file__).with_name("nan_on_one.py"))
    with two(script, "sft", str(recipe), "--output", str(tmp_path / "run"), "--quiet") as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    rows = read_metrics(tmp_path / "run", "sft")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row.get("skipped") for row in rows] == [None, 1.0, None, None, None]
    (incident,) = (tmp_path / "run" / "incidents").glob("*.json")
    found = json.loads(incident.read_text())
    assert (found["role"], found["part"], found["token"], len(found["batch"])) == ("policy", "answer", 0, 3)


def test_what_one_process_read_of_the_reference_the_other_knows(tmp_path, monkeypatch):
    """cache_reference: the second epoch deals the rows anew, and no process runs the reference in it."""
    recipe = tmp_path / "tiny.toml"
    text = RECIPE.replace("[prefer]", "[prefer]\ncache_reference = true\nepochs = 2")
    recipe.write_text(text.replace(', "reward", "rl", "evaluate"', ""))
    monkeypatch.setenv("READS", str(tmp_path))
    script = str(Path(__file__).with_name("reads_of_two.py"))
    with two(script, "run", str(recipe), "--output", str(tmp_path / "run"), "--quiet") as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    steps = len(read_metrics(tmp_path / "run", "prefer"))
    assert steps == 2 * STEPS
    for part, mine in ((first, 4), (second, 3)):  # of each batch of seven pairs; the held-out ones come last
        assert part["read"][:STEPS] == [2 * mine] * STEPS and part["read"][STEPS:steps] == [0] * STEPS
    assert first["known"] == second["known"] and len(first["known"]) == 2 * (35 + 7)


MODULE = """
import os
def lengths(prompts, answers):
    with open(f"asked-{os.environ.get('RANK', 'alone')}", "a") as file:
        file.write("".join(f"{prompt} {answer}\\n" for prompt, answer in zip(prompts, answers)))
    return [None if len(answer) % 3 == 0 else float(len(answer)) for answer in answers]
"""


def test_each_process_asks_the_oracle_for_its_share(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(RECIPE.replace('"prefer", "reward", "rl", ', ""))
    (tmp_path / "oracle_that_counts.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)  # where functions are looked for

    def words(name: str) -> list[str]:
        oracle = '{type = "function", function = "oracle_that_counts:lengths"}'
        return ["run", "tiny.toml", "--output", name, "--quiet", "--evaluation.oracle", oracle]

    with two("-m", "rto.cli", *words("two")) as process:
        assert main(words("one")) == 0
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    alone, first, second = (Path(f"asked-{who}").read_text().splitlines() for who in ("alone", 0, 1))
    assert len(alone) == 7 and (first, second) == (alone[::2], alone[1::2])
    rows = [Path(name, "evaluation", "answers-sft.jsonl").read_text().splitlines() for name in ("one", "two")]
    scores = [[json.loads(line)["score"] for line in part] for part in rows]
    assert scores[0] == scores[1] and None in scores[0]


def test_both_evaluate_with_half_the_tokens_where_one_lacks_memory(tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE.replace('"reward", "rl", ', ""))
    words = ["--quiet", "--policy.micro_tokens", "32"]
    assert main(["run", str(tmp_path / "tiny.toml"), "--output", str(tmp_path / "one"), *words]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    script = str(Path(__file__).with_name("short_on_one.py"))
    changed = ["--evaluation.bootstrap", "101"]  # else it is done before
    with two(script, "evaluate", str(tmp_path / "two"), *changed) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    told = [line for line in err.splitlines() if line.startswith("out of memory")]
    assert told[0] == "out of memory: reading_tokens 128 -> 64, and the step again" and len(told) == len(set(told))
    for name in ("sft", "dpo"):
        texts = [(tmp_path / run / "evaluation" / f"answers-{name}.jsonl").read_text() for run in ("one", "two")]
        for one, other in zip(*(map(json.loads, text.splitlines()) for text in texts), strict=True):
            assert other.pop("kl") == pytest.approx(one.pop("kl"), abs=1e-4) and other == one


def test_two_processes_equal_one(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)

    def words(name: str) -> list[str]:
        return ["run", str(recipe), "--output", str(tmp_path / name), "--quiet"]

    with two("-m", "rto.cli", *words("two")) as process:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main(words("one")) == 0
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.replace(str(tmp_path / "two"), "") == said.getvalue().replace(str(tmp_path / "one"), "")  # said once
    gaps = {}
    for stage in ("sft", "prefer", "reward", "rl/rto"):
        alone, together = (read_metrics(tmp_path / name, stage) for name in ("one", "two"))
        assert [row["step"] for row in together] == list(range(1, STEPS + 1))  # written by one process only
        for a, b in zip(alone, together, strict=True):
            assert set(a) == set(b)
            for key in set(a) - {"stage", "tokens_per_second"}:
                assert b[key] == pytest.approx(a[key], abs=1e-4), (stage, a["step"], key)
                gaps[stage] = max(gaps.get(stage, 0.0), abs(a[key] - b[key]))
        weights = [load_file(tmp_path / name / stage / "model.safetensors") for name in ("one", "two")]
        for key, weight in weights[0].items():
            assert_close(weights[1][key], weight, atol=1e-4, rtol=0)
    print("largest difference of any metric:", gaps)
