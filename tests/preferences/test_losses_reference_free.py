"""Pairwise losses without a reference: SimPO, ORPO, CPO, MPO."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rto.preferences import cpo, dpo, mpo, orpo, simpo


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigma(z: float) -> float:
    return -math.log1p(math.exp(-z))


# A token: -2.5, -3.5, -9 and -6, -1.5, -2.
CHOSEN, REJECTED = t(-10, -7, -9), t(-12, -3, -2)
LENGTHS = t(4, 2, 1), t(2, 2, 1)
ONES, ZEROS = t(1, 1, 1), t(0, 0, 0)


# --- SimPO --------------------------------------------------------------------------------------------


def test_simpo_by_hand():
    """2 * (3.5, -2, -7) - 1."""
    loss = simpo(CHOSEN, REJECTED, *LENGTHS, beta=2.0, gamma=1.0)
    assert_close(loss, t(*[-log_sigma(z) for z in (6, -5, -15)]))


def test_simpo_by_ratio_is_simpo_by_gamma():
    by_ratio = simpo(CHOSEN, REJECTED, *LENGTHS, beta=2.5, gamma=None, ratio=0.2)
    assert_close(by_ratio, simpo(CHOSEN, REJECTED, *LENGTHS, beta=2.5, gamma=0.5))
    none = simpo(CHOSEN, REJECTED, *LENGTHS, gamma=None, ratio=0.0)
    assert_close(none, simpo(CHOSEN, REJECTED, *LENGTHS, gamma=0.0))


@pytest.mark.parametrize("both", [{"ratio": 0.2}, {"gamma": None}])
def test_simpo_needs_gamma_or_ratio(both):
    with pytest.raises(ValueError, match="simpo needs one of them"):
        simpo(CHOSEN, REJECTED, *LENGTHS, **both)


def test_simpo_does_not_see_length_at_equal_log_probs_a_token():
    longer = simpo(10 * CHOSEN, REJECTED, 10 * LENGTHS[0], LENGTHS[1])
    assert_close(longer, simpo(CHOSEN, REJECTED, *LENGTHS))


def test_simpo_without_gamma_on_answers_of_length_one_is_dpo_with_a_flat_reference():
    assert_close(
        simpo(CHOSEN, REJECTED, ONES, ONES, beta=0.1, gamma=0.0), dpo(CHOSEN, REJECTED, ZEROS, ZEROS, ONES, beta=0.1)
    )


def test_simpo_smoothing_and_nll_by_hand():
    loss = simpo(CHOSEN, REJECTED, *LENGTHS, beta=2.0, gamma=1.0, label_smoothing=0.3, nll=2.0)
    smoothed = [-0.7 * log_sigma(z) - 0.3 * log_sigma(-z) for z in (6, -5, -15)]
    assert_close(loss, t(*smoothed) + t(5, 7, 18))


# --- ORPO ---------------------------------------------------------------------------------------------


def test_orpo_by_hand():
    """p = 1/2 and 1/5: odds 1 and 1/4, so log sigma(log 4) = log(4/5)."""
    loss = orpo(t(2 * math.log(1 / 2)), t(3 * math.log(1 / 5)), t(2), t(3), weight=0.5)
    assert_close(loss, t(math.log(2) + 0.5 * math.log(5 / 4)))


def test_orpo_without_weight_is_the_nll_a_token():
    assert_close(orpo(CHOSEN, REJECTED, *LENGTHS, weight=0.0), t(2.5, 3.5, 9))


def test_orpo_of_a_certain_answer():
    """p = 1 has infinite odds; here they stop, and from there on they grow with log p only."""
    chosen, rejected = torch.tensor([0.0, 0.0, -1.0]), torch.tensor([-1.0, 0.0, 0.0])
    inputs = chosen.requires_grad_(), rejected.requires_grad_()
    loss = orpo(*inputs, torch.ones(3), torch.ones(3), weight=1.0)
    assert torch.isfinite(loss).all()
    assert loss[0] < 1e-5 and loss[1].item() == pytest.approx(math.log(2)) and loss[2] > 10
    loss.sum().backward()
    assert inputs[0].grad is not None and torch.isfinite(inputs[0].grad).all()
    assert inputs[0].grad[1] == -1.5  # 1 of the nll, sigma(0) of the odds


# --- CPO ----------------------------------------------------------------------------------------------


def test_cpo_by_hand():
    """0.5 * (2, -4, -7), and 2 * the nll a token."""
    loss = cpo(CHOSEN, REJECTED, LENGTHS[0], beta=0.5, nll=2.0)
    assert_close(loss, t(*[-log_sigma(z) for z in (1, -2, -3.5)]) + t(5, 7, 18))


def test_cpo_without_nll_is_dpo_with_a_flat_reference():
    assert_close(cpo(CHOSEN, REJECTED, ONES, nll=0.0), dpo(CHOSEN, REJECTED, ZEROS, ZEROS, ONES))


# --- MPO ----------------------------------------------------------------------------------------------


def test_mpo_by_hand():
    """-sigma(2, -4, -7) + 0.5 * nll a token."""
    expected = [-1 / (1 + math.exp(-gap)) + 0.5 * nll for gap, nll in ((2, 2.5), (-4, 3.5), (-7, 9))]
    assert_close(mpo(CHOSEN, REJECTED, LENGTHS[0], nll=0.5), t(*expected))


def test_the_gradient_of_mpo_is_that_of_flat_dpo_times_the_probability_of_the_preference():
    one, two = CHOSEN.clone().requires_grad_(), CHOSEN.clone().requires_grad_()
    mpo(one, REJECTED, ONES, nll=0.0).sum().backward()
    dpo(two, REJECTED, ZEROS, ZEROS, ONES, beta=1.0).sum().backward()
    assert two.grad is not None
    assert_close(one.grad, two.grad * torch.sigmoid(CHOSEN - REJECTED))


def test_mpo_gives_up_on_pairs_that_are_very_wrong():
    chosen = t(-50, -1).requires_grad_()
    mpo(chosen, t(0, 0), t(1, 1), nll=0.0).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad[0].abs() < 1e-20 and chosen.grad[1].abs() > 0.1
