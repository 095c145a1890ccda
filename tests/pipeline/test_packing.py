"""A recipe with `model.packing`: the run of the same recipe without, and a plan of it."""

from __future__ import annotations

import pytest

from rto import recipe
from rto.pipeline import run
from rto.pipeline.job import Job
from rto.pipeline.memory_plan import Rehearsal
from rto.report.log import read_metrics

STAGES = ["sft", "prefer", "reward", "rl"]
CHANGES = [("baselines", "{}"), ("model.lora.r", "2"), ("sft.max_steps", "2"), ("prefer.max_steps", "2")]
CHANGES += [("reward.max_steps", "2"), ("policy.max_steps", "1"), ("policy.micro_tokens", "96")]


def clock(key: str) -> bool:
    return any(word in key for word in ("second", "memory", "time"))


def test_a_run_is_the_same_packed(world_recipe, tmp_path):
    found = {}
    for packing in ("false", "true"):
        changes = [*CHANGES, ("model.packing", packing), ("output", str(tmp_path / packing))]
        config = recipe.load(world_recipe, changes)
        found[packing] = read_metrics(run(config, STAGES, quiet=True))
    assert len(found["true"]) == len(found["false"]) > 4
    for packed, plain in zip(found["true"], found["false"], strict=True):
        numbers = {k: v for k, v in plain.items() if isinstance(v, float) and not clock(k)}
        assert {k: packed[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)


def test_packed_rows_are_rehearsed(world_recipe):
    """Every pass of a world is full here, so packing has nothing to leave out but siblings' shared prompts."""
    found = []
    for packing in ("false", "true"):
        config = recipe.load(world_recipe, [("model.packing", packing), ("baselines", "{}")])
        job = Job(config, quiet=True)
        stages = Rehearsal(config, job.rows, job.runtime, None).stages(["sft", "rl"])
        found.append([work() for work in stages.values()])
    for plain, packed in zip(*found, strict=True):
        assert plain.state == packed.state
        assert packed.alive < 1.5 * plain.alive
