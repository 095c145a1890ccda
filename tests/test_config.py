"""Values that are refused with their key, because torch or the disk would refuse them later and without it."""

from __future__ import annotations

import pytest

from rto.config import NonNegative
from rto.preferences import PREFERENCE_LOSSES
from rto.recipe import build, complete
from rto.rewards import TERMS


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": {"batch": True}}, "policy.batch: this is no number (given: True)"),
        ({"policy": {"batch": "5"}}, "policy.batch: this is no number (given: '5')"),
        ({"policy": {"betas": [0.9, 1.5]}}, "policy.betas.1"),
        ({"policy": {"betas": ["0.8", 0.9]}}, "policy.betas: this is no number (given: ['0.8', 0.9])"),
        ({"policy": {"whiten": "yes"}}, "policy.whiten: this is neither true nor false (given: 'yes')"),
        ({"reward": {"normalize": 1}}, "reward.normalize: this is neither true nor false (given: 1)"),
        ({"prefer": {"cache_reference": "on"}}, "prefer.cache_reference: this is neither true nor false (given: 'on')"),
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


def example(*, needed: int = 1, bound: NonNegative | None = None, on: bool | None = None) -> None:
    """Every kind of number and truth that an option may be."""


FUNCTIONS = {name: term.function for name, term in TERMS.items()} | PREFERENCE_LOSSES | {"example": example}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"type": "dpo", "beta": "0.1"}, "beta: this is no number (given: '0.1')"),
        ({"type": "dpo", "beta": True}, "beta: this is no number (given: True)"),
        ({"type": "implicit", "clip": "0.1"}, "clip: this is no number (given: '0.1')"),
        ({"type": "segment", "length_norm": 1}, "length_norm: this is neither true nor false (given: 1)"),
        ({"type": "ipo", "average": "on"}, "average: this is neither true nor false (given: 'on')"),
        ({"type": "example", "needed": False}, "needed: this is no number (given: False)"),
        ({"type": "example", "bound": "1"}, "bound: this is no number (given: '1')"),
        ({"type": "example", "bound": True}, "bound: this is no number (given: True)"),
        ({"type": "example", "on": 0}, "on: this is neither true nor false (given: 0)"),
    ],
)
def test_options_are_refused_and_never_changed(spec, said):
    with pytest.raises(ValueError) as error:
        complete(spec, FUNCTIONS, "here")
    assert str(error.value) == f"here: {said}"


def test_what_an_option_may_be_stays():
    for options in ({"needed": 2, "bound": 0.5, "on": True}, {"needed": 1, "bound": None, "on": None}):
        assert complete({"type": "example", **options}, FUNCTIONS, "here") == {"type": "example", **options}
