"""PPO's clipped losses by hand, on every side of the clip range, and the explained variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.policy.ppo import ppo, ratios
from rto.policy.value import explained_variance, value_loss


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


# --- the policy loss ----------------------------------------------------------------------------------

RATIOS = (0.5, 0.9, 1.0, 1.1, 1.5)  # below, inside three times, above [0.8, 1.2]


def at(ratios: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Log-probs that have these ratios to the old ones."""
    old = row(*[-1.0 - i for i in range(len(ratios))])
    return (old + row(*ratios).log()).requires_grad_(), old


@pytest.mark.parametrize(
    ("advantage", "loss", "slope"),
    [
        # A > 0: -min(rho A, 1.2 A). Above 1.2 nothing is left to gain; below, the way back is free.
        (2.0, [-1.0, -1.8, -2.0, -2.2, -2.4], [-1.0, -1.8, -2.0, -2.2, 0.0]),
        # A < 0: -min(rho A, 0.8 A) = max(rho, 0.8) * |A|. Below 0.8 nothing is left to gain.
        (-2.0, [1.6, 1.8, 2.0, 2.2, 3.0], [0.0, 1.8, 2.0, 2.2, 3.0]),
        (0.0, [0.0] * 5, [0.0] * 5),
    ],
)
def test_ppo_by_hand(advantage, loss, slope):
    """Inside the range the slope against the log-prob is -rho A, where it is clipped 0."""
    logprobs, old = at(RATIOS)
    got = ppo(logprobs, old, torch.full_like(old, advantage), clip=0.2)
    assert_close(got, row(*loss))
    assert_close(gradient(got, logprobs), row(*slope))


def test_a_ratio_of_exactly_one_is_the_policy_gradient():
    """The first step on a buffer: loss -A, gradient -A d log pi, exactly."""
    logprobs = torch.tensor([[-0.3, -7.0, -1e4]], requires_grad=True)
    advantages = torch.tensor([[1.7, -0.4, 3.3]])
    loss = ppo(logprobs, logprobs.detach(), advantages)
    assert torch.equal(loss, -advantages)
    assert torch.equal(gradient(loss, logprobs), -advantages)


def test_clip_is_an_option():
    logprobs, old = at((1.3,))
    assert ppo(logprobs, old, row(1.0), clip=0.2).item() == pytest.approx(-1.2)
    assert ppo(logprobs, old, row(1.0), clip=0.5).item() == pytest.approx(-1.3)


def test_no_gradient_reaches_old_log_probs_that_have_none():
    logprobs, old = at(RATIOS)
    assert ppo(logprobs, old, torch.ones_like(old)).requires_grad
    assert not old.requires_grad


def test_wild_ratios_are_finite():
    """Beyond e^20 the ratio stands still, its gradient too."""
    logprobs = torch.tensor([[0.0, -1e4, -1.0, -1e3]], requires_grad=True)
    old = torch.tensor([[-1e4, 0.0, -1e3, -1.0]])
    assert_close(ratios(logprobs, old).detach(), torch.tensor([[20.0, -20.0, 20.0, -20.0]]).exp())
    for advantage in (1e3, -1e3):
        loss = ppo(logprobs, old, torch.full_like(old, advantage))
        assert torch.isfinite(loss).all() and (gradient(loss, logprobs) == 0).all()


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_ppo_gradcheck(advantage):
    logprobs, old = at(RATIOS)
    assert torch.autograd.gradcheck(lambda x: ppo(x, old, torch.full_like(old, advantage)), logprobs)


def test_clipping_only_takes_away():
    """The clipped objective is never above the plain one: PPO's loss is a bound from above."""
    logprobs, old = at(RATIOS)
    for advantage in (2.0, -2.0):
        advantages = torch.full_like(old, advantage)
        assert (ppo(logprobs, old, advantages) >= -ratios(logprobs, old) * advantages).all()


def test_clip_high_widens_one_side():
    """[0.8, 1.4]: 1.5 is held at 1.4, 1.3 and 0.9 are free, 0.5 with A < 0 is held at 0.8 as before."""
    logprobs, old = at((1.5, 1.3, 0.9, 0.5))
    got = ppo(logprobs, old, row(1, 1, 1, -1), clip=0.2, clip_high=0.4)
    assert_close(got, row(-1.4, -1.3, -0.9, 0.8))
    assert_close(gradient(got, logprobs), row(0.0, -1.3, -0.9, 0.0))
    for advantage in (2.0, -2.0):
        advantages = torch.full_like(old, advantage)
        assert torch.equal(ppo(logprobs, old, advantages, clip_high=0.2), ppo(logprobs, old, advantages))


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    """c = 3: with A = -2 the loss is at most 6, beyond it nothing pulls; with A > 0 nothing changes."""
    logprobs, old = at((0.5, 1.0, 2.9, 3.1, 50.0))
    got = ppo(logprobs, old, torch.full_like(old, -2.0), dual=3.0)
    assert_close(got, row(1.6, 2.0, 5.8, 6.0, 6.0))
    assert_close(gradient(got, logprobs), row(0.0, 2.0, 5.8, 0.0, 0.0))
    for advantage in (2.0, 0.0):
        advantages = torch.full_like(old, advantage)
        assert torch.equal(ppo(logprobs, old, advantages, dual=3.0), ppo(logprobs, old, advantages))
    advantages = torch.full_like(old, -2.0)
    assert torch.equal(ppo(logprobs, old, advantages, dual=1e6), ppo(logprobs, old, advantages))


def test_dual_clip_gradcheck():
    logprobs, old = at(RATIOS)
    advantages = torch.full_like(old, -2.0)
    assert torch.autograd.gradcheck(lambda x: ppo(x, old, advantages, clip_high=0.3, dual=1.3), logprobs)


@pytest.mark.parametrize("dual", [1.0, 0.2, -3.0])
def test_dual_at_or_below_one_is_refused(dual):
    logprobs, old = at(RATIOS)
    with pytest.raises(ValueError, match=f"policy.loss.dual = {dual:g} must be above 1"):
        ppo(logprobs, old, torch.ones_like(old), dual=dual)


# --- the value loss -----------------------------------------------------------------------------------


def test_value_loss_by_hand():
    """V_old = 1, clip 0.2.

    V 1.1, R 2: inside, 0.5 * 0.9^2.     V 2, R 3: held at 1.2, 0.5 * max(1, 1.8^2).
    V 2, R 0: held is nearer, 0.5 * 2^2. V 0, R 3: held at 0.8 is nearer, 0.5 * 3^2.
    """
    values, returns = row(1.1, 2, 2, 0).requires_grad_(), row(2, 3, 0, 3)
    loss = value_loss(values, torch.ones_like(returns), returns, clip=0.2)
    assert_close(loss, row(0.405, 1.62, 2.0, 4.5))
    # Inside V - R; where the held value counts, 0: the critic has moved far enough in this direction.
    assert_close(gradient(loss, values), row(-0.9, 0.0, 2.0, -3.0))


def test_value_loss_with_a_wide_clip_is_the_squared_error():
    values, old, returns = row(1, -5, 40), row(0, 0, 0), row(2, 2, 2)
    assert_close(value_loss(values, old, returns, clip=1e6), 0.5 * (values - returns) ** 2)


def test_value_loss_without_a_clip_is_the_squared_error():
    values, old, returns = row(1, -5, 40), row(0, 0, 0), row(2, 2, 2)
    assert torch.equal(value_loss(values, old, returns, clip=None), 0.5 * (values - returns) ** 2)


def test_value_loss_at_the_old_value_has_the_whole_gradient():
    values = row(1.0, -2.0).requires_grad_()
    loss = value_loss(values, values.detach(), row(3.0, 3.0))
    assert_close(gradient(loss, values), row(-2.0, -5.0))


def test_value_loss_gradcheck():
    values = row(1.1, 2, 2, 0).requires_grad_()
    returns = row(2, 3, 0, 3)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, torch.ones_like(returns), returns, clip=0.2), values)


def test_value_loss_far_out():
    values = torch.tensor([[1e3, -1e3, 1e4]], requires_grad=True)
    loss = value_loss(values, torch.zeros(1, 3), torch.tensor([[-1e3, 1e3, -1e4]]))
    assert_close(loss.detach(), torch.tensor([[2e6, 2e6, 2e8]]))
    assert_close(gradient(loss, values), torch.tensor([[2e3, -2e3, 2e4]]))


# --- explained variance -------------------------------------------------------------------------------

NAN = float("nan")
MASK = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()


def test_explained_variance_by_hand():
    """Returns 0 3 6: variance 6. Errors 1 0 2: variance 2/3. 1 - (2/3) / 6 = 8/9."""
    returns, values = (
        torch.tensor([[0.0, 3.0], [6.0, NAN], [NAN, NAN]]),
        torch.tensor([[-1.0, 3.0], [4.0, NAN]] + [[NAN] * 2]),
    )
    assert explained_variance(values, returns, MASK).item() == pytest.approx(8 / 9)


def test_explained_variance_of_special_critics():
    returns = torch.tensor([[0.0, 3.0], [6.0, NAN], [NAN, NAN]])
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(returns + 5, returns, MASK).item() == pytest.approx(1)  # a bias is no variance
    assert explained_variance(returns * 0 + 2, returns, MASK).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, MASK).item() == pytest.approx(-3)  # errors 2R: 1 - 4


def test_explained_variance_without_any_is_zero():
    ones = torch.ones(3, 2)
    for mask in (MASK, MASK & False):
        assert explained_variance(math.pi * ones, ones, mask) == 0
