"""Losses on scored answers: KTO and MPPO, with ragged rows, ties and rows that teach nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from rto.preferences import kto, mppo

NAN = float("nan")


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x).bool()


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log sigma(x)."""
    return math.log1p(math.exp(-x))


# --- KTO ----------------------------------------------------------------------------------------------


def kto_of(ratio: torch.Tensor, label: torch.Tensor, baseline: float, **options: float) -> torch.Tensor:
    zero = torch.zeros_like(ratio)
    return kto(ratio, zero, label, every(ratio), torch.full((len(ratio),), baseline, dtype=ratio.dtype), **options)


def test_kto_by_hand():
    """r - z0 = 2 and -3, wanted and unwanted, with weights."""
    ratio = rows([3.0, 3.0, -2.0, -2.0])
    loss = kto_of(ratio, rows([1, 0, 1, 0]), 1.0, beta=0.5, desirable=2.0, undesirable=3.0)
    expected = 2 * (1 - sigma(1)) + 3 * (1 - sigma(-1)) + 2 * (1 - sigma(-1.5)) + 3 * (1 - sigma(1.5))
    assert_close(loss, torch.tensor([expected / 4], dtype=torch.float64))


def test_kto_at_the_reference_is_one_half():
    ratio = rows([0.0, 0.0])
    assert_close(kto_of(ratio, rows([1, 0]), 0.0), torch.tensor([0.5], dtype=torch.float64))


def test_kto_does_not_go_below_a_baseline_of_zero():
    ratio, label = rows([3.0, -1.0]), rows([1, 0])
    assert torch.equal(kto_of(ratio, label, -7.0), kto_of(ratio, label, 0.0))
    assert not torch.equal(kto_of(ratio, label, 7.0), kto_of(ratio, label, 0.0))


def test_kto_is_unpaired_and_a_row_is_the_mean_of_its_answers():
    ratio, label = rows([3.0], [-1.0]), rows([1], [0])
    apart = kto_of(ratio, label, 0.5)
    assert_close(kto_of(ratio.T, label.T, 0.5), apart.mean()[None])


def test_kto_pushes_wanted_answers_up_and_unwanted_ones_down():
    ratio = rows([0.5, 0.5]).requires_grad_()
    kto_of(ratio, rows([1, 0]), 0.5, beta=0.2).sum().backward()
    assert_close(ratio.grad, rows([-0.2 / 4 / 2, 0.2 / 4 / 2]))


def test_kto_reads_the_threshold():
    ratio = rows([1.0, 1.0])
    assert_close(kto_of(ratio, rows([7, 4]), 0.0, desirable_above=5.0), kto_of(ratio, rows([1, 0]), 0.0))
    assert_close(kto_of(ratio, rows([5, 4]), 0.0, desirable_above=5.0), kto_of(ratio, rows([0, 0]), 0.0))


# --- MPPO ---------------------------------------------------------------------------------------------

# p = 0.5, 0.2, 0.4 with scores 6, 9, 1: the best is the second, p falls 1 -> 0 -> 2 by score.
P = [0.5, 0.2, 0.4]
LENGTHS = rows([2, 5, 1])
LOGPROBS = rows([math.log(p) for p in P]) * LENGTHS
SCORES = rows([6, 9, 1])
THERE = every(SCORES)
VARIANTS = ["single", "mns", "mnm", "mcs", "mcm", "list_mle"]

BY_HAND = {
    "single": nls(0.2 - 0.4),
    "mns": nls(0.2 - 0.5) + nls(0.2 - 0.4),
    "mnm": nls(2 * 0.2 - 0.5 - 0.4),
    "mcs": nls(0.2 - 0.5) + nls(0.2 - 0.4) + nls(0.5 - 0.4),
    "mcm": nls((0.2 - 0.5) + (0.2 - 0.4) + (0.5 - 0.4)),
    "list_mle": -math.log(math.exp(0.2) / sum(map(math.exp, P)))
    - math.log(math.exp(0.5) / (math.exp(0.5) + math.exp(0.4))),
    "point_ce": -sum(s * math.log(p) + (1 - s) * math.log(1 - p) for s, p in zip((0.6, 0.9, 0.1), P, strict=True)) / 3,
    "point_mse": (0.1**2 + 0.7**2 + 0.3**2) / 3,
}


@pytest.mark.parametrize("variant", BY_HAND)
def test_mppo_by_hand(variant):
    loss = mppo(LOGPROBS, LENGTHS, SCORES, THERE, variant=variant)
    assert_close(loss, torch.tensor([BY_HAND[variant]], dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_answers_make_one_pair_whatever_the_variant(variant):
    there = torch.tensor([[True, True, False]])
    loss = mppo(LOGPROBS, LENGTHS, SCORES, there, variant=variant)
    assert_close(loss, torch.tensor([nls(0.2 - 0.5)], dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scores", [[4, 4, 4], [4, NAN, NAN]], ids=["ties", "one answer"])
def test_a_row_without_a_pair_gives_nothing(variant, scores):
    scores = rows(scores)
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = mppo(logprobs, LENGTHS, scores, ~scores.isnan(), variant=variant)
    assert_close(loss, torch.zeros(1, dtype=torch.float64))
    loss.sum().backward()
    assert_close(logprobs.grad, torch.zeros_like(LOGPROBS), rtol=0, atol=1e-15)


TIED_BEST = {  # scores 9, 9, 1: the first is the best, the second its equal
    "single": nls(0.5 - 0.4),
    "mns": nls(0.5 - 0.4),
    "mnm": nls(0.5 - 0.4),
    "mcs": nls(0.5 - 0.4) + nls(0.2 - 0.4),
    "mcm": nls((0.5 - 0.4) + (0.2 - 0.4)),
    "list_mle": nls(0.5 - 0.4) + nls(0.2 - 0.4),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_scores_make_no_pair_and_the_first_of_the_best_wins(variant):
    loss = mppo(LOGPROBS, LENGTHS, rows([9, 9, 1]), THERE, variant=variant)
    assert_close(loss, torch.tensor([TIED_BEST[variant]], dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_order_of_the_scores_counts(variant):
    loss = mppo(LOGPROBS, LENGTHS, SCORES, THERE, variant=variant)
    assert torch.equal(mppo(LOGPROBS, LENGTHS, 100 * SCORES - 1e3, THERE, variant=variant), loss)


@pytest.mark.parametrize("variant", ["point_ce", "point_mse"])
@pytest.mark.parametrize("scores", [[6, 11, 1], [-1, 9, 1]])
def test_pointwise_scores_outside_their_range_are_refused(variant, scores):
    with pytest.raises(ValueError, match="set full_score"):
        mppo(LOGPROBS, LENGTHS, rows(scores), THERE, variant=variant)


def test_pointwise_reads_the_full_score_and_is_smallest_at_the_scores():
    exact = mppo(LOGPROBS, LENGTHS, rows([0.5, 0.2, 0.4]), THERE, variant="point_mse", full_score=1.0)
    assert_close(exact, torch.zeros(1, dtype=torch.float64))
    logprobs = LOGPROBS.clone().requires_grad_()
    mppo(logprobs, LENGTHS, rows([0.5, 0.2, 0.4]), THERE, variant="point_ce", full_score=1.0).sum().backward()
    assert_close(logprobs.grad, torch.zeros_like(LOGPROBS))


def test_a_token_that_rounds_above_certainty_is_certain():
    loss = mppo(rows([1e-6, -1.0]), rows([1, 1]), rows([1, 0]), every(rows([1, 0])))
    assert_close(loss, torch.tensor([nls(1 - math.exp(-1))], dtype=torch.float64))
