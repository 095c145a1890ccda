"""Values that are refused with their key, because torch or the disk would refuse them later and without it."""

from __future__ import annotations

import pytest

from rto.recipe import build


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": {"batch": True}}, "policy.batch: this is no number (given: True)"),
        ({"policy": {"batch": "5"}}, "policy.batch: this is no number (given: '5')"),
        ({"policy": {"betas": [0.9, 1.5]}}, "policy.betas.1"),
        ({"policy": {"epochs": 1e308}}, "policy.epochs"),
        ({"stages": []}, "stages"),
        ({"stages": ["rl", "rl"]}, "a stage is named twice"),
        ({"output": ""}, "output: '' is no folder"),
        ({"baselines": {"a" * 65: {}}}, "up to 64 letters"),
        ({"model": {"type": "scratch", "hidden": 30, "heads": 4}}, "hidden = 30 is not a multiple of 2 x heads = 8"),
        ({"model": {"type": "package", "package": "../x"}}, "'../x' is no name of a Python package"),
        ({"nonfinite": {"skip": -1}}, "nonfinite.skip"),
        ({"prefer": {"best": {"metric": "eval_loss"}}}, "set eval_every"),
        (
            {"prefer": {"best": {"metric": "eval_loss"}, "eval_every": 2, "rounds": {"count": 2}}},
            "leave one of them out",
        ),
        ({"prefer": {"best": {"metric": "loss"}}}, "'loss' is not of held-out rows"),
        ({"sft": {"best": {"metric": "loss"}}}, "unknown key sft.best"),
        ({"policy": {"best": {"metric": "policy/loss"}}}, "is not of answers"),
    ],
)
def test_values_that_torch_or_the_disk_would_refuse_later(changes, said):
    with pytest.raises(ValueError) as error:
        build({"model": {"type": "scratch"}, "data": {"pairs": "a.jsonl"}} | changes, "my.toml")
    assert str(error.value).startswith("my.toml: ") and said in str(error.value)
