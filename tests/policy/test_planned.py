"""How many iterations there are, who learns in them, and what several processes count together."""

from __future__ import annotations

import dataclasses
import math

import pytest
from torch import equal

from rto.finite import NotFinite
from rto.models.memory import Budget
from rto.optim import Optimizer
from rto.policy.kl import KlController
from rto.policy.train import RlState, _rewarded, planned
from rto.policy.update import Learner, update


@pytest.mark.parametrize(
    ("changes", "iterations"),
    [
        ({"epochs": 1, "max_steps": None}, 2),  # 16 prompts, 8 an iteration
        ({"epochs": 1.25, "max_steps": None}, 3),  # the last one is begun
        ({"epochs": 1, "max_steps": None, "group": 4}, 8),  # 2 prompts an iteration
        ({"epochs": 1, "max_steps": 5}, 2),
        ({"epochs": 9, "max_steps": 5}, 5),
        ({"epochs": 0.01, "max_steps": None}, 1),
    ],
)
def test_iterations_by_hand(world, changes, iterations):
    assert planned(world.settings(**changes), 16, critic=False) == iterations


@pytest.mark.parametrize("warmup", [2, 5])
def test_a_warm_up_that_leaves_nothing_to_the_policy_is_refused(world, tmp_path, warmup):
    roles = world.roles()
    before = world.weights(roles.critic)
    settings = world.settings(critic={"lr": 1e-3, "warmup": warmup}, max_steps=2)
    with pytest.raises(ValueError, match=f"rl: critic.warmup = {warmup} leaves none of the 2 iterations to the policy"):
        world.run(tmp_path, roles, settings, [{"type": "terminal"}])
    assert all(map(equal, before, world.weights(roles.critic)))
    assert planned(settings, 16, critic=False) == 2  # nobody to warm up
    assert planned(world.settings(critic={"warmup": 1}), 16, critic=True) == 2


def test_a_process_without_a_row_is_refused(world):
    by_answer = world.settings(group=4)
    assert planned(by_answer, 16, critic=True, processes=8) == 2
    with pytest.raises(ValueError, match="rl/ppo: an iteration of rollouts = 8 has 8 rows for 9 processes to share"):
        planned(by_answer, 16, critic=True, processes=9, where="rl/ppo")
    by_prompt = world.settings(group=4, advantage={"type": "remax"})  # a greedy answer a prompt
    assert planned(by_prompt, 16, critic=False, processes=2) == 2
    with pytest.raises(ValueError, match="policy: an iteration of rollouts = 8 has 2 rows for 3 processes to share"):
        planned(by_prompt, 16, critic=False, processes=3)


def test_the_kl_coefficient_rests_while_the_critic_warms_up(world, tmp_path):
    """The policy still is the reference: KL is 0, which is not what the coefficient is for."""
    kl = {"coef": 0.1, "controller": "adaptive", "target": 6.0, "horizon": 100}
    settings = world.settings(kl=kl, critic={"lr": 1e-3, "warmup": 2}, max_steps=4)
    rows = world.run(tmp_path, world.roles(), settings, [{"type": "terminal"}])
    coefficients = [row["kl_coef"] for row in rows]
    assert coefficients[:3] == [0.1, 0.1, 0.1]
    assert coefficients[3] == pytest.approx(0.1 * (1 - 0.2 * 8 / 100))


def test_failures_are_counted_over_all_processes(world, scores):
    """As if another process had met as many, and one none."""
    config = world.settings()
    reader = world.reader(world.roles(), config, scores("return [1 / (p != prompts[2]) for p in prompts]"))

    def one_more(counts: dict[str, float]) -> dict[str, float]:
        return {key: value + 2 for key, value in counts.items()}

    assert reader.measures(dict) == {}  # none is not worth a line
    assert reader.measures(one_more) == {"function_failures": 2}  # the others' alone
    reader._function_failed("ZeroDivisionError")
    assert reader.measures(one_more) == {"function_failures": 3}
    assert reader.measures(dict) == {}


def test_policy_and_critic_left_out_of_one_minibatch_are_two_steps(world):
    config, roles, met = world.settings(), world.roles(), []
    terms = [{"type": "terminal"}]
    drawn = world.draw(roles, config, terms)
    optimizers = [Optimizer(role.parameters(), config, config.lr, 2) for role in (roles.policy, roles.critic)]
    state = RlState(*optimizers, KlController(0.1))
    buffer, _, _ = _rewarded(world.reader(roles, config, terms), drawn, config, state)
    broken = dataclasses.replace(buffer, advantages=buffer.advantages * math.nan, returns=buffer.returns * math.nan)
    learner = Learner(roles.policy, optimizers[0], Budget(config.micro_tokens, print), roles.critic, optimizers[1])

    def note(error: NotFinite) -> None:
        met.append(error.culprit.role)

    assert update(learner, broken, config, 0.1, 0, 0, world.runtime, note)["skipped"] == 2.0
    assert met == ["policy", "critic"]
