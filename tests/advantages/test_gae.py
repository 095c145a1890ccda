"""GAE: four tokens by hand, its two limits, padding and answers that were cut."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from rto.advantages import gae

NAN = float("nan")
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()


@pytest.fixture
def ragged(generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and values in float64 with NaN outside the mask."""
    rewards, values = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.where(MASK, rewards, NAN), torch.where(MASK, values, NAN)


def test_four_tokens_by_hand():
    """gamma = 0.5, lambda = 0.4, so gamma * lambda = 0.2.

    delta_3 = 4 - 2 = 2                    A_3 = 2
    delta_2 = 0 + 0.5 * 2 - 3 = -2         A_2 = -2 + 0.2 * 2 = -1.6
    delta_1 = 2 + 0.5 * 3 - 1 = 2.5        A_1 = 2.5 + 0.2 * -1.6 = 2.18
    delta_0 = 1 + 0.5 * 1 - 4 = -2.5       A_0 = -2.5 + 0.2 * 2.18 = -2.064
    """
    rewards, values = torch.tensor([[1.0, 2.0, 0.0, 4.0]]), torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 4).bool(), gamma=0.5, lam=0.4)
    assert_close(advantages, torch.tensor([[-2.064, 2.18, -1.6, 2.0]]))
    assert_close(returns, torch.tensor([[1.936, 3.18, 1.4, 4.0]]))  # A + V


def test_defaults_are_gamma_1_and_lambda_095(ragged):
    for got, expected in zip(gae(*ragged, MASK), gae(*ragged, MASK, gamma=1.0, lam=0.95), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_reward_to_go_minus_value(ragged, gamma):
    rewards, values = (torch.where(MASK, x, 0.0) for x in ragged)
    to_go = torch.zeros(4, 4, dtype=torch.float64)
    for t in range(4):
        to_go[:, t] = sum(gamma ** (s - t) * rewards[:, s] for s in range(t, 4))
    advantages, returns = gae(*ragged, MASK, gamma=gamma, lam=1.0)
    assert_close(advantages, torch.where(MASK, to_go - values, 0.0))
    assert_close(returns, torch.where(MASK, to_go, 0.0))


def test_lambda_zero_is_one_step_td(ragged):
    rewards, values = (torch.where(MASK, x, 0.0) for x in ragged)
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages, returns = gae(*ragged, MASK, gamma=0.9, lam=0.0)
    assert_close(advantages, torch.where(MASK, rewards + 0.9 * after - values, 0.0))
    assert_close(returns, torch.where(MASK, rewards + 0.9 * after, 0.0))


def test_the_definition(ragged):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} (Eq. 16)."""
    gamma, lam = 0.9, 0.7
    rewards, values = (torch.where(MASK, x, 0.0) for x in ragged)
    delta = rewards + gamma * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    expected = torch.stack([sum((gamma * lam) ** (s - t) * delta[:, s] for s in range(t, 4)) for t in range(4)], -1)
    assert_close(gae(*ragged, MASK, gamma=gamma, lam=lam)[0], torch.where(MASK, expected, 0.0))


def test_a_perfect_critic_leaves_no_advantage():
    """Values equal to the reward-to-go: every delta is zero."""
    rewards = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    values = torch.tensor([[2.5, 1.5, 3.5, 3.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 4).bool(), lam=0.3)
    assert (advantages == 0).all() and torch.equal(returns, values)


def test_masked_cells_are_zero_and_read_by_nobody(ragged):
    advantages, returns = gae(*ragged, MASK, gamma=0.9, lam=0.7)
    assert (advantages[~MASK] == 0).all() and (returns[~MASK] == 0).all()
    assert torch.isfinite(advantages).all() and torch.isfinite(returns).all()


def test_padded_equals_unpadded(ragged):
    """A row alone, without its padding, gives the same numbers: the value after the last token is 0."""
    whole = gae(*ragged, MASK, gamma=0.9, lam=0.7)
    for row, length in enumerate(MASK.sum(-1).tolist()):
        alone = gae(*(x[row : row + 1, :length] for x in (*ragged, MASK)), gamma=0.9, lam=0.7)
        for got, expected in zip(whole, alone, strict=True):
            assert torch.equal(got[row : row + 1, :length], expected)


def test_a_cut_answer_ends_like_a_finished_one():
    """Nothing is bootstrapped at the limit: a full last column counts as the end of the episode."""
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 5.0]])
    advantages, _ = gae(rewards, values, torch.ones(1, 2).bool(), lam=1.0)
    assert advantages.tolist() == [[1.0, -4.0]]
