"""KL estimators by hand and in exact expectation over a small vocabulary; the controllers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.policy.kl import KlController, k1, k2, k3

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


# --- the controller -----------------------------------------------------------------------------------


def test_fixed_never_moves():
    controller = KlController(0.01)
    for kl in (0.0, 100.0, -3.0):
        controller.update(kl, 1024)
    assert controller.coef == 0.01


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 0.1),  # 10 % above; a tenth of the horizon
        (5.4, 1 - 0.1 * 0.1),
        (7.2, 1 + 0.2 * 0.1),  # at the clip
        (60.0, 1 + 0.2 * 0.1),  # beyond it
        (0.0, 1 - 0.2 * 0.1),
        (-5.0, 1 - 0.2 * 0.1),  # k1 may be negative
    ],
)
def test_adaptive_by_hand(kl, factor):
    controller = KlController(0.05, target=6.0, horizon=10_000)
    controller.update(kl, 1000)
    assert controller.coef == pytest.approx(0.05 * factor)


def test_adaptive_steps_multiply():
    controller = KlController(1.0, target=1.0, horizon=100)
    controller.update(2.0, 50)
    controller.update(2.0, 50)
    assert controller.coef == pytest.approx(1.1 * 1.1)


def test_the_unit_is_the_callers():
    """Only kl / target counts: per sequence or per token (20 tokens here) gives the same coefficient."""
    a_sequence, a_token = KlController(0.1, target=6.0), KlController(0.1, target=6.0 / 20)
    a_sequence.update(6.5, 256)
    a_token.update(6.5 / 20, 256)
    assert a_sequence.coef == pytest.approx(a_token.coef)
