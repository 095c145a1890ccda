"""RLOO and GRPO: the published estimators where the reward stands at the end, unbiased where it is dense."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.advantages import grpo, held, rloo, to_go

LENGTHS = [4, 2, 3, 1, 4]
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
GROUP = torch.tensor([0, 1, 0, 1, 0])  # three answers and two


def terminal(scores: Tensor) -> Tensor:
    """The score on the last token."""
    last = MASK & ~torch.nn.functional.pad(MASK[:, 1:], (0, 1))
    return torch.where(last, scores[:, None], 0.0)


SCORES = torch.tensor([1.0, -2.0, 5.0, 0.5, 3.0], dtype=torch.float64)


def test_to_go_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 2.0, float("nan")]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    assert to_go(rewards, mask).tolist() == [[7.0, 6.0, 4.0], [10.0, 2.0, 0.0]]
    assert to_go(rewards, mask, 0.5).tolist() == [[3.0, 4.0, 4.0], [9.0, 2.0, 0.0]]


def test_held_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), float("nan")], [float("nan")] * 3])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    assert held(x, mask, 3).tolist() == [[1.0, 2.0, 3.0], [4.0] * 3, [0.0] * 3]
    assert held(x, mask, 5).tolist() == [[1.0, 2.0, 3.0, 3.0, 3.0], [4.0] * 5, [0.0] * 5]
    assert held(x, mask, 2).tolist() == [[1.0, 2.0], [4.0] * 2, [0.0] * 2]


def test_rloo_of_a_terminal_reward_is_the_score_less_the_mean_of_the_others():
    expected = torch.tensor([1 - 4, -2 - 0.5, 5 - 2, 0.5 + 2, 3 - 3], dtype=torch.float64)
    assert_close(rloo(terminal(SCORES), MASK, GROUP)[0], torch.where(MASK, expected[:, None], 0.0))


@pytest.mark.parametrize("scale", [True, False])
def test_grpo_of_a_terminal_reward_is_the_standard_score(scale):
    expected = torch.empty_like(SCORES)
    for number in (0, 1):
        scores = SCORES[number == GROUP]
        expected[number == GROUP] = (scores - scores.mean()) / (scores.std() + 1e-9 if scale else 1.0)
    assert_close(grpo(terminal(SCORES), MASK, GROUP, scale=scale)[0], torch.where(MASK, expected[:, None], 0.0))


def test_rloo_by_the_definition(generator):
    """Row by row, position by position."""
    rewards, gamma = torch.randn(5, 4, generator=generator, dtype=torch.float64), 0.9
    returns = to_go(rewards, MASK, gamma)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for i, t in itertools.product(range(5), range(4)):
        if t < LENGTHS[i]:
            others = [j for j in range(5) if j != i and GROUP[j] == GROUP[i]]
            expected[i, t] = returns[i, t] - sum(returns[j, min(t, LENGTHS[j] - 1)] for j in others) / len(others)
    assert_close(rloo(rewards, MASK, GROUP, gamma=gamma)[0], expected)


@pytest.mark.parametrize("dense", [False, True])
def test_rloo_has_the_policy_gradient_in_expectation(dense):
    """All pairs of answers of two tokens from three words, the first of them an end: E[A grad log pi] = grad E[sum r].

    Exact, because an answer's baseline reads the other answer only.
    """
    torch.manual_seed(3)
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)  # row 0 the start, then the word before
    gains = torch.randn(3, 3, dtype=torch.float64) if dense else torch.zeros(3, 3, dtype=torch.float64)
    bonus = torch.randn(7, dtype=torch.float64)
    answers = [(0,), *itertools.product((1, 2), range(3))]
    mask = torch.arange(2) < torch.tensor([len(a) for a in answers])[:, None]
    logprobs, rewards = torch.zeros(2, 7, 2, dtype=torch.float64).unbind(0)
    logp = logits.log_softmax(-1)
    rows = []
    for i, answer in enumerate(answers):
        before = (0, *answer[:-1])
        rows.append(torch.stack([logp[b, w] for b, w in zip(before, answer, strict=True)] + [logp.new_zeros(())])[:2])
        for t, (b, w) in enumerate(zip(before, answer, strict=True)):
            rewards[i, t] = gains[b, w]
        rewards[i, len(answer) - 1] += bonus[i]
    logprobs = torch.stack(rows)
    p = logprobs.sum(-1).exp()
    assert_close(p.sum().item(), 1.0)
    true = torch.autograd.grad((p * rewards.sum(-1)).sum(), logits, retain_graph=True)[0]
    estimate = logits.new_zeros(())
    for i, j in itertools.product(range(7), repeat=2):
        both = [i, j]
        advantages = rloo(rewards[both], mask[both], torch.zeros(2).long())[0]
        estimate = estimate + (p[i] * p[j]).detach() * (advantages * logprobs[both]).sum() / 2
    assert_close(torch.autograd.grad(estimate, logits)[0], true)


def test_a_group_of_one_has_no_advantage():
    for estimator in (rloo, grpo):
        advantages, returns = estimator(torch.tensor([[2.0, 3.0]]), torch.ones(1, 2).bool(), torch.tensor([4]))
        assert advantages.tolist() == [[0.0, 0.0]] and returns.tolist() == [[5.0, 3.0]]


def test_equal_answers_have_no_advantage():
    """0.1 + 0.1 + 0.1 is not 0.3 in float32; divided by 1e-9 its rounding would be a signal."""
    for value in (0.1, 1e4 / 3, -7.7):
        rewards = torch.full((3, 2), value)
        for estimator in (rloo, grpo):
            found = estimator(rewards, torch.ones(3, 2).bool(), torch.zeros(3).long())[0]
            assert (found.abs() < 1e-2).all()


def test_equal_totals_with_other_tokens_have_bounded_advantages():
    """Shaping keeps totals: two answers with one total and different tokens. The totals' own std would be 0."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    advantages, _ = grpo(rewards, torch.ones(2, 2).bool(), torch.zeros(2).long())
    # returns 1 0 | 1 1, means 1 0.5, variances 0 0.5, mean 0.25
    assert_close(advantages, torch.tensor([[0.0, -1.0], [0.0, 1.0]]))


def test_the_scale_of_the_rewards_drops_out(generator):
    rewards = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    assert_close(grpo(1000 * rewards, MASK, GROUP)[0], grpo(rewards, MASK, GROUP)[0])


def test_a_reward_that_every_answer_gets_drops_out(generator):
    """On each answer's first token; without answers of one token, which would hold it throughout."""
    rewards = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    more = rewards.clone()
    more[:, 0] += torch.tensor([3.0, -5.0], dtype=torch.float64)[GROUP]
    whole = GROUP == 0
    for estimator in (rloo, grpo):
        assert_close(estimator(more, MASK, GROUP)[0][whole], estimator(rewards, MASK, GROUP)[0][whole])
