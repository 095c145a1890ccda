"""Pairwise losses against a reference: numbers by hand, exact gradients, and what reduces to what."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rto.preferences import bradley_terry, dpo, ipo, rdpo, rebel, tdpo1, tdpo2


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigma(z: float) -> float:
    return -math.log1p(math.exp(-z))


# h = (chosen - chosen_ref) - (rejected - rejected_ref): (2) - (-1) = 3;  0 - 0 = 0;  (-4) - (6) = -10
CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF = t(-10, -7, -9), t(-12, -3, -2), t(-12, -7, -5), t(-11, -3, -8)
PAIR = CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF
SWAPPED = REJECTED, CHOSEN, REJECTED_REF, CHOSEN_REF
ONES, ZEROS = t(1, 1, 1), t(0, 0, 0)
LENGTHS = t(4, 2, 1), t(2, 2, 1)
KLS = t(1, 0, 2), t(3, 0, 1)
Z = [0.3, 0.0, -1.0]  # beta = 0.1


# --- DPO ----------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    expected = [math.log(1 + math.exp(-0.3)), math.log(2), math.log(1 + math.exp(1))]
    assert_close(dpo(*PAIR, ONES), t(*expected))


def test_label_smoothing_by_hand():
    expected = [-0.8 * log_sigma(z) - 0.2 * log_sigma(-z) for z in Z]
    assert_close(dpo(*PAIR, ONES, label_smoothing=0.2), t(*expected))


def test_label_smoothing_one_half_does_not_care_who_won():
    assert_close(dpo(*PAIR, ONES, label_smoothing=0.5), dpo(*SWAPPED, ONES, label_smoothing=0.5))


def test_smoothing_equals_swapping_the_answers():
    assert_close(dpo(*PAIR, ONES, label_smoothing=1.0), dpo(*SWAPPED, ONES))


def test_dpo_at_the_reference_is_log_2():
    assert_close(dpo(CHOSEN, REJECTED, CHOSEN, REJECTED, ONES, beta=0.7), ONES * math.log(2))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_gradient_is_minus_beta_sigma_of_minus_z(beta):
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    dpo(chosen, rejected, CHOSEN_REF, REJECTED_REF, ONES, beta=beta).sum().backward()
    expected = t(*[-beta / (1 + math.exp(10 * beta * z)) for z in Z])  # h = 10 z
    assert chosen.grad is not None and rejected.grad is not None
    assert_close(chosen.grad, expected)
    assert_close(rejected.grad, -expected)


def test_dpo_depends_on_log_ratios_only():
    assert_close(dpo(CHOSEN + 3, REJECTED - 4, CHOSEN_REF + 3, REJECTED_REF - 4, ONES), dpo(*PAIR, ONES))


def test_dpo_of_both_orders_differs_by_z():
    """-log sigma(z) + log sigma(-z) = -z."""
    assert_close(dpo(*PAIR, ONES) - dpo(*SWAPPED, ONES), -t(*Z))


def test_dpo_far_out():
    """Log-probs of -1e4 and margins of +-1e3: the loss is 0 or -z, the gradient 0 or -beta."""
    chosen, far = torch.tensor([-1e4, -1.1e4], requires_grad=True), torch.full((2,), -1e4)
    loss = dpo(chosen, torch.tensor([-1.1e4, -1e4]), far, far, torch.ones(2), beta=1.0)
    assert loss.tolist() == [0.0, 1000.0]
    loss.sum().backward()
    assert chosen.grad is not None and chosen.grad.tolist() == [0.0, -1.0]


def test_dpo_is_bradley_terry_on_implicit_rewards():
    """r(y) = beta * (log pi(y) - log pi_ref(y))."""
    rewards = 0.1 * (CHOSEN - CHOSEN_REF), 0.1 * (REJECTED - REJECTED_REF)
    assert_close(dpo(*PAIR, ONES), bradley_terry(*rewards, ZEROS))


def test_the_nll_of_dpo_is_that_of_the_chosen_answer_a_token():
    """0.5 * (10/4, 7/2, 9/1)."""
    assert_close(dpo(*PAIR, LENGTHS[0], nll=0.5), dpo(*PAIR, LENGTHS[0]) + t(1.25, 1.75, 4.5))


def test_hinge_by_hand():
    """max(0, 1 - z) for z = 0.3 * 4, 0, -4."""
    assert_close(dpo(*PAIR, ONES, beta=0.4, variant="hinge"), t(0, 1, 5))


def test_robust_by_hand_and_plain_without_smoothing():
    expected = [(-0.8 * log_sigma(z) + 0.2 * log_sigma(-z)) / 0.6 for z in Z]
    assert_close(dpo(*PAIR, ONES, variant="robust", label_smoothing=0.2), t(*expected))
    assert_close(dpo(*PAIR, ONES, variant="robust"), dpo(*PAIR, ONES))


def test_robust_is_unbiased_under_flipped_labels():
    """A share eps of the pairs swapped: the mean of the robust loss is plain DPO on the true labels."""
    right, wrong = (dpo(*pair, ONES, variant="robust", label_smoothing=0.2) for pair in (PAIR, SWAPPED))
    assert_close(0.8 * right + 0.2 * wrong, dpo(*PAIR, ONES))


def test_smoothing_that_a_variant_cannot_have_is_refused():
    with pytest.raises(ValueError, match="label_smoothing = 0.1: variant = 'hinge' has none"):
        dpo(*PAIR, ONES, variant="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="needs less than 0.5"):
        dpo(*PAIR, ONES, variant="robust", label_smoothing=0.5)


# --- IPO ----------------------------------------------------------------------------------------------


def test_ipo_by_hand_averaged_and_summed():
    """Averaged: 2/4 + 1/2, 0, -4 - 6. Summed: 3, 0, -10. Target 1 / (2 * 0.5) = 1."""
    assert_close(ipo(*PAIR, *LENGTHS, tau=0.5), t(0, 1, 121))
    assert_close(ipo(*PAIR, *LENGTHS, tau=0.5, average=False), t(4, 1, 121))


def test_ipo_summed_is_averaged_on_answers_of_length_one():
    assert torch.equal(ipo(*PAIR, ONES, ONES), ipo(*PAIR, ONES, ONES, average=False))


def test_ipo_stops_at_its_target():
    """Unlike DPO: no gradient where h = 1 / (2 tau), pushed back beyond it."""
    chosen = t(4, 5, 6).requires_grad_()
    ipo(chosen, ZEROS, ZEROS, ZEROS, ONES, ONES, tau=0.1).sum().backward()
    assert chosen.grad is not None
    assert_close(chosen.grad, t(-2, 0, 2))


@pytest.mark.parametrize("tau", [0, -0.1])
def test_ipo_without_a_target_is_refused(tau):
    with pytest.raises(ValueError, match="positive tau"):
        ipo(*PAIR, ONES, ONES, tau=tau)


# --- R-DPO --------------------------------------------------------------------------------------------


def test_rdpo_by_hand_with_a_plus():
    """z = 0.1 * (3, 0, -10) + 0.5 * (2, 0, 0): the chosen answer that is longer is pushed less."""
    assert_close(rdpo(*PAIR, *LENGTHS, alpha=0.5), t(*[-log_sigma(z) for z in (1.3, 0, -1)]))
    chosen = CHOSEN.clone().requires_grad_()
    short, long = (
        torch.autograd.grad(rdpo(chosen, *PAIR[1:], length, t(50, 50, 50)).sum(), chosen)[0]
        for length in (t(10, 10, 10), t(100, 100, 100))
    )
    assert (long.abs() < short.abs()).all()


def test_rdpo_without_alpha_or_with_equal_lengths_is_dpo():
    assert_close(rdpo(*PAIR, *LENGTHS, alpha=0.0), dpo(*PAIR, ONES))
    assert_close(rdpo(*PAIR, LENGTHS[0], LENGTHS[0], alpha=1.0), dpo(*PAIR, ONES))


# --- TDPO ---------------------------------------------------------------------------------------------


def test_tdpo_by_hand():
    """h - 1 * (2, 0, -1) and h - 0.2 * (2, 0, -1)."""
    assert_close(tdpo1(*PAIR, *KLS), t(*[-log_sigma(z) for z in (0.1, 0, -0.9)]))
    assert_close(tdpo2(*PAIR, *KLS, alpha=0.2), t(*[-log_sigma(z) for z in (0.26, 0, -0.98)]))


def test_tdpo_without_kl_is_dpo():
    for loss in (tdpo1, tdpo2):
        assert_close(loss(*PAIR, ZEROS, ZEROS), dpo(*PAIR, ONES))
    assert_close(tdpo2(*PAIR, *KLS, alpha=0.0), dpo(*PAIR, ONES))


def test_tdpo2_with_alpha_one_has_the_value_of_tdpo1_and_another_gradient():
    one, two = (tuple(kl.clone().requires_grad_() for kl in KLS) for _ in range(2))
    first, second = tdpo1(*PAIR, *one), tdpo2(*PAIR, *two, alpha=1.0)
    assert_close(first, second)
    first.sum().backward()
    second.sum().backward()
    assert_close(one[1].grad, two[1].grad)
    assert one[0].grad is not None
    assert_close(one[0].grad, -one[1].grad)
    assert two[0].grad is None  # stopped on the chosen KL only


# --- REBEL --------------------------------------------------------------------------------------------


def test_rebel_by_hand():
    """(3 - 0.5 * 2)^2, 0, (-10 - 0.5 * 4)^2."""
    assert_close(rebel(*PAIR, t(2, 0, 4), eta=0.5), t(4, 0, 144))


def test_rebel_without_eta_pulls_to_the_reference_and_stops_there():
    assert_close(rebel(*PAIR, t(2, 0, 4), eta=0.0), t(9, 0, 100))
    assert_close(rebel(CHOSEN, REJECTED, CHOSEN, REJECTED, ZEROS), ZEROS)


def test_rebel_of_the_swapped_pair_with_the_swapped_margin_is_the_same():
    assert_close(rebel(*PAIR, t(2, 0, 4)), rebel(*SWAPPED, -t(2, 0, 4)))


def test_rebel_with_a_constant_margin_is_ipo_summed():
    """eta * margin = 1 / (2 tau)."""
    assert_close(rebel(*PAIR, 5 * ONES), ipo(*PAIR, ONES, ONES, tau=0.1, average=False))
