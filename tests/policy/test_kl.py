"""The controllers of the KL coefficient, by hand."""

from __future__ import annotations

import pytest

from rto.policy.kl import KlController


def test_fixed_never_moves():
    controller = KlController(0.01)
    for kl in (0.0, 100.0, -3.0):
        controller.update(kl, 1024)
    assert controller.coef == 0.01


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 0.1),  # 10 % above; a tenth of the horizon
        (5.4, 1 - 0.1 * 0.1),
        (7.2, 1 + 0.2 * 0.1),  # at the clip
        (60.0, 1 + 0.2 * 0.1),  # beyond it
        (0.0, 1 - 0.2 * 0.1),
        (-5.0, 1 - 0.2 * 0.1),  # k1 may be negative
    ],
)
def test_adaptive_by_hand(kl, factor):
    controller = KlController(0.05, target=6.0, horizon=10_000)
    controller.update(kl, 1000)
    assert controller.coef == pytest.approx(0.05 * factor)


def test_adaptive_steps_multiply():
    controller = KlController(1.0, target=1.0, horizon=100)
    controller.update(2.0, 50)
    controller.update(2.0, 50)
    assert controller.coef == pytest.approx(1.1 * 1.1)


def test_the_unit_is_the_callers():
    """Only kl / target counts: per sequence or per token (20 tokens here) gives the same coefficient."""
    a_sequence, a_token = KlController(0.1, target=6.0), KlController(0.1, target=6.0 / 20)
    a_sequence.update(6.5, 256)
    a_token.update(6.5 / 20, 256)
    assert a_sequence.coef == pytest.approx(a_token.coef)
