"""What the RL loop can do beside PPO, on the tiny world: identities of methods, KL as a loss, a moving
reference, critic warm-up, the PTX mix, scaling and clipping."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from torch.testing import assert_close

from rto import rewards
from rto.config import Lora
from rto.models.checkpoint import ScorerNotes
from rto.models.memory import Budget
from rto.models.workshop import Workshop
from rto.numerics import reduce
from rto.optim import Optimizer
from rto.policy.kl_loss import kl_loss
from rto.policy.train import _advantages
from rto.policy.update import Buffer, Learner, update
from rto.preferences.objectives import SftObjective
from rto.preferences.rounds import copy_weights
from rto.rewards import METHODS
from rto.rewards.normaliser import Normaliser
from rto.seeds import shuffled

TERMINAL = {"type": "terminal", "scale": 1.0, "clip": 10.0}
IMPLICIT = {"type": "implicit", "scale": 0.05, "clip": 0.05}
REINFORCE, NO_KL = {"type": "reinforce"}, {"coef": 0.0}
NOTES = ScorerNotes(mean=0.2, std=0.5, accuracy=1.0, pairs=4)
LINES = Normaliser(w_mu=0.1, b_mu=0.2, w_sigma=0.3, b_sigma=1.0, floor=0.1)


class Kept(Optimizer):
    """Keeps the gradient of each step, as it is before clipping."""

    def step(self) -> tuple[float, float]:
        self.gradients = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        return super().step()


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def buffer_of(world, roles, config, terms=(TERMINAL,)) -> Buffer:
    drawn = world.draw(roles, config, list(terms))
    total, parts = rewards.total(list(terms), drawn.signals, 0.0)
    advantages, returns = _advantages(config, total, parts["kl"], drawn)
    s = drawn.signals
    return Buffer(
        drawn.completions,
        s.logprobs,
        s.reference,
        drawn.values,
        advantages,
        returns,
        total.sum(-1),
        drawn.group,
        torch.arange(len(drawn.asked)),
    )


def gradient(world, roles, buffer, config, kl_coef: float = 0.0, **more):
    """The policy's gradient in the one minibatch of an update, and the metrics."""
    optimizer = Kept(roles.policy.parameters(), config, config.lr, 8)
    budget = Budget(config.micro_tokens, print)
    metrics = update(Learner(roles.policy, optimizer, budget, **more), buffer, config, kl_coef, 0, 0, world.runtime)
    return optimizer.gradients, metrics


# --- methods that are one -----------------------------------------------------------------------------


def test_token_ppo_is_segment_ppo_with_cutoff_0_to_the_bit(world, tmp_path):
    """And, since no entropy is below it, with a cutoff of 1e-6; then no layout matters."""
    found = []
    for method, cutoff, layout in (("token-ppo", 0.0, {}), ("segment-ppo", 0.0, {}), ("segment-ppo", 1e-6, "last")):
        terms = [term | ({"layout": layout} if layout else {}) for term in METHODS[method]]
        roles = world.roles(cutoff=cutoff, notes=NOTES, normaliser=LINES)
        rows = world.run(tmp_path / f"{len(found)}", roles, world.settings(batch=4), terms)
        found.append((rows, world.weights(roles.policy) + world.weights(roles.critic)))
    assert found[0][0] == found[1][0] == found[2][0]
    assert equal(found[0][1], found[1][1]) and equal(found[0][1], found[2][1])
    other = world.run(tmp_path / "other", world.roles(cutoff=1.0), world.settings(batch=4), METHODS["segment-ppo"])
    assert other[0]["length"] == found[0][0][0]["length"] and other[0] != found[0][0][0]


def test_bandit_ppo_is_ppo_to_the_bit(world, tmp_path):
    found = []
    for method in ("bandit-ppo", "ppo"):
        roles = world.roles(notes=NOTES)
        rows = world.run(tmp_path / method, roles, world.settings(batch=4), METHODS[method])
        same = [{key.replace("segment", "terminal"): value for key, value in row.items()} for row in rows]
        found.append((same, world.weights(roles.policy) + world.weights(roles.critic)))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])


# --- the KL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_as_a_loss_adds_its_gradient(world, estimator, reduction):
    """gradient(policy loss + coef * KL) = gradient(policy loss) + coef * gradient(KL)."""
    far = {"reference": world.moved(world.shop.reference(), "reference", 0.2)}
    config = world.settings(kl={"place": "loss", "estimator": estimator}, reduction=reduction)
    roles = world.roles(**far)
    buffer = buffer_of(world, roles, config)
    both, metrics = gradient(world, roles, buffer, config, kl_coef=0.3)
    plain, without = gradient(world, world.roles(), buffer, world.settings(reduction=reduction), kl_coef=0.3)

    policy = world.roles().policy
    c = buffer.completions
    losses = kl_loss(policy.logprobs(c)[0], buffer.reference, estimator)
    total = float(c.mask.sum() if reduction == "token" else len(buffer))
    value = reduce(losses, c.mask, reduction, total)
    value.backward()
    assert metrics["policy/loss"] - without["policy/loss"] == pytest.approx(0.3 * value.item(), abs=1e-5)
    for one, other, p in zip(both, plain, policy.parameters(), strict=True):
        assert_close(one - other, 0.3 * p.grad, atol=1e-5, rtol=1e-3)
    assert max(p.grad.abs().max().item() for p in policy.parameters()) > 1e-2


def test_kl_as_a_loss_is_no_reward(world, tmp_path):
    far = {"reference": world.moved(world.shop.reference(), "reference", 0.2)}
    rows = {}
    for place in ("loss", "reward"):
        config = world.settings(kl={"coef": 0.1, "place": place}, max_steps=1)
        rows[place] = world.run(tmp_path / place, world.roles(**far), config, [TERMINAL])[0]
    assert rows["loss"]["reward/kl"] == rows["loss"]["reward_share/kl"] == 0.0
    assert rows["loss"]["kl"] == rows["reward"]["kl"] > 0
    assert rows["loss"]["kl_coef"] == 0.1
    assert rows["loss"]["reward/total"] == pytest.approx(rows["loss"]["reward/terminal"])
    assert rows["reward"]["reward/kl"] == pytest.approx(-0.1 * rows["reward"]["kl"], rel=1e-5)


def test_the_moving_reference_follows_the_policy(world, tmp_path):
    """After each iteration: ema * itself + (1 - ema) * policy. ``oracle`` is called once an iteration, after it."""
    config = world.settings(kl={"ema": 0.75}, lr=1e-2, max_steps=3)
    moving = world.moved(world.roles().policy, "moving", 0.1)
    roles, seen = world.roles(moving=moving), []

    def look(asked, completions) -> list[float]:  # before each update
        seen.append((world.weights(roles.policy), world.weights(moving)))
        return [0.0] * len(asked)

    world.run(tmp_path, roles, config, [TERMINAL], oracle=look)
    look([], None)
    assert len(seen) == 4
    for (_, before), (policy, after) in zip(seen, seen[1:], strict=False):
        for slow, fast, result in zip(before, policy, after, strict=True):
            assert_close(result, 0.75 * slow + 0.25 * fast, atol=1e-6, rtol=0)
    assert not equal(seen[1][0], seen[3][0])


def test_kl_is_taken_against_the_moving_reference_and_implicit_against_the_frozen_one(world, tmp_path):
    moving = world.moved(world.roles().policy, "moving", 0.1)
    roles, config = world.roles(moving=moving), world.settings(kl={"ema": 0.5, "coef": 0.1}, max_steps=1)
    drawn = world.draw(roles, config, [IMPLICIT])
    signals, c = drawn.signals, drawn.completions
    follows = moving.logprobs(c)[0].detach()
    frozen, guide = roles.reference.logprobs(c)[0].detach(), roles.guide.logprobs(c)[0].detach()
    _, parts = rewards.total([IMPLICIT], signals, 0.1)
    assert_close(parts["kl"], -0.1 * (signals.logprobs - follows), atol=1e-5, rtol=0)
    assert_close(parts["implicit"], (0.05 * (guide - frozen)).clamp(-0.05, 0.05), atol=1e-5, rtol=0)
    row = world.run(tmp_path, roles, config, [IMPLICIT])[0]
    expected = -0.1 * (signals.logprobs - follows).sum(-1).mean().item()
    assert row["reward/kl"] == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-2
    assert row["kl"] == pytest.approx(0.0, abs=1e-4)  # the logged KL is that to the frozen one: still the policy


def test_the_moving_reference_is_an_adapter_among_others(world, tmp_path):
    """One backbone with LoRA: the moving one follows the policy, and base, guide and scorer stay as they are."""
    lora, shop = copy.copy(world), world.shop
    model = shop.model.model_copy(update={"lora": Lora(r=2)})
    lora.shop = Workshop(model, shop.base, shop.tokenizer, world.runtime, 0)
    roles = lora.roles(cutoff=1.0, normaliser=LINES)
    roles.moving = lora.shop.new_policy("moving")
    copy_weights(roles.policy, roles.moving)
    c = world.draw(world.roles(), world.settings(), [IMPLICIT]).completions
    seen = []

    def look(asked, completions) -> list[float]:
        seen.append((lora.weights(roles.policy), lora.weights(roles.moving)))
        return [0.0] * len(asked)

    def still() -> list[torch.Tensor]:
        return [roles.reference.logprobs(c)[0], roles.guide.logprobs(c)[0], roles.scorer.token_scores(c)]

    look([], None)
    with torch.no_grad():
        before = still()
        config = world.settings(kl={"ema": 0.75, "coef": 0.1}, lr=3e-2, batch=4)
    rows = lora.run(tmp_path, roles, config, [IMPLICIT, *METHODS["segment-ppo"]], oracle=look)
    with torch.no_grad():
        assert equal(before, still())
    for (_, slow), (fast, result) in zip(seen, seen[1:], strict=False):
        for a, b, found in zip(slow, fast, result, strict=True):
            assert_close(found, 0.75 * a + 0.25 * b, atol=1e-6, rtol=0)
    assert not equal(seen[0][1], seen[2][1])
    assert rows[0]["reward/kl"] == pytest.approx(0.0, abs=1e-5) == rows[0]["kl"]
    assert abs(rows[1]["reward/kl"]) > 1e-4 and rows[1]["reward/kl"] != pytest.approx(-0.1 * rows[1]["kl"], rel=1e-3)


# --- critic -------------------------------------------------------------------------------------------


def test_in_its_warm_up_the_critic_learns_alone(world, tmp_path):
    config = world.settings(critic={"warmup": 2}, max_steps=3, batch=2, schedule="linear", floor=0.0, warmup=0.0)
    roles, seen = world.roles(), []

    def look(asked, completions) -> list[float]:  # before each update
        seen.append((world.weights(roles.policy), world.weights(roles.critic)))
        return [0.0] * len(asked)

    rows = world.run(tmp_path, roles, config, [TERMINAL], oracle=look)
    look([], None)
    policies, critics = zip(*seen, strict=True)
    assert equal(policies[0], policies[1]) and equal(policies[0], policies[2]) and not equal(policies[2], policies[3])
    assert not any(equal(a, b) for a, b in zip(critics, critics[1:], strict=False))
    assert ["policy/loss" in row for row in rows] == [False, False, True]
    assert all("value/loss" in row for row in rows)
    # The policy's schedule is over the four steps that it takes.
    assert rows[2]["policy/lr"] == pytest.approx(1e-3 * statistics.mean([1, 0.75, 0.5, 0.25]))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_clip(world, clip):
    config = world.settings(critic={"clip": clip, "lr": 1e-3})
    roles = world.roles()
    buffer = buffer_of(world, roles, config)
    now = roles.critic.values(buffer.completions).detach()
    mask, old = buffer.completions.mask, torch.where(buffer.completions.mask, now - 1.0, 0.0)  # it has moved by 1
    shifted = Buffer(**{**buffer.__dict__, "values": old})
    learner = Learner(
        roles.policy,
        Optimizer(roles.policy.parameters(), config, config.lr, 8),
        Budget(config.micro_tokens, print),
        roles.critic,
        Optimizer(roles.critic.parameters(), config, config.critic.lr, 8),
    )
    metrics = update(learner, shifted, config, 0.0, 0, 0, world.runtime)
    free, held = 0.5 * (now - buffer.returns) ** 2, 0.5 * (old + 0.2 - buffer.returns) ** 2
    losses = {None: free, 0.2: torch.maximum(free, held)}
    by_hand = {key: reduce(x, mask, "sequence", 8.0).item() for key, x in losses.items()}
    assert metrics["value/loss"] == pytest.approx(by_hand[clip], rel=1e-4)
    assert abs(by_hand[None] - by_hand[0.2]) > 1e-2


# --- the PTX mix --------------------------------------------------------------------------------------


def test_ptx_adds_its_share_of_the_sft_gradient(world):
    roles = world.roles()
    buffer = buffer_of(world, roles, world.settings(ptx=0.3))
    found = {}
    for micro in (1, 1_000_000):
        config = world.settings(ptx=0.3, micro_tokens=micro)
        found[micro] = gradient(world, world.roles(), buffer, config, demonstrations=world.answers)
    plain, without = gradient(world, world.roles(), buffer, world.settings())
    assert "policy/ptx_loss" not in without

    policy = world.roles().policy
    batch = [world.answers[i] for i in shuffled(64, 0, "ptx", 0, 0, 0)[:8]]
    loss, _ = SftObjective(policy, 0).loss(batch, float(sum(len(row.answer) for row in batch)))
    loss.backward()
    for both, metrics in found.values():
        assert metrics["policy/ptx_loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert metrics["policy/loss"] == pytest.approx(without["policy/loss"], abs=1e-5)
        for one, other, p in zip(both, plain, policy.parameters(), strict=True):
            assert_close(one - other, 0.3 * p.grad, atol=1e-5, rtol=1e-3)
    assert max(p.grad.abs().max().item() for p in policy.parameters()) > 1e-2


def test_each_step_mixes_in_other_demonstrations(world, tmp_path):
    config = world.settings(ptx=0.1, lr=1e-9, batch=4, rollouts=8, updates=2, max_steps=1)
    shown = {tuple(shuffled(64, 0, "ptx", 0, epoch, start)[:4]) for epoch in (0, 1) for start in (0, 4)}
    assert len(shown) == 4
    row = world.run(tmp_path, world.roles(), config, [TERMINAL], demonstrations=world.answers)[0]
    policy = world.roles().policy
    losses = []
    for index in shown:
        batch = [world.answers[i] for i in index]
        losses.append(SftObjective(policy, 0).loss(batch, float(sum(len(a.answer) for a in batch)))[0].item())
    assert row["policy/ptx_loss"] == pytest.approx(sum(losses) / 4, abs=1e-4)


# --- scaling and clipping -----------------------------------------------------------------------------

FIRST, SECOND = [1.0, -2.0, 3.0, 0.0, 5.0, 1.0, -1.0, 9.0], [2.0 * i for i in range(8)]


@pytest.mark.parametrize("mode", [None, "std", "standardize"])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_rewards_are_scaled_by_running_moments_then_clipped(world, tmp_path, scores, mode, clip):
    """The second iteration knows the rewards of both; a batch counts before it is scaled."""
    body = f"k = score.__dict__; k['n'] = k.get('n', 0) + 1; return {FIRST} if k['n'] == 1 else {SECOND}"
    config = world.settings(
        reward_scaling=mode, reward_clip=clip, advantage=REINFORCE, kl=NO_KL, whiten=False, max_steps=2
    )
    rows = world.run(tmp_path / "run", world.roles(), config, scores(body))
    for row, given, known in zip(rows, (FIRST, SECOND), (FIRST, FIRST + SECOND), strict=True):
        std = statistics.stdev(known) if mode is not None else 1.0
        mean = statistics.mean(known) if mode == "standardize" else 0.0
        scaled = [(r - mean) / std for r in given]
        held = [r if clip is None else min(max(r, -clip), clip) for r in scaled]
        assert row["reward/total"] == pytest.approx(statistics.mean(held), abs=1e-5)
        assert row["reward/function"] == pytest.approx(statistics.mean(given))  # a term's own part stays as it is


def test_kl_is_neither_scaled_nor_clipped(world, tmp_path, scores):
    far = {"reference": world.moved(world.shop.reference(), "reference", 0.2)}
    config = world.settings(reward_scaling="std", reward_clip=0.1, kl={"coef": 2.0}, advantage=REINFORCE, max_steps=1)
    row = world.run(tmp_path / "run", world.roles(**far), config, scores(f"return {FIRST}"))[0]
    held = [min(max(r / statistics.stdev(FIRST), -0.1), 0.1) for r in FIRST]
    assert row["reward/kl"] == pytest.approx(-2.0 * row["kl"], rel=1e-5)
    assert row["reward/total"] == pytest.approx(statistics.mean(held) + row["reward/kl"], rel=1e-5)


def test_advantages_are_clipped_after_they_are_whitened(world, scores):
    config = world.settings(advantage=REINFORCE, whiten=True, advantage_clip=0.7)
    terms = scores(f"return {FIRST}")
    drawn = world.draw(world.roles(), config, terms)
    total, parts = rewards.total(terms, drawn.signals, 0.0)
    advantages, returns = _advantages(config, total, parts["kl"], drawn)
    mask = drawn.signals.mask
    every = torch.where(mask, torch.tensor(FIRST)[:, None], 0.0)  # the reward-to-go: all of it, at every token
    inside = every[mask]
    by_hand = ((inside - inside.mean()) / inside.std(correction=0)).clamp(-0.7, 0.7)
    assert_close(advantages[mask], by_hand, atol=1e-5, rtol=0)
    assert (advantages[~mask] == 0).all() and torch.equal(returns, every)
    assert (by_hand.abs() == 0.7).any() and (by_hand.abs() < 0.7).any()
