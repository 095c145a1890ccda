"""A sequence that is longer than a model reads is refused before anything is trained on it."""

from __future__ import annotations

import json

import pytest

from rto.cli import main
from rto.data.chat import AnswerRow, PairRow, ScoredRow

BEFORE = {"sft": [], "rl": ["sft", "prefer", "reward"]}  # finished stages


@pytest.mark.parametrize(("positions", "stage"), [(16, "sft"), (42, "rl")])
def test_more_tokens_than_positions(positions, stage, world_recipe, tmp_path, capsys):
    """With their prompts, demonstrations have more than 16 tokens and less than 42; answers of RL may have more."""
    words = ["--output", str(tmp_path / "run"), "--quiet", "--model.positions", str(positions)]
    assert main(["run", world_recipe, *words, "--data.max_response", "40"]) == 2
    error = capsys.readouterr().err
    assert "(data.max_prompt and data.max_response bound them)" in error
    assert f"{positions} positions: lower one of the two, or choose a model with more" in error
    done = tmp_path / "run" / "stages.json"
    assert list(json.loads(done.read_text()) if done.exists() else {}) == BEFORE[stage]


def test_rows_tell_their_longest_sequence():
    asked = (1, "ask", [1, 2])
    assert AnswerRow(*asked, [3, 4, 5], True).longest == 5
    assert PairRow(*asked, [3], True, [4, 5, 6, 7], True, 0.0).longest == 6
    assert ScoredRow(*asked, [[3], [4, 5, 6], [7]], [True] * 3, [1.0] * 3).longest == 5
