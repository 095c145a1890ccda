"""What a recipe that is whole by itself still cannot mean: refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest

from rto.config import Config
from rto.pipeline.resolve import check_stages, guide_names, resolve
from rto.recipe import build

PAIRWISE = {"method": "ppo", "loss": {"type": "p3o"}, "group": 2}


def config(**changes: Any) -> Config:
    return build({"model": {"name": "gpt2"}, "data": {"pairs": "prefs.jsonl"}} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": {"dpo": {"method": "ppo"}}}, "baselines.dpo: the guide of .prefer., after its loss, has this"),
        ({"baselines": {"sft": {"method": "ppo"}}}, "baselines.sft: the reference has this name: give it another"),
        (
            {"prefer": {"loss": {"type": "rebel"}}, "baselines": {"rebel": PAIRWISE | {"loss": {"type": "rebel"}}}},
            "baselines.rebel: the guide",
        ),
        ({"guides": {"sft": {}}}, "guides.sft: another policy of the recipe has this name"),
        ({"guides": {"rto": {}}}, "guides.rto: another policy of the recipe has this name"),
    ],
)
def test_no_two_policies_have_one_name(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(config(**changes))


def test_names_that_differ_stand():
    found = config(prefer={"loss": {"type": "rebel"}}, baselines={"dpo": {"method": "ppo"}}, guides={"ipo": {}})
    assert guide_names(found) == {"rebel": "prefer", "ipo": "prefer/ipo"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": {"estimator": "k3"}}, "policy.kl.estimator = 'k1'"),
        ({"kl": {"place": "loss"}}, "policy.kl.place = 'reward'"),
        ({"whiten": True}, "no advantages for policy.whiten: leave it out"),
        ({"whiten": False}, "no advantages for policy.whiten: leave it out"),
        ({"advantage_clip": 0.5}, "no advantages for policy.advantage_clip"),
    ],
)
def test_what_a_pairwise_loss_does_not_read_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(config(policy=PAIRWISE | changes))
    resolve(config(policy=PAIRWISE))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"rollouts": 1024, "kl": {"horizon": 204}},
            r"kl.horizon = 204 answers is a fifth of rollouts = 1,024 or less",
        ),
        ({"rollouts": 1000, "batch": 100, "kl": {"horizon": 200}}, "could take kl.coef to zero"),
        ({"kl": {"coef": 0}}, "multiplies coef, and coef = 0 never moves"),
    ],
)
def test_an_adaptive_coefficient_stays_above_zero(policy, message):
    """The largest step down is coef x (1 - 0.2 x rollouts / horizon)."""
    policy["kl"] = {"controller": "adaptive", "target": 6.0} | policy["kl"]
    with pytest.raises(ValueError, match=message):
        config(policy=policy)
    assert config(policy=policy | {"kl": policy["kl"] | {"horizon": 205, "coef": 0.01}}).policy.kl.horizon == 205


def test_a_held_out_oracle_needs_pairs_before_anything_is_trained():
    bare = config(data={"pairs": "prefs.jsonl", "oracle": 0})
    for stages in (bare.stages, ["evaluate"]):
        with pytest.raises(ValueError, match="needs pairs of its own, and data.oracle is 0: set data.oracle, say"):
            check_stages(bare, stages)
    check_stages(bare, ["sft", "rl"])
    oracle = {"type": "function", "function": "mine:score"}
    check_stages(config(data={"pairs": "prefs.jsonl", "oracle": 0}, evaluation={"oracle": oracle}), bare.stages)
