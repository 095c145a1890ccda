"""SFT and Bradley-Terry: numbers by hand, exact gradients, symmetries, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rto.numerics import reduce
from rto.preferences import bradley_terry, sft


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigma(z: float) -> float:
    return -math.log1p(math.exp(-z))


# --- SFT ----------------------------------------------------------------------------------------------


def test_sft_is_the_token_mean_of_minus_log_p():
    logprobs, mask = torch.tensor([[-1.0, -2.0, -3.0], [-5.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert torch.equal(sft(logprobs), -logprobs)
    assert reduce(sft(logprobs), mask, "token", 4).item() == pytest.approx((1 + 2 + 3 + 5) / 4)


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


def test_centring_adds_the_squared_sum():
    """0.01 * (3 + 1)^2, (1 + 1)^2, (-1 + 0)^2."""
    scores = t(3, 1, -1), t(1, 1, 0), t(0, 0, 0)
    assert_close(bradley_terry(*scores, centre=0.01), bradley_terry(*scores) + t(0.16, 0.04, 0.01))


def test_centring_is_free_for_opposite_scores_and_holds_a_common_shift():
    chosen, rejected, margin = t(0.7), t(-0.7), t(0)
    assert torch.equal(bradley_terry(chosen, rejected, margin, centre=5.0), bradley_terry(chosen, rejected, margin))
    assert bradley_terry(chosen + 1, rejected + 1, margin, centre=5.0) > bradley_terry(chosen, rejected, margin)
