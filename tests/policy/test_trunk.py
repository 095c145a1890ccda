"""A critic that is a head on the policy's trunk: one pass, the gradients of two, the rest as with one of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rto import rewards
from rto.config import Critic, Lora
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.trunk import TrunkCritic
from rto.models.workshop import Workshop
from rto.numerics import reduce
from rto.optim import Optimizer
from rto.policy.ppo import ppo
from rto.policy.train import _advantages
from rto.policy.update import Buffer, Learner, update
from rto.policy.value import value_loss
from rto.recipe import build

TERMINAL = {"type": "terminal", "scale": 1.0, "clip": 10.0}


class Kept(Optimizer):
    """Keeps the gradient of each step, as it is before clipping."""

    def step(self) -> tuple[float, float]:
        self.gradients = [p.grad.clone() for p in self.parameters]
        return super().step()


@pytest.fixture(params=["full", "lora"])
def kind(request, world):
    """The world around full models, and around adapters on one backbone."""
    if request.param == "full":
        return world
    other, shop = copy.copy(world), world.shop
    model = shop.model.model_copy(update={"lora": Lora(r=2)})
    other.shop = Workshop(model, shop.base, shop.tokenizer, world.runtime, 0)
    return other


def roles_of(kind, trunk: str, seed: int = 0):
    """The policy has moved off the reference, and the head is not small."""
    roles = kind.roles()
    kind.moved(roles.policy, "policy", 0.1)
    roles.critic = kind.moved(TrunkCritic(roles.policy, seed, detached=trunk == "detached"), "head", 0.5)
    return roles


def settings(world, trunk: str, **changes):
    critic = {"lr": 1e-3, "trunk": trunk, **({"coef": 0.7} if trunk == "policy" else {}), **changes.pop("critic", {})}
    return world.settings(critic=critic, **changes)


def learner_of(roles, config, of=Optimizer) -> Learner:
    return Learner(
        roles.policy,
        of(roles.policy.parameters(), config, config.lr, 8),
        Budget(config.micro_tokens, print),
        roles.critic,
        of(roles.critic.parameters(), config, config.critic.lr, 8),
    )


def buffer_of(world, roles, config) -> Buffer:
    drawn = world.draw(roles, config, [TERMINAL])
    total, parts = rewards.total([TERMINAL], drawn.signals, 0.0)
    advantages, returns = _advantages(config, total, parts["kl"], drawn)
    s, number = drawn.signals, torch.arange(len(drawn.asked))
    given = (drawn.completions, s.logprobs, s.reference, drawn.values, advantages, returns, total.sum(-1))
    return Buffer(*given, drawn.group, number)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def weights(roles) -> list[torch.Tensor]:
    return [p.detach().clone() for p in [*roles.policy.parameters(), *roles.critic.parameters()]]


@contextmanager
def counted(role: Role) -> Iterator[list[int]]:
    """Rows of each pass of the role's backbone."""
    passes: list[int] = []
    hook = role.backbone.body.register_forward_pre_hook(
        lambda module, given, named: passes.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    yield passes
    hook.remove()


# --- gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("trunk", ["policy", "detached"])
def test_one_pass_has_the_gradients_of_two(kind, trunk, reduction):
    """grad(policy loss) + coef * grad(value loss) on the trunk, the second part not where the head is detached."""
    buffer = buffer_of(kind, roles_of(kind, trunk), settings(kind, trunk))
    c, total = buffer.completions, float(buffer.completions.mask.sum() if reduction == "token" else len(buffer))
    plain = roles_of(kind, trunk)
    apart = Role(plain.policy.backbone, plain.policy.adapter, plain.critic.head)
    for parameter in [*plain.policy.parameters(), *plain.critic.parameters()]:
        parameter.requires_grad_(True)

    def gradients(loss: torch.Tensor, parameters) -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        loss.backward(retain_graph=True)
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    logprobs, _ = plain.policy.logprobs(c)
    policy_loss = reduce(ppo(logprobs, logprobs.detach(), buffer.advantages), c.mask, reduction, total)
    of_policy = gradients(policy_loss, plain.policy.parameters())
    values_loss = reduce(value_loss(apart.values(c), buffer.values, buffer.returns), c.mask, reduction, total)
    of_values = gradients(values_loss, [*plain.policy.parameters(), *plain.critic.parameters()])
    weight = 0.7 if trunk == "policy" else 1.0
    *on_trunk, on_head = [weight * g for g in of_values]
    expected = [p + v if trunk == "policy" else p for p, v in zip(of_policy, on_trunk, strict=True)]
    assert max(g.abs().max().item() for g in on_trunk) > 1e-2 < max(g.abs().max().item() for g in of_policy)

    for micro_tokens in (1_000_000, 1):
        config = settings(kind, trunk, reduction=reduction, micro_tokens=micro_tokens)
        roles = roles_of(kind, trunk)
        learner = learner_of(roles, config, Kept)
        metrics = update(learner, buffer, config, 0.0, 0, 0, kind.runtime)
        assert_close(learner.policy_optimizer.gradients, expected, atol=1e-5, rtol=1e-5)
        assert_close(learner.critic_optimizer.gradients, [on_head], atol=1e-5, rtol=1e-5)
        assert metrics["policy/loss"] == pytest.approx(policy_loss.item(), abs=1e-5)
        assert metrics["value/loss"] == pytest.approx(values_loss.item(), abs=1e-5)
        assert metrics["value/grad_norm"] == pytest.approx(on_head.norm().item(), rel=1e-4)


@pytest.mark.parametrize("trunk", ["policy", "detached"])
def test_log_probs_are_tempered_as_the_policys_own(world, trunk):
    roles = roles_of(world, trunk)
    c = buffer_of(world, roles, settings(world, trunk)).completions
    found, entropy, _ = roles.critic.logprobs_and_values(c, 0.6)
    expected, of_policy = roles.policy.logprobs(c, 0.6)
    assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert_close(entropy, of_policy, atol=1e-6, rtol=1e-5)
    assert (found - roles.policy.logprobs(c)[0])[c.mask].abs().max() > 1e-2


@pytest.mark.parametrize("trunk", ["policy", "detached"])
def test_the_value_clip_holds(world, trunk):
    """Values that have moved by 1 since the rollout."""
    config, roles = settings(world, trunk), roles_of(world, trunk)
    buffer = buffer_of(world, roles, config)
    now, mask = roles.critic.values(buffer.completions).detach(), buffer.completions.mask
    old = torch.where(mask, now - 1.0, 0.0)
    metrics = update(
        learner_of(roles, config), replace(buffer, values=old), config, 0.0, 0, 0,
        world.runtime,
    )  # fmt: skip
    held = torch.maximum((now - buffer.returns) ** 2, (old + 0.2 - buffer.returns) ** 2)
    assert metrics["value/loss"] == pytest.approx(reduce(0.5 * held, mask, "sequence", 8.0).item(), rel=1e-4)


# --- passes -------------------------------------------------------------------------------------------


def test_values_come_with_the_answers(kind):
    """No pass is made for them, and they are those of a pass."""
    config, roles = settings(kind, "policy"), roles_of(kind, "policy")
    alone = kind.roles(policy=roles.policy, critic=None)
    with counted(roles.policy) as without:
        kind.draw(alone, kind.settings(advantage={"type": "reinforce"}), [TERMINAL])
    with counted(roles.policy) as passes:
        drawn = kind.draw(roles, config, [TERMINAL])
    assert passes == without
    with torch.no_grad():
        assert_close(drawn.values, roles.critic.values(drawn.completions), atol=1e-5, rtol=1e-5)
    assert drawn.values[drawn.completions.mask].std() > 1e-2
    assert (drawn.values[~drawn.completions.mask] == 0).all()


@pytest.mark.parametrize("micro_tokens", [1_000_000, 1])
def test_an_update_makes_one_pass_a_micro_batch(kind, micro_tokens):
    config = settings(kind, "policy", rollouts=8, batch=4, updates=2, micro_tokens=micro_tokens)
    roles = roles_of(kind, "policy")
    buffer = buffer_of(kind, roles, config)
    with counted(roles.policy) as passes:
        update(learner_of(roles, config), buffer, config, 0.0, 0, 0, kind.runtime)
    assert passes == ([4] * 4 if micro_tokens > 1 else [1] * 16)


def test_in_its_warm_up_only_the_head_learns(kind, tmp_path):
    config = settings(kind, "policy", critic={"warmup": 1}, batch=4, max_steps=2)
    roles, seen = roles_of(kind, "policy"), []

    def look(asked, completions) -> list[float]:  # before each update
        assert all(p.grad is None for p in roles.policy.parameters())
        seen.append((kind.weights(roles.policy), kind.weights(roles.critic)))
        return [0.0] * len(asked)

    rows = kind.run(tmp_path, roles, config, [TERMINAL], oracle=look)
    look([], None)
    (first, head), (second, warm), (third, last) = seen
    assert equal(first, second) and not equal(head, warm)
    assert not equal(second, third) and not equal(warm, last)
    assert ["policy/loss" in row for row in rows] == [False, True]
    assert all({"value/loss", "value/grad_norm", "value/explained_variance"} <= set(row) for row in rows)


def test_the_trunk_has_no_gradient_while_the_head_warms_up(kind):
    config = settings(kind, "policy", critic={"warmup": 1})
    roles = roles_of(kind, "policy")
    learner = learner_of(roles, config, Kept)
    update(learner, buffer_of(kind, roles, config), config, 0.0, 0, 0, kind.runtime)
    assert not hasattr(learner.policy_optimizer, "gradients")  # took no step
    assert all(p.grad is None for p in roles.policy.parameters())


# --- what else must hold ------------------------------------------------------------------------------


def test_the_head_alone_is_the_critics(kind):
    policy = kind.roles().policy
    before = set(policy.backbone.network.state_dict())
    critic, again, other = (TrunkCritic(policy, seed, detached=False) for seed in (3, 3, 4))
    assert [p.shape for p in critic.parameters()] == [(1, 16)]
    assert torch.equal(critic.head.weight, again.head.weight) and not torch.equal(critic.head.weight, other.head.weight)
    assert set(policy.backbone.network.state_dict()) == before  # saving the policy saves no head
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in critic.parameters()}


@pytest.mark.parametrize("guilty", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_leaves_both_out(kind, guilty):
    """The policy's alone, or the head's alone: neither moves, and the role is named."""
    config, roles, met = settings(kind, "policy"), roles_of(kind, "policy"), []
    buffer = buffer_of(kind, roles, config)
    learner, before = learner_of(roles, config), weights(roles)
    broken = getattr(roles, guilty).parameters()[-1]
    hook = broken.register_hook(lambda gradient: gradient * math.nan)
    metrics = update(learner, buffer, config, 0.0, 0, 0, kind.runtime, met.append)
    hook.remove()
    assert metrics.keys() == {"skipped", "value/explained_variance"} and metrics["skipped"] == 1.0
    assert [(error.culprit.role, error.culprit.quantity) for error in met] == [(guilty, "gradient norm")]
    assert met[0].culprit.row is not None and met[0].culprit.bad == 8
    assert equal(before, weights(roles))
    assert learner.policy_optimizer.step_count == learner.critic_optimizer.step_count == 0
    assert all(p.grad is None for p in [*roles.policy.parameters(), *roles.critic.parameters()])
    update(learner, buffer, config, 0.0, 0, 0, kind.runtime)
    assert not equal(before, weights(roles))


@pytest.mark.parametrize(("role", "quantity"), [("policy", "log-prob"), ("critic", "value")])
def test_a_number_that_is_not_finite_is_named_by_role_row_and_token(world, monkeypatch, role, quantity):
    config, roles, met = settings(world, "policy", micro_tokens=1), roles_of(world, "policy"), []
    buffer, plain = buffer_of(world, roles, config), TrunkCritic.logprobs_and_values
    wanted = buffer.completions.ids[5][buffer.completions.mask[5]]

    def wrong(critic, completions, temperature=1.0):
        logprobs, entropy, values = plain(critic, completions, temperature)
        if torch.equal(completions.ids[0][completions.mask[0]], wanted):
            (logprobs if role == "policy" else values)[0, 0] = math.nan
        return logprobs, entropy, values

    monkeypatch.setattr(TrunkCritic, "logprobs_and_values", wrong)
    before = weights(roles)
    update(learner_of(roles, config), buffer, config, 0.0, 0, 0, world.runtime, met.append)
    found = met[0].culprit
    assert (found.role, found.quantity, found.row, found.token) == (role, quantity, 5, 0)
    assert equal(before, weights(roles))


def test_values_at_rollout_that_are_not_finite_are_the_critics(world, tmp_path):
    roles = roles_of(world, "policy")
    with torch.no_grad():
        roles.critic.head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"^the value of the critic is nan \(data row .*, answer, token 0, "):
        world.run(tmp_path, roles, settings(world, "policy"), [TERMINAL])


@pytest.mark.parametrize("ptx", [0.0, 0.5])
def test_short_of_memory_it_goes_on_with_smaller_micro_batches(world, tmp_path, monkeypatch, ptx):
    config, found, plain = settings(world, "policy", updates=2, ptx=ptx), [], TrunkCritic.logprobs_and_values

    def scarce(critic, completions, temperature=1.0):
        if len(completions) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(critic, completions, temperature)

    for method in (plain, scarce):
        monkeypatch.setattr(TrunkCritic, "logprobs_and_values", method)
        roles = roles_of(world, "policy")
        more = {"demonstrations": world.answers} if ptx else {}
        rows = world.run(tmp_path / method.__name__, roles, config, [TERMINAL], **more)
        found.append((rows, weights(roles)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        variance = "value/explained_variance"  # of -59
        assert other.pop(variance) == pytest.approx(one.pop(variance), rel=1e-5)
        assert other == pytest.approx(one, abs=1e-4)
    assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)


def test_detached_it_trains_the_policy_of_a_critic_that_never_moves_it(kind, tmp_path):
    """With lr 0 for nothing but the head, the first iteration's policy does not depend on ``trunk``'s head."""
    found = []
    for lr in (1e-3, 1e-9):
        roles = roles_of(kind, "detached")
        kind.run(
            tmp_path / str(lr), roles, settings(kind, "detached", critic={"lr": lr}, updates=2, max_steps=1), [TERMINAL]
        )
        found.append((kind.weights(roles.policy), kind.weights(roles.critic)))
    assert equal(found[0][0], found[1][0]) and not equal(found[0][1], found[1][1])


# --- the keys -----------------------------------------------------------------------------------------


def test_the_weight_of_the_value_loss():
    assert Critic().weight == Critic(trunk="detached").weight == 1.0
    assert (Critic(trunk="policy").weight, Critic(trunk="policy", coef=0.5).weight) == (0.1, 0.5)
    for critic in (Critic(), Critic(init="reference"), Critic(trunk="policy", coef=0.5), Critic(trunk="detached")):
        assert Critic.model_validate(critic.model_dump()) == critic  # a run reads its own config.json


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"trunk": "policy", "init": "scorer"},
            "init = 'scorer' is for trunk = 'own': on trunk = 'policy' the head is",
        ),
        ({"trunk": "detached", "init": "reference"}, "init = 'reference' is for trunk = 'own': on trunk = 'detached'"),
        ({"trunk": "detached", "coef": 0.1}, "coef = 0.1 is for trunk = 'policy', where the value loss also trains"),
        ({"coef": 0.5}, "trunk is 'own': leave it out, or set it to 'none' where it is inherited"),
        ({"trunk": "policy", "coef": 0.0}, "coef\n  Input should be greater than 0"),
        ({"trunk": "shared"}, "trunk\n  Input should be 'own', 'policy' or 'detached'"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, said):
    with pytest.raises(ValueError) as error:
        Critic.model_validate(keys)
    assert said in str(error.value)


def test_a_baseline_that_inherits_init_says_none():
    table = {"model": {"name": "x"}, "data": {"pairs": "p.jsonl"}, "policy": {"critic": {"init": "scorer"}}}
    with pytest.raises(ValueError, match=r"in \[baselines.one\]: critic: init = 'scorer' is for trunk = 'own'"):
        build(table | {"baselines": {"one": {"critic": {"trunk": "policy"}}}})
    config = build(table | {"baselines": {"one": {"critic": {"trunk": "policy", "init": "none"}}}})
    assert config.policies()["one"].critic == Critic(trunk="policy")
