"""The schedule by hand, clipping by the global norm, and what a broken gradient does: nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rto.config import Training
from rto.optim import Optimizer, learning_rate_factor

PLAIN = Training(lr=0.1, warmup=0.0, schedule="constant", optimizer="adam")


# --- the schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, warmup 0.2 = 2 steps, then eighths of the way down to 0.1.
        ("constant", [0.5, 1.0] + [1.0] * 8),
        ("linear", [0.5, 1.0] + [0.1 + 0.9 * (1 - k / 8) for k in range(8)]),
        ("cosine", [0.5, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]),
    ],
)
def test_every_step_by_hand(schedule, expected):
    assert [learning_rate_factor(k, 10, 0.2, 0.1, schedule) for k in range(10)] == pytest.approx(expected)


def test_half_way_and_the_end():
    for schedule in ("linear", "cosine"):
        assert learning_rate_factor(6, 10, 0.2, 0.1, schedule) == pytest.approx(0.55)  # (1 + 0.1) / 2
        assert learning_rate_factor(10, 10, 0.2, 0.1, schedule) == pytest.approx(0.1)
        assert learning_rate_factor(10, 10, 0.2, 0.0, schedule) == pytest.approx(0.0)


def test_a_floor_of_one_is_constant():
    assert [learning_rate_factor(k, 5, 0.0, 1.0, "cosine") for k in range(5)] == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.99])
def test_a_run_of_one_step_uses_the_whole_rate(schedule, warmup):
    assert learning_rate_factor(0, 1, warmup, 0.1, schedule) == 1.0


def test_warmup_is_rounded_up():
    """3 % of 50 steps is 1.5: two steps of warmup."""
    assert [learning_rate_factor(k, 50, 0.03, 0.1, "constant") for k in range(3)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_it_never_rises_after_warmup_and_stays_between_floor_and_one(schedule):
    factors = [learning_rate_factor(k, 37, 0.1, 0.05, schedule) for k in range(37)]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert all(0.05 <= factor <= 1 for factor in factors)


# --- a step -------------------------------------------------------------------------------------------


def weights(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value])) for value in values]


def give(parameters: list[nn.Parameter], *gradients: float) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor([gradient])


def test_first_adam_step_by_hand():
    """Bias correction makes the first step lr * g / (|g| + eps): the sign of the gradient, times the rate."""
    parameters = weights(1.0, 1.0)
    give(parameters, 0.3, -0.4)
    norm, rate = Optimizer(parameters, PLAIN, lr=0.1, steps=10).step()
    assert (norm, rate) == (pytest.approx(0.5), 0.1)
    assert [p.item() for p in parameters] == pytest.approx([0.9, 1.1])


def test_clips_by_the_global_norm():
    """Gradients 3 and 4 have norm 5; clipped to 1 they are 0.6 and 0.8. Adam's first moment holds a tenth."""
    parameters = weights(0.0, 0.0)
    optimizer = Optimizer(parameters, PLAIN, lr=0.1, steps=10)
    give(parameters, 3.0, 4.0)
    norm, _ = optimizer.step()
    assert norm == pytest.approx(5.0)  # before clipping
    moments = [optimizer.inner.state[p]["exp_avg"].item() for p in parameters]
    assert moments == pytest.approx([0.06, 0.08])


def test_does_not_enlarge_a_small_gradient():
    parameters = weights(0.0)
    optimizer = Optimizer(parameters, PLAIN, lr=0.1, steps=10)
    give(parameters, 0.25)
    optimizer.step()
    assert optimizer.inner.state[parameters[0]]["exp_avg"].item() == pytest.approx(0.025)


def test_the_rate_follows_the_schedule():
    training = PLAIN.model_copy(update={"schedule": "linear", "warmup": 0.5, "floor": 0.0})
    parameters = weights(0.0)
    optimizer = Optimizer(parameters, training, lr=0.2, steps=4)
    rates = []
    for _ in range(4):
        give(parameters, 1.0)
        rates.append(optimizer.step()[1])
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.1])
    assert optimizer.step_count == 4


def test_gradients_are_cleared_and_frozen_weights_woken():
    parameters = [nn.Parameter(torch.zeros(1), requires_grad=False)]
    optimizer = Optimizer(iter(parameters), PLAIN, lr=0.1, steps=10)
    (parameters[0] * 2).sum().backward()
    optimizer.step()
    assert parameters[0].grad is None and parameters[0].requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_gradient_raises_and_changes_nothing(bad):
    parameters = weights(1.0, 2.0)
    optimizer = Optimizer(parameters, PLAIN, lr=0.1, steps=10)
    give(parameters, 0.3, 0.1)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    moments = [optimizer.inner.state[p]["exp_avg"].clone() for p in parameters]
    give(parameters, bad, 0.1)
    with pytest.raises(FloatingPointError, match="the gradient norm of the batch is (nan|inf)"):
        optimizer.step()
    for p, weight, moment in zip(parameters, before, moments, strict=True):
        assert_close(p.detach(), weight, atol=0, rtol=0)
        assert_close(optimizer.inner.state[p]["exp_avg"], moment, atol=0, rtol=0)
    assert optimizer.step_count == 1


def test_weight_decay_of_adamw_and_of_adam():
    """AdamW shrinks the weight by lr * decay; Adam adds decay * weight to the gradient, of which the sign counts."""
    moved = {}
    for name in ("adamw", "adam"):
        training = PLAIN.model_copy(update={"optimizer": name, "weight_decay": 0.5})
        parameters = weights(4.0)
        give(parameters, 0.0)
        Optimizer(parameters, training, lr=0.1, steps=10).step()
        moved[name] = parameters[0].item()
    assert moved["adamw"] == pytest.approx(4.0 * (1 - 0.1 * 0.5))
    assert moved["adam"] == pytest.approx(4.0 - 0.1)


def test_betas_and_eps_reach_the_optimiser():
    training = PLAIN.model_copy(update={"betas": (0.5, 0.75), "eps": 1.0})
    parameters = weights(0.0)
    give(parameters, 0.5)
    optimizer = Optimizer(parameters, training, lr=0.1, steps=10)
    optimizer.step()
    assert optimizer.inner.state[parameters[0]]["exp_avg"].item() == pytest.approx(0.25)
    assert parameters[0].item() == pytest.approx(-0.1 * 0.5 / (0.5 + 1.0))
