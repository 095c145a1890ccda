"""The accuracies in evaluation.json are those of the models that the run has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rto import recipe
from rto.models.checkpoint import ScorerNotes, save_notes
from rto.pipeline.contest import _accuracies
from rto.pipeline.job import Job, write_json

# (eval_loss, eval_accuracy) of steps 1 to 5; the log writes null for what is not finite.
MEASURED = [(0.6, 0.9), (0.4, 0.5), (0.4, 0.7), (None, 0.2), (0.5, 0.6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves of a guide and a scorer, both measured at every step."""
    rows = [
        {"stage": stage, "step": step, "eval_loss": loss, "eval_accuracy": accuracy}
        for stage in ("prefer", "reward")
        for step, (loss, accuracy) in enumerate(MEASURED, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward").mkdir()
    save_notes(tmp_path / "reward", ScorerNotes(0.0, 1.0, 0.8125, 8))
    write_json(tmp_path / "stages.json", {stage: {"path": stage} for stage in ("prefer", "reward")})
    return tmp_path


def accuracies(world_recipe: str, folder: Path, *changes: tuple[str, str]) -> dict[str, float | None]:
    config = recipe.load(world_recipe, [("output", str(folder)), ("scorers.further.cutoff", "0"), *changes])
    return _accuracies(Job(config, quiet=True))


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ("none", 0.6),  # the last step's
        ('{metric = "eval_loss", goal = "min"}', 0.5),  # the first of two best steps
        ('{metric = "eval_loss"}', 0.9),
        ('{metric = "eval_accuracy"}', 0.9),
    ],
)
def test_a_guides_accuracy_is_that_of_the_step_that_was_kept(world_recipe, folder, best, expected):
    found = accuracies(world_recipe, folder, ("prefer.eval_every", "1"), ("prefer.best", best))
    assert found == {"guide": expected, "scorer": 0.8125, "oracle": None, "scorer further": None}


def test_a_model_that_comes_finished_has_none(world_recipe, folder):
    """Its pairs were others."""
    given = [(f"{stage}.checkpoint", str(folder / "reward")) for stage in ("prefer", "reward")]
    assert set(accuracies(world_recipe, folder, *given).values()) == {None}
