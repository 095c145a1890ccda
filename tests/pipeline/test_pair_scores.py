"""Pairs as scored answers: the loss takes the chosen answer as good, whatever scores its options are about."""

from __future__ import annotations

from typing import Any

import pytest

from rto import recipe
from rto.pipeline import run
from rto.report.log import read_metrics

GUIDES = """
[guides.kto]
loss = { type = "kto" }
[guides.high]
loss = { type = "kto", desirable_above = 5 }
[guides.point]
loss = { type = "mppo", variant = "point_mse", full_score = 1 }
[guides.ten]
loss = { type = "mppo", variant = "point_mse", full_score = 10 }
"""


@pytest.mark.parametrize(("one", "other"), [("kto", "high"), ("point", "ten")])
def test_pairs_say_the_same_on_every_scale(guided, one, other):
    """Training and held-out rows: kto by another border and mppo by another best score learn the same."""
    assert guided[one] == guided[other] and len(guided[one]) == 2
    assert {"loss", "eval_loss", "eval_accuracy"} <= set(guided[one][1])


@pytest.fixture(scope="module")
def guided(world, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each guide."""
    folder = tmp_path_factory.mktemp("guided")
    (folder / "recipe.toml").write_text('stages = ["sft", "prefer"]\n' + world + GUIDES)
    run(recipe.load(folder / "recipe.toml", [("output", str(folder / "run"))]), quiet=True)
    found = {}
    for name in ("kto", "high", "point", "ten"):
        rows = read_metrics(folder / "run", f"prefer/{name}")
        found[name] = [{k: v for k, v in row.items() if k not in ("stage", "tokens_per_second")} for row in rows]
    return found
