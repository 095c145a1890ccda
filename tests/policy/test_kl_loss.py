"""The KL as a loss: its value is the estimator's, its gradient that of KL(pi, ref), in exact expectation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.policy.kl_loss import kl_loss
from rto.rewards.kl import ESTIMATORS

NAMES = pytest.mark.parametrize("name", ["k1", "k2", "k3"])
LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([1.0, 0.1, -0.5, 0.2, 0.0], dtype=torch.float64).log_softmax(-1)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of)[0]


def expected(losses_of, logits: Tensor) -> Tensor:
    """The mean over the policy's own samples, as a loss on samples has it: their probabilities are no path."""
    logp = logits.log_softmax(-1)
    return (logp.exp().detach() * losses_of(logp)).sum()


def reverse(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - REFERENCE)).sum()


def test_every_estimator_is_tested():
    assert set(ESTIMATORS) == {"k1", "k2", "k3"}


@NAMES
def test_value_is_the_estimators(name):
    logprobs, reference = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-1.2, -1.0, -30.0]])
    assert torch.equal(kl_loss(logprobs, reference, name), ESTIMATORS[name](logprobs - reference))


@NAMES
@pytest.mark.parametrize("nearness", [0.0, 1e-3, 1.0])
def test_expected_gradient_is_that_of_the_reverse_kl(name, nearness):
    logits = (REFERENCE + nearness * LOGITS).requires_grad_()
    got = gradient(expected(lambda logp: kl_loss(logp[None], REFERENCE[None], name)[0], logits), logits)
    assert_close(got, gradient(reverse(logits), logits), atol=1e-12, rtol=1e-9)


def test_the_naive_gradients_are_others():
    """k1: none at all. k3: that of the forward KL(ref, pi). Only k2 is right as it stands."""
    logits = LOGITS.clone().requires_grad_()
    naive = {
        name: gradient(expected(lambda logp, k=k: k(logp - REFERENCE), logits), logits)
        for name, k in ESTIMATORS.items()
    }
    forward = gradient((REFERENCE.exp() * (REFERENCE - logits.log_softmax(-1))).sum(), logits)
    right = gradient(reverse(logits), logits)
    assert_close(naive["k1"], torch.zeros_like(LOGITS), atol=1e-12, rtol=0)
    assert_close(naive["k2"], right)
    assert_close(naive["k3"], forward)
    assert (forward - right).abs().max() > 0.05


@NAMES
def test_the_gradient_a_token_is_the_log_ratio(name):
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0]])
    assert_close(gradient(kl_loss(logprobs, reference, name).sum(), logprobs), torch.tensor([[0.5, -1.0]]))


@NAMES
def test_extremes_are_finite(name):
    logprobs = torch.tensor([[-1e4, 0.0, -1e4, -1e3]], requires_grad=True)
    losses = kl_loss(logprobs, torch.tensor([[0.0, -1e4, -1e4, -999.0]]), name)
    assert torch.isfinite(losses).all() and torch.isfinite(gradient(losses.sum(), logprobs)).all()


def test_no_gradient_reaches_the_reference():
    logprobs, reference = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2)
    kl_loss(logprobs, reference, "k3").sum().backward()
    assert reference.grad is None and logprobs.grad is not None
