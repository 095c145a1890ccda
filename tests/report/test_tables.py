"""The outcome of a run as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rto.report.tables import summary


def evaluated(folder: Path, rate: list[float | None], score: list[float | None], missing: int) -> list[str]:
    """The summary's words, line by line, of sft and a policy with this win rate and score: estimate, low, high."""
    scored: dict[str, Any] = dict(zip(("score", "low", "high"), score, strict=True))
    policies = {"sft": {"score": 1.0, "low": 0.5, "high": 1.5, "n": 4, "missing": 0}}
    policies["rto"] = scored | {"n": 4 - missing, "missing": missing}
    comparison: dict[str, Any] = {"names": ["sft", "rto"], "policies": policies}
    for i, key in enumerate(("matrix", "matrix_low", "matrix_high")):
        back = None if rate[i] is None else 1 - rate[i]
        comparison[key] = [[0.5, back], [rate[i], 0.5]]
    for policy in policies.values():
        policy |= {"kl": 2.0, "length": 3.0}
    (folder / "evaluation.json").write_text(json.dumps({"oracle": "the oracle", "comparison": comparison}))
    return [" ".join(line.split()) for line in summary(folder).splitlines()]


def test_everything_is_there(tmp_path):
    lines = evaluated(tmp_path, [0.75, 0.5, 0.875], [2.0, 1.25, 2.5], 0)
    assert lines[3:5] == ["sft - 25.0 [50.0, 12.5]", "rto 75.0 [50.0, 87.5] -"]
    assert lines[6:] == ["sft 1.00 [0.50, 1.50] 2.00 3.0", "rto 2.00 [1.25, 2.50] 2.00 3.0"]


def test_what_is_missing_is_a_dash(tmp_path):
    """A score of one prompt has no interval; with no prompt complete there is no score either."""
    lines = evaluated(tmp_path, [0.75, None, None], [2.0, None, None], 3)
    assert lines[4] == "rto 75.0 -"
    assert lines[7:] == ["rto 2.00 2.00 3.0", "rto: the oracle left 3 of 4 prompts without a score"]
    lines = evaluated(tmp_path, [None] * 3, [None] * 3, 4)
    assert lines[3:5] == ["sft - -", "rto - -"]
    assert lines[7:] == ["rto - 2.00 3.0", "rto: the oracle left 4 of 4 prompts without a score"]
