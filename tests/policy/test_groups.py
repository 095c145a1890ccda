"""Several answers to one prompt: who is asked, estimators without a critic, the greedy baseline, and pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rto.advantages import to_go
from rto.models.memory import Budget
from rto.numerics import masked_sum
from rto.optim import Optimizer
from rto.policy import LOSSES
from rto.policy.rollout import prompts_of
from rto.policy.train import _advantages, reads_values
from rto.policy.update import Buffer, Learner, update
from rto.rewards import total
from rto.rollouts.generate import generate

TERMINAL = {"type": "terminal", "scale": 1.0, "clip": 10.0}
IMPLICIT = {"type": "implicit", "scale": 0.05, "clip": 0.05}
RTO = [IMPLICIT, TERMINAL]
NO_KL = {"coef": 0.0}


def buffer_of(drawn, terms, rewards=None) -> Buffer:
    s = drawn.signals
    reward, _ = total(terms, s, 0.0)
    zero, numbers = torch.zeros_like(reward), torch.arange(len(reward))
    rewards = masked_sum(reward, s.mask) if rewards is None else rewards
    return Buffer(drawn.completions, s.logprobs, s.reference, zero, zero, zero, rewards, drawn.group, numbers)


def learn(world, roles, buffer, config, kl_coef: float = 0.0) -> tuple[dict[str, float], list[torch.Tensor]]:
    learner = Learner(
        roles.policy, Optimizer(roles.policy.parameters(), config, config.lr, 8), Budget(config.micro_tokens, print)
    )
    metrics = update(learner, buffer, config, kl_coef, 0, 0, world.runtime)
    return metrics, world.weights(roles.policy)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- who is asked -------------------------------------------------------------------------------------


def test_each_prompt_is_asked_as_often_as_the_group_says(world):
    config = world.settings(group=4, advantage={"type": "rloo"})
    drawn = world.draw(world.roles(), config, [TERMINAL], iteration=1)
    two = prompts_of(world.prompts, 2, 1, 0)
    assert [row.row for row in drawn.asked] == [two[0].row] * 4 + [two[1].row] * 4
    assert drawn.group.tolist() == [0] * 4 + [1] * 4
    answers = [tuple(ids) for ids in drawn.completions.ids.tolist()]
    assert len(set(answers[:4])) > 1 and len(set(answers[4:])) > 1  # noise of its own for each
    alone = generate(
        world.roles().policy, [row.ids for row in drawn.asked], [("rollouts", 1, i) for i in range(8)],
        seed=0, limit=16, end=world.encoder.end, pad=world.encoder.pad,
    )  # fmt: skip
    assert torch.equal(alone.completions.ids, drawn.completions.ids)


def test_an_epoch_counts_prompts_not_answers(world, tmp_path):
    config = world.settings(group=4, advantage={"type": "grpo"}, epochs=0.5, max_steps=None)
    assert len(world.run(tmp_path, world.roles(), config, [TERMINAL])) == 4  # 8 prompts, 2 an iteration


# --- without a critic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce", "reinforce++", "remax"])
def test_no_critic_is_needed_and_none_is_waited_for(world, tmp_path, estimator):
    config = world.settings(group=4, advantage={"type": estimator}, critic={"warmup": 5}, max_steps=1)
    assert not reads_values(config)
    roles = world.roles(critic=None)
    before = world.weights(roles.policy)
    row = world.run(tmp_path, roles, config, RTO)[0]
    assert not [key for key in row if key.startswith("value/")]
    assert math.isfinite(row["policy/loss"]) and row["policy/lr"] == 1e-3
    assert not equal(before, world.weights(roles.policy))


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_answers_with_one_reward_teach_nothing(world, tmp_path, scores, estimator):
    config = world.settings(group=4, advantage={"type": estimator}, kl=NO_KL)
    same, roles = scores("return [0.3 * len(p) for p in prompts]"), world.roles()
    before = world.weights(roles.policy)
    rows = world.run(tmp_path / "run", roles, config, same)
    assert rows[0]["reward/total"] > 0 and [row["policy/grad_norm"] for row in rows] == [0.0, 0.0]
    assert equal(before, world.weights(roles.policy))


def test_rloo_in_the_loop_by_hand(world, scores):
    """One group of four, one answer missing: the baseline is the mean of the other two."""
    config = world.settings(group=4, rollouts=4, batch=4, advantage={"type": "rloo"})
    terms = scores("return [1.0, None, 4.0, -2.0]")
    drawn = world.draw(world.roles(), config, terms)
    assert drawn.group.tolist() == [0, 0, 0] and drawn.missing == 1
    reward, parts = total(terms, drawn.signals, 0.0)
    advantages, _ = _advantages(config, reward, parts["kl"], drawn)
    by_hand = torch.tensor([1.0 - (4 - 2) / 2, 4.0 - (1 - 2) / 2, -2.0 - (1 + 4) / 2])
    assert_close(advantages, torch.where(drawn.signals.mask, by_hand[:, None], 0.0))


# --- the greedy baseline ------------------------------------------------------------------------------


def test_remax_compares_with_the_greedy_answer(world):
    config = world.settings(group=2, advantage={"type": "remax", "clip": 0.5})
    roles = world.roles()
    drawn = world.draw(roles, config, RTO, greedy=True)
    asked = [row.ids for row in drawn.asked]
    end, pad = world.encoder.end, world.encoder.pad
    made = generate(roles.policy, asked, [("x",)] * 8, seed=0, limit=16, end=end, pad=pad, temperature=0.0)
    c = made.completions
    dense = (0.05 * (roles.guide.logprobs(c)[0] - roles.reference.logprobs(c)[0]).detach()).clamp(-0.05, 0.05)
    at_end = torch.arange(16) == c.lengths[:, None] - 1
    go = to_go(dense + torch.where(at_end, roles.scorer.scores(c).detach()[:, None], 0.0), c.mask)
    by_hand = torch.stack([g[torch.arange(16).clamp(max=int(n) - 1)] for g, n in zip(go, c.lengths, strict=True)])
    assert_close(drawn.greedy, by_hand, atol=1e-5, rtol=0)

    reward, parts = total(RTO, drawn.signals, 0.1)
    advantages, _ = _advantages(config, reward, parts["kl"], drawn)
    mask = drawn.signals.mask
    gap = (to_go(reward - parts["kl"], mask) - by_hand).clamp(-0.5, 0.5)
    assert_close(advantages, torch.where(mask, gap + parts["kl"], 0.0), atol=1e-5, rtol=0)
    assert advantages.abs().max() > 0.01


def test_a_greedy_policy_is_its_own_baseline(world):
    config = world.settings(advantage={"type": "remax"}, temperature=1e-4)
    drawn = world.draw(world.roles(), config, [TERMINAL], greedy=True)
    reward, parts = total([TERMINAL], drawn.signals, 0.0)
    advantages, _ = _advantages(config, reward, parts["kl"], drawn)
    assert reward.abs().max() > 1e-3
    assert_close(advantages, torch.zeros_like(advantages), atol=1e-6, rtol=0)


def test_a_prompt_whose_greedy_answer_has_no_reward_is_left_out(world, scores):
    """The function is called for the samples, then for the greedy answers: four prompts, the third of them missing."""
    config = world.settings(group=2, advantage={"type": "remax"})
    terms = scores("return [1.0] * 8 if len(answers) == 8 else [5.0, 6.0, None, 8.0]")
    drawn = world.draw(world.roles(), config, terms, greedy=True)
    assert drawn.group.tolist() == [0, 0, 1, 1, 3, 3] and drawn.missing == 2
    assert drawn.greedy[:, 0].tolist() == [5.0, 5.0, 6.0, 6.0, 8.0, 8.0]


def test_a_greedy_answer_that_is_not_finite_is_named(world):
    config, roles = world.settings(advantage={"type": "remax"}), world.roles()
    sampled = set(world.draw(roles, config, [TERMINAL]).completions.ids.flatten().tolist())
    asked = [row.ids for row in prompts_of(world.prompts, 8, 0, 0)]
    end, pad = world.encoder.end, world.encoder.pad
    made = generate(roles.policy, asked, [("x",)] * 8, seed=0, limit=16, end=end, pad=pad, temperature=0.0)
    only = set(made.completions.ids[made.completions.mask].tolist()) - sampled - {i for ids in asked for i in ids}
    with torch.no_grad():
        roles.scorer.parameters()[0][min(only)] = math.inf  # the embedding of a word that no sample has
    with pytest.raises(FloatingPointError, match="^the score of the scorer is .* answer, token "):
        world.draw(roles, config, [TERMINAL], greedy=True)


# --- pairs --------------------------------------------------------------------------------------------


@pytest.fixture
def spy(monkeypatch):
    """A pairwise loss that keeps what it is given and pulls the policy along."""
    seen = []

    def loss(first, second, first_old, second_old, first_ref, second_ref, first_reward, second_reward, kl_coef):
        now, old = (first - second).detach(), first_old - second_old
        seen.append({"now": now, "old": old, "of": (first_reward, second_reward)})
        return (first - second) ** 2

    monkeypatch.setitem(LOSSES, "spy", loss)
    return seen


@pytest.mark.parametrize("micro_tokens", [1, 1_000_000])
def test_pairs_stay_together_and_the_first_minibatch_is_on_policy(world, spy, micro_tokens):
    config = world.settings(
        group=2, batch=4, updates=2, loss={"type": "spy"}, micro_tokens=micro_tokens, lr=1e-2, max_norm=100.0
    )
    roles = world.roles()
    drawn = world.draw(roles, config, RTO)
    learn(world, roles, buffer_of(drawn, RTO, drawn.group.float()), config)
    assert all(torch.equal(*call["of"]) for call in spy)  # the reward of a row is the number of its prompt
    groups = [sorted(call["of"][0].tolist()) for call in spy]
    a_pass = 2 if micro_tokens > 1 else 4  # two minibatches of two pairs, whole or pair by pair
    assert len(groups) == 2 * a_pass
    for start in (0, a_pass):
        assert sorted(sum(groups[start : start + a_pass], [])) == [0.0, 1.0, 2.0, 3.0]
    first = a_pass // 2
    assert all(torch.equal(call["now"], call["old"]) for call in spy[:first])
    assert all((call["now"] != call["old"]).all() for call in spy[first:])


@pytest.mark.parametrize("loss", ["p3o", "rebel"])
def test_micro_batches_change_nothing(world, loss):
    found, drawn = [], world.draw(world.roles(), world.settings(group=2, loss={"type": loss}), RTO)
    assert len(set(drawn.completions.lengths.tolist())) > 1
    for micro in (1, 60, 1_000_000):
        config = world.settings(group=2, batch=4, updates=2, loss={"type": loss}, micro_tokens=micro)
        found.append(learn(world, world.roles(), buffer_of(drawn, RTO), config, 0.1))
    for metrics, after in found[:2]:
        assert metrics == pytest.approx(found[2][0], rel=1e-5, abs=1e-4)
        for a, b in zip(after, found[2][1], strict=True):
            assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", ["p3o", "rebel"])
def test_the_first_loss_by_hand(world, tmp_path, loss):
    """Nothing has moved yet: rho = 1 and delta = 0."""
    config = world.settings(group=2, loss={"type": loss}, kl={"coef": 0.1}, max_steps=1)
    reference = world.moved(world.shop.reference(), "reference", 0.2)
    roles = world.roles(reference=reference, critic=None)
    assert not reads_values(config)
    drawn = world.draw(roles, config, [TERMINAL])
    rewards = drawn.signals.scores.clamp(-10, 10)
    gap = masked_sum(drawn.signals.logprobs - drawn.signals.reference, drawn.signals.mask)
    r, d = rewards[0::2] - rewards[1::2], gap[0::2] - gap[1::2]
    by_hand = -0.5 * (r - 0.1 * d) * d if loss == "p3o" else (r - 0.1 * d) ** 2
    row = world.run(tmp_path, roles, config, [TERMINAL])[0]
    assert d.abs().min() > 1e-3
    assert row["policy/loss"] == pytest.approx(by_hand.mean().item(), abs=1e-4)
    assert row["policy/moved"] == 0.0 and row["policy/sampler_gap"] < 1e-5


def test_a_pair_that_lost_an_answer_is_left_out(world, spy, scores):
    config = world.settings(group=2, loss={"type": "spy"})
    terms = scores("return [None if i in (2, 7) else 1.0 * (i // 2) for i in range(8)]")
    drawn = world.draw(world.roles(), config, terms)
    assert drawn.group.tolist() == [0, 0, 1, 2, 2, 3]
    learn(world, world.roles(), buffer_of(drawn, terms), config)
    assert [[side.tolist() for side in call["of"]] for call in spy] in ([[[0.0, 2.0]] * 2], [[[2.0, 0.0]] * 2])


def test_a_great_kl_leaves_the_rewards_as_they_are(world, tmp_path, spy):
    """The reward without KL is summed without it: taken off again, e^10 nats of k3 would leave its rounding."""
    far = world.moved(world.shop.reference(), "reference", 3.0)
    kl = {"coef": 1e3, "estimator": "k3"}
    config = world.settings(group=2, loss={"type": "spy"}, kl=kl, max_steps=1)
    roles = world.roles(reference=far)
    scores = world.draw(roles, config, [TERMINAL]).signals.scores
    row = world.run(tmp_path, roles, config, [TERMINAL])[0]
    assert row["reward/kl"] < -1e6
    found = sorted(x for call in spy for side in call["of"] for x in side.tolist())
    assert found == sorted(scores.tolist())


def test_no_whole_pair_is_no_step(world, tmp_path, scores):
    config, roles = world.settings(group=2, loss={"type": "p3o"}, max_steps=1), world.roles()
    before = world.weights(roles.policy)
    row = world.run(tmp_path / "run", roles, config, scores("return [None, 1.0] * 4"))[0]
    assert row["missing"] == 0.5 and "policy/loss" not in row
    assert equal(before, world.weights(roles.policy))
