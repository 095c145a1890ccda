"""A sequence that is longer than a model reads is refused before anything is trained on it."""

from __future__ import annotations

import pytest

from rto.cli import main
from rto.data.chat import AnswerRow, PairRow, ScoredRow


@pytest.mark.parametrize("positions", [16, 42])
def test_more_tokens_than_positions(positions, world_recipe, tmp_path, capsys):
    """With their prompts, demonstrations have more than 16 tokens and less than 42; answers of RL may have more."""
    run = tmp_path / "run"
    words = ["--output", str(run), "--quiet", "--model.positions", str(positions), "--data.max_response", "40"]
    assert main(["run", world_recipe, *words]) == 2
    error = capsys.readouterr().err
    assert "(data.max_prompt and data.max_response bound them)" in error
    assert f"{positions} positions: lower one of the two, or choose a model with more" in error
    assert not (run / "stages.json").exists()  # the first stage tells
    assert main(["run", world_recipe, *words, "--stages", '["sft"]']) == (2 if positions == 16 else 0)


def test_rows_tell_their_longest_sequence():
    asked = (1, "ask", [1, 2])
    assert AnswerRow(*asked, [3, 4, 5], True).longest == 5
    assert PairRow(*asked, [3], True, [4, 5, 6, 7], True, 0.0).longest == 6
    assert ScoredRow(*asked, [[3], [4, 5, 6], [7]], [True] * 3, [1.0] * 3).longest == 5
