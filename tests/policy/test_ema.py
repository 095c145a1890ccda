"""The moving reference, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from rto.policy.ema import ema_update


def test_by_hand():
    target, source = (
        [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])],
        [torch.tensor([3.0, 2.0]), torch.tensor([[0.0]])],
    )
    ema_update(target, source, 0.75)
    assert_close(target[0], torch.tensor([1.5, 2.0]))
    assert_close(target[1], torch.tensor([[3.0]]))
    assert source[0].tolist() == [3.0, 2.0]


def test_parameters_stay_parameters_without_gradient():
    target, source = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.9 * target.weight.detach() + 0.1 * source.weight.detach()
    ema_update(list(target.parameters()), list(source.parameters()), 0.9)
    assert_close(target.weight.detach(), expected)
    assert target.weight.is_leaf and target.weight.grad is None


def test_what_is_equal_stays_and_many_steps_arrive():
    weights = torch.tensor([0.1, -3.7])
    target = weights.clone()
    ema_update([target], [weights], 0.99)
    assert torch.equal(target, weights)
    target = torch.zeros(2)
    for _ in range(2000):
        ema_update([target], [weights], 0.99)
    assert_close(target, weights)


def test_a_bfloat16_policy_moves_a_float32_reference():
    target = torch.ones(1)
    ema_update([target], [torch.zeros(1, dtype=torch.bfloat16)], 0.999)
    assert_close(target, torch.tensor([0.999]))


def test_lists_of_different_lengths_are_a_mistake():
    with pytest.raises(ValueError):
        ema_update([torch.zeros(1)], [], 0.5)
