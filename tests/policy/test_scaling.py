"""Running moments and reward scaling, by hand."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close

from rto.policy.scaling import RunningMoments, scale_rewards

NAN = float("nan")
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
REWARDS = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 3.0, NAN], [NAN] * 3])  # sums 6 and 2: mean 4, std sqrt(8)


def test_moments_are_those_of_everything_seen(generator):
    numbers = 3 + 5 * torch.randn(40, generator=generator, dtype=torch.float64)
    moments = RunningMoments()
    for part in numbers.split([1, 7, 0, 30, 2]):
        moments.update(part)
    assert moments.count == 40
    assert moments.mean == pytest.approx(numbers.mean().item())
    assert moments.std == pytest.approx(numbers.std(correction=1).item())


def test_moments_far_from_zero_keep_their_digits():
    moments = RunningMoments()
    for value in (1e6, 1e6 + 1, 1e6 + 2):
        moments.update(torch.tensor([value], dtype=torch.float64))
    assert moments.std == pytest.approx(1.0)


def test_moments_can_be_saved():
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 4.0]))
    assert RunningMoments(**asdict(moments)) == moments
    assert asdict(moments) == {"count": 2, "mean": 2.5, "m2": 4.5}


def test_std_needs_two():
    moments = RunningMoments()
    assert moments.std is None
    moments.update(torch.tensor([3.0]))
    assert moments.std is None


def test_std_divides_every_token():
    moments = RunningMoments()
    got = scale_rewards(REWARDS, MASK, moments, "std", None)
    assert_close(got, torch.tensor([[1.0, 2.0, 3.0], [-1.0, 3.0, 0.0], [0.0] * 3]) / 8**0.5)
    assert (moments.count, moments.mean) == (2, 4.0)  # padding is no answer


def test_standardize_takes_the_mean_off_the_last_token():
    got = scale_rewards(REWARDS, MASK, RunningMoments(), "standardize", None)
    assert_close(got, torch.tensor([[1.0, 2.0, -1.0], [-1.0, -1.0, 0.0], [0.0] * 3]) / 8**0.5)
    assert_close(got.sum(-1), torch.tensor([2.0, -2.0, 0.0]) / 8**0.5)


def test_the_batch_counts_before_it_is_scaled():
    """Sums 6 and 2, then 10: the std of all three divides the third."""
    moments = RunningMoments()
    scale_rewards(REWARDS, MASK, moments, "std", None)
    got = scale_rewards(torch.tensor([[10.0]]), torch.ones(1, 1).bool(), moments, "std", None)
    assert_close(got, torch.tensor([[10.0 / 4.0]]))  # std of 6 2 10


def test_clip_comes_last_and_token_by_token():
    got = scale_rewards(REWARDS, MASK, RunningMoments(), "std", 0.5)
    scaled = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 3.0, 0.0], [0.0] * 3]) / 8**0.5
    assert_close(got, scaled.clamp(-0.5, 0.5))
    moments = RunningMoments()
    got = scale_rewards(REWARDS, MASK, moments, None, 2.5)
    assert_close(got, torch.tensor([[1.0, 2.0, 2.5], [-1.0, 2.5, 0.0], [0.0] * 3]))
    assert moments.count == 0


@pytest.mark.parametrize("mode", ["std", "standardize"])
def test_one_answer_stays_as_it_is(mode):
    moments = RunningMoments()
    got = scale_rewards(torch.tensor([[2.0, 3.0]]), torch.ones(1, 2).bool(), moments, mode, None)
    assert got.tolist() == [[2.0, 3.0]] and (moments.count, moments.mean) == (1, 5.0)


def test_rewards_that_are_all_alike_are_not_blown_up():
    rewards, mask = torch.full((4, 1), 0.7), torch.ones(4, 1).bool()
    assert_close(scale_rewards(rewards, mask, RunningMoments(), "std", None), rewards)
    assert (scale_rewards(rewards, mask, RunningMoments(), "standardize", None).abs() < 1e-6).all()


@pytest.mark.parametrize("mode", ["std", "standardize"])
def test_extremes_are_finite(mode):
    far = torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4], [0.0, 0.0, 1e-30]])
    got = scale_rewards(far, torch.ones(3, 3).bool(), RunningMoments(), mode, None)
    assert torch.isfinite(got).all()


def test_padding_changes_nothing():
    pad = torch.nn.functional.pad
    for mode in ("std", "standardize"):
        got = scale_rewards(REWARDS, MASK, RunningMoments(), mode, 1.0)
        wide = scale_rewards(pad(REWARDS, (0, 2), value=NAN), pad(MASK, (0, 2)), RunningMoments(), mode, 1.0)
        assert_close(wide, pad(got, (0, 2)))
