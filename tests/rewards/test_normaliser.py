"""The location-aware normaliser: published numbers by hand, the fit on known lines, what the floor is for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close

from rto.rewards.normaliser import Normaliser, fit, locations

NAN = float("nan")
PHI3 = Normaliser(w_mu=0.7668, b_mu=0.4705, w_sigma=0.2569, b_sigma=2.8339, floor=0.1)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
ENDS = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()


# --- use ----------------------------------------------------------------------------------------------


def test_locations_by_hand():
    expected = [[1 / 3, 0, 2 / 3, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert_close(locations(ENDS, MASK), torch.tensor(expected))
    assert locations(torch.ones_like(MASK), MASK)[2].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 0, 0])


def test_apply_by_hand():
    """Phi-3-mini at cutoff 1.75; log(1) = 0, so the last segment is (v - b_mu) / b_sigma."""
    values = torch.tensor([[1.0, NAN, 2.0, 3.0, NAN], [NAN] * 5, [NAN, NAN, -1.0, NAN, NAN], [NAN] * 5])
    got = PHI3.apply(values, ENDS, MASK)
    third, two_thirds = math.log(1 / 3), math.log(2 / 3)
    expected = [
        (1.0 - (0.7668 * third + 0.4705)) / (0.2569 * third + 2.8339),
        0,
        (2.0 - (0.7668 * two_thirds + 0.4705)) / (0.2569 * two_thirds + 2.8339),
        (3.0 - 0.4705) / 2.8339,
        0,
    ]
    assert got[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert got[2].tolist() == pytest.approx([0, 0, (-1.0 - 0.4705) / 2.8339, 0, 0], rel=1e-5)
    assert (got[1] == 0).all() and (got[3] == 0).all()


def test_apply_sees_no_padding_and_no_other_row(generator):
    values = torch.randn(4, 5, generator=generator)
    got = PHI3.apply(values, ENDS, MASK)
    wide = [torch.nn.functional.pad(values, (0, 2), value=NAN)]
    wide += [torch.nn.functional.pad(x, (0, 2)) for x in (ENDS, MASK)]
    assert_close(PHI3.apply(*wide), torch.nn.functional.pad(got, (0, 2)))
    rows = [PHI3.apply(values[i : i + 1], ENDS[i : i + 1], MASK[i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(rows), got)


def test_apply_is_finite_on_extremes():
    mask = torch.ones(1, 2000).bool()
    for value in (-1e4, 0.0, 1e4):
        assert torch.isfinite(PHI3.apply(torch.full((1, 2000), value), mask, mask)).all()


def test_the_floor_keeps_early_tokens_from_turning_over():
    """Llama-3 SFT at cutoff 0: without a floor the std is negative below 0.0041, and a good first token is bad."""
    published = Normaliser(w_mu=1.7340, b_mu=1.3212, w_sigma=0.9906, b_sigma=5.4513, floor=1e-9)
    mask = torch.ones(1, 500).bool()  # tokens 1 and 2 of 500 lie at 0.002 and 0.004
    values = torch.full((1, 500), 20.0)
    raw = 0.9906 * locations(mask, mask).log() + 5.4513
    assert (raw[0, :2] < 0).all() and (raw[0, 2:] > 0).all()
    floored = Normaliser(**{**asdict(published), "floor": 0.1}).apply(values, mask, mask)
    assert (floored > 0).all()
    assert floored[0, 0].item() == pytest.approx((20.0 - (1.7340 * math.log(0.002) + 1.3212)) / 0.1, rel=1e-5)


@pytest.mark.parametrize("floor", [0.0, -1.0, NAN])
def test_a_floor_is_positive(floor):
    with pytest.raises(ValueError, match="reward.normaliser.floor"):
        Normaliser(1.0, 0.0, 1.0, 1.0, floor)


def test_the_share_at_the_floor():
    some = Normaliser(0, 0, 1.0, 1.5, 1.0, segments=10, locations=[0.25, 0.5, 1.0], counts=[2, 3, 5])
    assert some.floored == pytest.approx(0.5)  # log(0.25) and log(0.5) + 1.5 are under 1, 1.5 is not


def test_it_travels_as_json():
    fitted = fit(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0.5, 1.0, 0.5, 1.0]), 0.1)
    assert Normaliser(**json.loads(json.dumps(asdict(fitted)))) == fitted


# --- the fit ------------------------------------------------------------------------------------------


def test_statistics_by_location():
    """Mean and population std; a location that was seen once has std 0; thirds are rounded to 0.333 and 0.667."""
    values = torch.tensor([1.0, 2.0, 6.0, 3.0, 5.0, 4.0, 8.0])
    where = torch.tensor([1 / 3, 2 / 3, 1.0, 0.5, 1.0, 1 / 3, 1.0])
    got = fit(values, where, 0.1)
    assert got.locations == pytest.approx([0.333, 0.5, 0.667, 1.0])
    assert got.means == pytest.approx([2.5, 3.0, 2.0, 19 / 3])
    assert got.stds == pytest.approx([1.5, 0.0, 0.0, math.sqrt((1 + 16 + 25) / 9 / 3)])
    assert got.counts == [2, 1, 1, 3]
    assert (got.answers, got.segments, got.floor) == (3, 7, 0.1)


def exact(w_mu: float, b_mu: float, w_sigma: float, b_sigma: float, segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two values a location, mean +- std, with both exactly on their lines."""
    where = (torch.arange(1, segments + 1).double() / segments * 1000).round() / 1000
    mean, std = w_mu * where.log() + b_mu, w_sigma * where.log() + b_sigma
    return torch.cat([mean - std, mean + std]), torch.cat([where, where])


def test_known_lines_are_found():
    got = fit(*exact(0.7668, 0.4705, 0.2569, 2.8339, 20), 0.1)
    assert [got.w_mu, got.b_mu, got.w_sigma, got.b_sigma] == pytest.approx([0.7668, 0.4705, 0.2569, 2.8339], abs=1e-3)
    assert got.floored == 0


def test_the_fit_whitens_what_it_was_fitted_on():
    values, where = exact(0.7668, 0.4705, 0.2569, 2.8339, 20)
    got = fit(values, where, 0.1)
    ends = torch.ones(1, 20).bool()
    for half, expected in ((values[:20], -1.0), (values[20:], 1.0)):
        assert_close(got.apply(half[None], ends, ends), torch.full((1, 20), expected).double(), atol=2e-3, rtol=0)


def test_an_outlier_does_not_turn_the_lines():
    """Least squares would follow it: that is why the regression is Huber's."""
    values, where = exact(0.7668, 0.4705, 0.2569, 2.8339, 20)
    values[9] += 60.0
    values[29] += 60.0
    got = fit(values, where, 0.1)
    assert [got.w_mu, got.b_mu] == pytest.approx([0.7668, 0.4705], abs=0.02)


def test_a_fit_from_noisy_answers(generator):
    """2,000 answers of 1 to 12 segments."""
    counts = torch.randint(1, 13, (2000,), generator=generator)
    where = torch.cat([torch.arange(1, n + 1) / n for n in counts.tolist()])
    noise = torch.randn(len(where), generator=generator)
    got = fit(0.9 * where.log() + 0.5 + (0.4 * where.log() + 3.0) * noise, where, 0.1)
    assert [got.w_mu, got.b_mu, got.w_sigma, got.b_sigma] == pytest.approx([0.9, 0.5, 0.4, 3.0], abs=0.3)
    assert got.answers == 2000 and got.segments == counts.sum()


def test_a_location_below_a_thousandth_is_no_outlier():
    """Rounded to 0 it would lie at log(1e-10)."""
    got = fit(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0004, 0.5, 1.0]), 0.1)
    assert got.locations[0] == pytest.approx(0.001)


@pytest.mark.parametrize("where", [[1.0, 1.0, 1.0], [0.5, 0.50001], []])
def test_one_location_is_not_enough(where):
    with pytest.raises(ValueError, match="two locations or more.*reward.cutoff"):
        fit(torch.ones(len(where)), torch.tensor(where), 0.1)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_broken_values_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit(torch.tensor([1.0, bad]), torch.tensor([0.5, 1.0]), 0.1)
