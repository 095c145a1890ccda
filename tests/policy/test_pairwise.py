"""P3O and REBEL: their gradients in closed form, their clips and their limits."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.policy import LOSSES, is_pairwise, p3o, rebel

ZERO = torch.zeros(1, dtype=torch.float64)
VERSIONS = pytest.mark.parametrize("version", ["joint", "separate"])


def pair(rho_1: float = 1.0, rho_2: float = 1.0, reward: float = 1.0, reference: float = 0.0, coef: float = 0.0):
    """One pair with these ratios to the old policy; r_1 - r_2 = reward, log pi_old - log pi_ref = reference, 0."""
    old = ZERO - 5
    return {
        "first": (old + math.log(rho_1)).requires_grad_(),
        "second": (old + math.log(rho_2)).requires_grad_(),
        "first_old": old,
        "second_old": old,
        "first_reference": old - reference,
        "second_reference": old,
        "first_reward": ZERO + reward,
        "second_reward": ZERO,
        "kl_coef": torch.tensor(coef, dtype=torch.float64),
    }


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> list[float]:
    return [g.item() for g in torch.autograd.grad(loss.sum(), [inputs["first"], inputs["second"]])]


def test_the_tables_kinds():
    assert {name for name in LOSSES if is_pairwise(LOSSES[name])} == {"p3o", "rebel"}


@VERSIONS
@pytest.mark.parametrize(("rho_1", "rho_2"), [(1.0, 1.0), (1.1, 0.95), (0.9, 0.95)])
@pytest.mark.parametrize("reward", [2.0, -2.0])
def test_p3o_gradient_identity(version, rho_1, rho_2, reward):
    """Inside every clip: -q w grad log(pi_1 / pi_2) / 2 with w = rho_1 rho_2, for both versions."""
    inputs = pair(rho_1, rho_2, reward, reference=0.4, coef=0.5)
    q = reward - 0.5 * (0.4 + math.log(rho_1 / rho_2))
    push = q * rho_1 * rho_2 / 2
    assert gradients(p3o(**inputs, version=version), inputs) == pytest.approx([-push, push])


@VERSIONS
def test_p3o_is_the_policy_gradient_of_the_penalised_reward(version):
    """All pairs of answers from a softmax, with their probabilities: the gradient of E[r] - coef KL(pi, ref)."""
    logits = torch.tensor([0.3, -1.2, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    old = logits.detach().log_softmax(-1)
    reference = torch.tensor([0.5, 0.1, -0.4, 0.2], dtype=torch.float64).log_softmax(-1)
    reward, coef = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64), 0.3
    i, j = torch.tensor(list(product(range(4), repeat=2))).unbind(-1)
    logp = logits.log_softmax(-1)
    losses = p3o(
        logp[i], logp[j], old[i], old[j], reference[i], reference[j], reward[i], reward[j],
        torch.tensor(coef), version=version,
    )  # fmt: skip
    got = torch.autograd.grad((losses * (old[i] + old[j]).exp()).sum(), logits)[0]
    logp = logits.log_softmax(-1)
    objective = (logp.exp() * (reward - coef * (logp - reference))).sum()
    assert_close(got, -torch.autograd.grad(objective, logits)[0])


@pytest.mark.parametrize(
    ("rho", "reward", "slope"),
    [
        (1.3, 1.0, 0.0),  # better and already likelier by more than the clip: e^0.2 = 1.22
        (1.3, -1.0, 0.65),  # worse and likelier: back
        (0.8, -1.0, 0.0),
        (0.8, 1.0, -0.4),
    ],
)
def test_p3o_joint_clip_holds_the_log_ratio_of_the_pair(rho, reward, slope):
    """Within D_old +- 0.2 wherever the answers stand to the reference."""
    inputs = pair(rho_1=rho, reward=reward, reference=3.0)
    assert gradients(p3o(**inputs), inputs) == pytest.approx([slope, -slope])


def test_p3o_separate_clip_holds_each_answer():
    """q = 1, rho_1 = 1.3 is beyond 1.2: no gradient; rho_2 = 1 is inside, w(rho_1) = 1.3."""
    inputs = pair(rho_1=1.3)
    loss = p3o(**inputs, version="separate")
    assert loss.item() == pytest.approx(0.5 * (-1.2 + 1.3))
    assert gradients(loss, inputs) == pytest.approx([0.0, 0.65])


@pytest.mark.parametrize(("rho", "weight"), [(50.0, 10.0), (0.01, 0.1), (3.0, 3.0)])
def test_p3o_weights_are_clipped(rho, weight):
    inputs = pair(rho_1=rho, reward=-1.0 if rho > 1 else 1.0)  # towards the clip range: its clip does not bind
    assert abs(gradients(p3o(**inputs), inputs)[0]) == pytest.approx(weight / 2)
    assert abs(gradients(p3o(**inputs, weight_clip=1.0), inputs)[0]) == pytest.approx(0.5)


def test_p3o_keeps_its_precision_on_long_answers():
    """Sums of -3000 nats in float32 have steps of 2e-4; what has not moved lies exactly inside the clip."""
    first = torch.tensor([-3000.1, -2999.7], requires_grad=True)
    second = torch.tensor([-2500.3, -1234.5], requires_grad=True)
    rewards = torch.tensor([1.0, -1.0])
    loss = p3o(first, second, first.detach(), second.detach(), first.detach() + 7, second.detach(), rewards,
               torch.zeros(2), torch.tensor(0.0), clip=1e-6)  # fmt: skip
    assert torch.autograd.grad(loss.sum(), first)[0].tolist() == [-0.5, 0.5]


def test_p3o_refuses_a_weight_clip_below_one():
    with pytest.raises(ValueError, match="policy.loss.weight_clip = 0.5 must be at least 1"):
        p3o(**pair(), weight_clip=0.5)


def test_rebel_by_the_paper():
    """eta^2 ((1/eta) (delta_1 - delta_2) - (r_1 - r_2))^2, against the old policy and not the reference."""
    inputs = pair(rho_1=1.5, rho_2=0.8, reward=2.0, reference=0.4, coef=0.5)
    delta, r = math.log(1.5 / 0.8), 2.0 - 0.5 * 0.4
    for eta in (1.0, 0.25, 4.0):
        assert rebel(**inputs, eta=eta).item() == pytest.approx(eta**2 * (delta / eta - r) ** 2)


def test_rebel_has_its_minimum_where_the_log_ratios_are_the_rewards():
    """pi = pi_old exp(eta r) / Z makes every pair's loss zero."""
    old = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64).log_softmax(-1)
    reward, eta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.7
    logp = (old + eta * reward).log_softmax(-1)
    i, j = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    losses = rebel(logp[i], logp[j], old[i], old[j], old[i], old[j], reward[i], reward[j], torch.tensor(0.1), eta=eta)
    assert_close(losses, torch.zeros(3, dtype=torch.float64))


def test_rebel_counts_the_kl_in_its_reward():
    inputs = pair(reward=1.0, reference=2.0, coef=0.25)
    assert rebel(**inputs).item() == pytest.approx((0 - (1.0 - 0.25 * 2.0)) ** 2)
