"""SFT, DPO and Bradley-Terry: numbers by hand, exact gradients, symmetries, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rto.numerics import reduce
from rto.preferences import bradley_terry, dpo, sft


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigma(z: float) -> float:
    return -math.log1p(math.exp(-z))


# --- SFT ----------------------------------------------------------------------------------------------


def test_sft_is_the_token_mean_of_minus_log_p():
    logprobs, mask = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert torch.equal(sft(logprobs), -logprobs)
    assert reduce(sft(logprobs), mask, "token", 4).item() == pytest.approx((1 + 2 + 3 + 5) / 4)


# --- DPO ----------------------------------------------------------------------------------------------

# h = (chosen - chosen_ref) - (rejected - rejected_ref): (2) - (-1) = 3;  0 - 0 = 0;  (-4) - (6) = -10
CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF = t(-10, -7, -9), t(-12, -3, -2), t(-12, -7, -5), t(-11, -3, -8)
Z = [0.3, 0.0, -1.0]  # beta = 0.1


def test_dpo_by_hand():
    expected = [math.log(1 + math.exp(-0.3)), math.log(2), math.log(1 + math.exp(1))]
    assert_close(dpo(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF), t(*expected))


def test_label_smoothing_by_hand():
    expected = [-0.8 * log_sigma(z) - 0.2 * log_sigma(-z) for z in Z]
    assert_close(dpo(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF, label_smoothing=0.2), t(*expected))


def test_label_smoothing_one_half_does_not_care_who_won():
    one_way = dpo(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF, label_smoothing=0.5)
    assert_close(one_way, dpo(REJECTED, CHOSEN, REJECTED_REF, CHOSEN_REF, label_smoothing=0.5))


def test_smoothing_equals_swapping_the_answers():
    smoothed = dpo(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF, label_smoothing=1.0)
    assert_close(smoothed, dpo(REJECTED, CHOSEN, REJECTED_REF, CHOSEN_REF))


def test_dpo_at_the_reference_is_log_2():
    assert_close(dpo(CHOSEN, REJECTED, CHOSEN, REJECTED, beta=0.7), t(1, 1, 1) * math.log(2))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_gradient_is_minus_beta_sigma_of_minus_z(beta):
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    dpo(chosen, rejected, CHOSEN_REF, REJECTED_REF, beta=beta).sum().backward()
    expected = t(*[-beta / (1 + math.exp(10 * beta * z)) for z in Z])  # h = 10 z
    assert chosen.grad is not None and rejected.grad is not None
    assert_close(chosen.grad, expected)
    assert_close(rejected.grad, -expected)


def test_dpo_depends_on_log_ratios_only():
    shifted = dpo(CHOSEN + 3, REJECTED - 4, CHOSEN_REF + 3, REJECTED_REF - 4)
    assert_close(shifted, dpo(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF))


def test_dpo_of_both_orders_differs_by_z():
    """-log sigma(z) + log sigma(-z) = -z."""
    gap = dpo(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF) - dpo(REJECTED, CHOSEN, REJECTED_REF, CHOSEN_REF)
    assert_close(gap, -t(*Z))


def test_dpo_far_out():
    """Log-probs of -1e4 and margins of +-1e3: the loss is 0 or -z, the gradient 0 or -beta."""
    chosen = torch.tensor([-1e4, -1.1e4], requires_grad=True)
    loss = dpo(chosen, torch.tensor([-1.1e4, -1e4]), torch.full((2,), -1e4), torch.full((2,), -1e4), beta=1.0)
    assert loss.tolist() == [0.0, 1000.0]
    loss.sum().backward()
    assert chosen.grad is not None and chosen.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_dpo_gradcheck(label_smoothing):
    inputs = [x.clone().requires_grad_() for x in (CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF)]
    assert torch.autograd.gradcheck(lambda *x: dpo(*x, beta=0.3, label_smoothing=label_smoothing), inputs)


# --- Bradley-Terry ------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    """Gaps 2, 0, -1."""
    loss = bradley_terry(t(3, 1, -1), t(1, 1, 0), t(9, 9, 9))  # the margin is not used
    assert_close(loss, t(math.log(1 + math.exp(-2)), math.log(2), math.log(1 + math.exp(1))))


def test_bradley_terry_with_a_margin_by_hand():
    """The margin stands inside the sigmoid: 2 - 0.5, 0 - 1, -1 - 0."""
    loss = bradley_terry(t(3, 1, -1), t(1, 1, 0), t(0.5, 1, 0), use_margin=True)
    assert_close(loss, t(*[-log_sigma(z) for z in (1.5, -1.0, -1.0)]))


def test_a_margin_of_zero_changes_nothing():
    scores = t(3, 1, -1), t(1, 1, 0), t(0, 0, 0)
    assert torch.equal(bradley_terry(*scores, use_margin=True), bradley_terry(*scores))


def test_bradley_terry_gradient():
    """-sigma(-gap) on the chosen score, +sigma(-gap) on the rejected one; a common shift has no effect."""
    chosen, rejected = t(2, -1000).requires_grad_(), t(1, 1000).requires_grad_()
    loss = bradley_terry(chosen, rejected, t(0, 0))
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert_close(chosen.grad, t(-1 / (1 + math.e), -1))
    assert_close(rejected.grad, -chosen.grad)
    assert loss[1].item() == pytest.approx(2000)
    assert_close(bradley_terry(chosen + 7, rejected + 7, t(0, 0)), loss)


@pytest.mark.parametrize("use_margin", [False, True])
def test_bradley_terry_gradcheck(use_margin):
    inputs = [t(3, 1, -1).requires_grad_(), t(1, 1, 0).requires_grad_(), t(0.5, 1, 0)]
    assert torch.autograd.gradcheck(lambda *x: bradley_terry(*x, use_margin=use_margin), inputs)


def test_dpo_is_bradley_terry_on_implicit_rewards():
    """r(y) = beta * (log pi(y) - log pi_ref(y))."""
    rewards = 0.1 * (CHOSEN - CHOSEN_REF), 0.1 * (REJECTED - REJECTED_REF)
    assert_close(dpo(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF), bradley_terry(*rewards, t(0, 0, 0)))
