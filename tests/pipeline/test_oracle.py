"""An oracle that gives no scores: the stage says so, and is not done without any."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from rto.cli import main

MODULE = """
def some(prompts, answers): return [None if i % 4 == 0 else float(len(a)) for i, a in enumerate(answers)]
def none(prompts, answers): return [None] * len(answers)
"""


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Path:
    """A run with a reference and nothing else."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "short.toml").write_text('stages = ["sft", "evaluate"]\n' + world)
    assert main(["sft", str(folder / "short.toml"), "--output", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def judged(reference, tmp_path, monkeypatch, capsys):
    """Evaluate under an oracle: the exit code and standard error."""
    (tmp_path / "oracle_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(oracle: str) -> tuple[int, str]:
        code = main(["evaluate", str(reference), "--quiet", "--evaluation.oracle", oracle])
        return code, capsys.readouterr().err

    return call


def test_no_score_at_all_ends_the_stage_with_the_reason(judged, reference):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # bound and never listening: nobody answers there
        code, error = judged(f'{{type = "http", url = "http://127.0.0.1:{port}", retries = 0}}')
    assert code == 2 and error.count("\n") == 1
    assert f"no score for 8 of 8 answers of sft: http://127.0.0.1:{port}: " in error and "refused" in error
    code, error = judged('{type = "function", function = "oracle_of_mine:none"}')
    assert code == 2 and "no score for 8 of 8 answers of sft: it gave null, None or NaN." in error
    assert list(json.loads((reference / "stages.json").read_text())) == ["sft"]
    assert not (reference / "evaluation.json").exists()


def test_some_missing_scores_are_counted(judged, reference):
    code, error = judged('{type = "function", function = "oracle_of_mine:some"}')
    assert code == 0 and "no score for 2 of 8 answers of sft: it gave null, None or NaN" in error
    found = json.loads((reference / "evaluation.json").read_text())["comparison"]["policies"]["sft"]
    assert (found["n"], found["missing"]) == (6, 2)
    rows = [json.loads(line) for line in (reference / "evaluation/answers-sft.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in rows]
    assert [score is None for score in scores] == [True, False, False, False] * 2
    assert found["score"] == pytest.approx(sum(score for score in scores if score is not None) / 6)
