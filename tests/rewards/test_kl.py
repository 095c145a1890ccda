"""KL estimators by hand and in exact expectation over a small vocabulary, and the penalty that they make."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.rewards.kl import ESTIMATORS, k1, k2, k3, kl_penalty

D = torch.tensor([0.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)


def test_by_hand():
    assert k1(D).tolist() == [0.0, 0.5, -0.5, 2.0, -2.0]
    assert k2(D).tolist() == [0.0, 0.125, 0.125, 2.0, 2.0]
    expected = [math.exp(-d) - 1 + d for d in (0.0, 0.5, -0.5, 2.0, -2.0)]
    assert k3(D).tolist() == pytest.approx(expected)


def test_k2_and_k3_are_never_negative():
    far = torch.linspace(-50, 1000, 10_001, dtype=torch.float64)
    near = torch.linspace(-1e-3, 1e-3, 1001)  # float32: a difference of nearly equal numbers
    for d in (far, near):
        assert (k2(d) >= 0).all() and (k3(d) >= -1e-9).all()
    assert k2(torch.zeros(1)) == k3(torch.zeros(1)) == 0


def test_all_three_agree_near_the_reference():
    """k3 = d^2/2 - d^3/6 + ...: close to k2 for small d."""
    d = torch.tensor([1e-3, -1e-3], dtype=torch.float64)
    assert_close(k3(d), k2(d) - d**3 / 6, atol=1e-13, rtol=0)


# --- in exact expectation -----------------------------------------------------------------------------

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([1.0, 0.1, -0.5, 0.2, 0.0], dtype=torch.float64).log_softmax(-1)


def kl_to_reference(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - REFERENCE)).sum()


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    logp = LOGITS.log_softmax(-1)
    p, d = logp.exp(), logp - REFERENCE
    kl = kl_to_reference(LOGITS)
    assert_close((p * k1(d)).sum(), kl)
    assert_close((p * k3(d)).sum(), kl)
    assert abs((p * k2(d)).sum() - kl) > 0.01


def test_k3_has_less_variance_than_k1_near_the_reference():
    logp = (REFERENCE + 0.1 * LOGITS).log_softmax(-1)
    p, d = logp.exp(), logp - REFERENCE

    def variance(k: Tensor) -> Tensor:
        return (p * k**2).sum() - (p * k).sum() ** 2

    assert variance(k3(d)) < 0.1 * variance(k1(d))


@pytest.mark.parametrize("nearness", [0.0, 1e-3, 1.0])
def test_gradients_of_sampled_estimators(nearness):
    """As a loss on samples (p fixed): k2 has the gradient of KL(pi, ref), k1 has none, k3 that of KL(ref, pi)."""
    logits = (REFERENCE + nearness * LOGITS).requires_grad_()
    logp = logits.log_softmax(-1)
    p, d = logp.exp().detach(), logp - REFERENCE

    assert_close(gradient((p * k2(d)).sum(), logits), gradient(kl_to_reference(logits), logits), atol=1e-12, rtol=1e-9)

    logp = logits.log_softmax(-1)
    assert_close(gradient((p * k1(logp - REFERENCE)).sum(), logits), torch.zeros_like(LOGITS), atol=1e-12, rtol=0)

    forward = (REFERENCE.exp() * (REFERENCE - logits.log_softmax(-1))).sum()
    logp = logits.log_softmax(-1)
    got = gradient((p * k3(logp - REFERENCE)).sum(), logits)
    assert_close(got, gradient(forward, logits), atol=1e-12, rtol=1e-9)


def test_k1_as_a_reward_gives_the_gradient_of_the_kl():
    """The score-function form that RL uses: sum p * d * grad log p, with d detached."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    p, d = logp.exp().detach(), (logp - REFERENCE).detach()
    assert_close(gradient((p * k1(d) * logp).sum(), logits), gradient(kl_to_reference(logits), logits))


# --- far away -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_extremes_are_finite(name):
    d = torch.tensor([-1e4, -1e3, -89.0, -1.0, 0.0, 89.0, 1e3, 1e4], requires_grad=True)
    value = ESTIMATORS[name](d)
    assert torch.isfinite(value).all() and torch.isfinite(torch.autograd.grad(value.sum(), d)[0]).all()


def test_k3_goes_on_as_its_tangent():
    """From -20 nats on: e^20 (1 + (-d - 20)) - 1 + d, without a jump in value or slope, and falling in d."""
    d = torch.tensor([-20.0, -21.0, -1e4], dtype=torch.float64, requires_grad=True)
    tangent = [math.exp(20) - 21, 2 * math.exp(20) - 22, math.exp(20) * (1e4 - 19) - 1 - 1e4]
    assert k3(d).tolist() == pytest.approx(tangent)
    inside = torch.tensor([-1.0, -5.0, -19.0, 0.5, 300.0], dtype=torch.float64)
    assert_close(k3(inside), torch.exp(-inside) - 1 + inside)
    assert (torch.autograd.grad(k3(d[1:]).sum(), d)[0][1:] < -1e8).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_numeric_gradient(name):
    d = torch.tensor([-3.0, -0.1, 0.0, 0.2, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ESTIMATORS[name], d)


# --- the penalty --------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
NAN = float("nan")
LOGPROBS = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, NAN, NAN], [NAN, NAN, NAN]])
SFT = torch.tensor([[-1.5, -1.0, -3.0], [-4.0, NAN, NAN], [NAN, NAN, NAN]])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [[0.5, -1.0, 0.0], [2.0, 0, 0], [0, 0, 0]]),
        ("k2", [[0.125, 0.5, 0.0], [2.0, 0, 0], [0, 0, 0]]),
        ("k3", [[math.exp(-0.5) - 0.5, math.e - 2, 0.0], [math.exp(-2) + 1, 0, 0], [0, 0, 0]]),
    ],
)
def test_penalty_by_hand(estimator, expected):
    assert_close(kl_penalty(LOGPROBS, SFT, MASK, 0.01, estimator), -0.01 * torch.tensor(expected))


def test_penalty_is_k1_unless_told_otherwise():
    assert torch.equal(kl_penalty(LOGPROBS, SFT, MASK, 0.3), kl_penalty(LOGPROBS, SFT, MASK, 0.3, "k1"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_penalty(estimator):
    assert (kl_penalty(LOGPROBS, SFT, MASK, 0.0, estimator) == 0).all()
    assert (kl_penalty(LOGPROBS, LOGPROBS, MASK, 5.0, estimator) == 0).all()
