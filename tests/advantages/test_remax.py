"""REINFORCE and ReMax: their limits."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from rto.advantages import ADVANTAGES, gae, held, reinforce, remax, to_go

MASK = torch.arange(4) < torch.tensor([4, 2, 1])[:, None]


def test_gae_with_lambda_one_and_no_critic_is_reinforce(generator):
    rewards = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    for gamma in (1.0, 0.9):
        critic_free = gae(rewards, torch.zeros_like(rewards), MASK, gamma=gamma, lam=1.0)
        for got, expected in zip(reinforce(rewards, MASK, gamma=gamma), critic_free, strict=True):
            assert_close(got, expected)


def test_reinforce_plus_plus_is_reinforce_whitened():
    plain, whitened = ADVANTAGES["reinforce"], ADVANTAGES["reinforce++"]
    assert plain.function is whitened.function is reinforce
    assert (plain.whiten, whitened.whiten) == (False, True)


def test_remax_of_a_terminal_reward_is_the_published_one():
    """Score less greedy score, clipped at 5, on every token, and the token's own KL."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 3.0], [0.0, 9.0, 0.0, 0.0], [-8.0, 0.0, 0.0, 0.0]])
    penalty = torch.where(MASK, torch.tensor([0.1, -0.2, 0.3, 0.4]), 0.0)
    other = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 2.0]])  # the greedy answers' rewards, another width
    there = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    greedy = held(to_go(other, there), there, 4)
    advantages, returns = remax(rewards + penalty, MASK, penalty, greedy)
    expected = torch.tensor([[1.0], [5.0], [-5.0]]) + penalty
    assert_close(advantages, torch.where(MASK, expected, 0.0))
    assert_close(returns, to_go(rewards + penalty, MASK))


def test_remax_without_clip():
    rewards = torch.tensor([[100.0]])
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
    assert remax(rewards, mask, zeros, zeros)[0].item() == 5
    assert remax(rewards, mask, zeros, zeros, clip=None)[0].item() == 100


def test_the_greedy_answer_itself_has_no_advantage(generator):
    rewards = torch.randn(3, 4, generator=generator)
    zeros = torch.zeros(3, 4)
    assert (remax(rewards, MASK, zeros, held(to_go(rewards, MASK), MASK, 4))[0] == 0).all()
