"""Reward terms on ragged answers: RTO's Eq. 4.7 by hand, PPO's Eq. 2.3, and how terms add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rto import rewards
from rto.batch import Signals
from rto.rewards import METHODS, implicit, shaped, terminal

NAN = float("nan")
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()


@pytest.fixture
def signals() -> Signals:
    """A full answer, one of two tokens, one of one token, and padding. Masked cells hold NaN."""
    return Signals(
        mask=MASK,
        finished=torch.tensor([True, True, False, False]),
        #                         log pi                     log pi_ref                  log pi_guide
        logprobs=torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-1.0, -4.0, NAN, NAN], [-2.0, NAN, NAN, NAN], [NAN] * 4]),
        reference=torch.tensor([[-1.2, -1.0, -0.5, -4.0], [-1.0, -2.0, NAN, NAN], [-2.5, NAN, NAN, NAN], [NAN] * 4]),
        guide=torch.tensor([[-1.0, -0.5, -3.0, -3.9], [-1.4, -0.1, NAN, NAN], [-9.5, NAN, NAN, NAN], [NAN] * 4]),
        scores=torch.tensor([2.0, -12.0, 0.5, NAN]),
    )


#  log pi_guide - log pi_ref: 0.2 0.5 -2.5 0.1 | -0.4 1.9 | -7    times 0.05, held within +-0.05
IMPLICIT = torch.tensor([[0.01, 0.025, -0.05, 0.005], [-0.02, 0.05, 0, 0], [-0.05, 0, 0, 0], [0, 0, 0, 0]])
#  log pi - log pi_ref: 0.2 -1 0 1 | 0 -2 | 0.5                   times -0.01
KL = torch.tensor([[-0.002, 0.01, 0, -0.01], [0, 0.02, 0, 0], [-0.005, 0, 0, 0], [0, 0, 0, 0]])
#  the score at the end, held within +-10
TERMINAL = torch.tensor([[0, 0, 0, 2.0], [0, -10.0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]])


# --- one term -----------------------------------------------------------------------------------------


def test_implicit_by_hand(signals):
    assert_close(implicit(signals), IMPLICIT)
    assert_close(implicit(signals, scale=0.1, clip=0.05)[0], torch.tensor([0.02, 0.05, -0.05, 0.01]))
    assert_close(implicit(signals, scale=-0.05)[0], torch.tensor([-0.01, -0.025, 0.05, -0.005]))


def test_implicit_without_a_clip_is_the_papers_text(signals):
    expected = torch.tensor([[0.01, 0.025, -0.125, 0.005], [-0.02, 0.095, 0, 0], [-0.35, 0, 0, 0], [0, 0, 0, 0]])
    assert_close(implicit(signals, clip=None), expected)
    assert_close(implicit(signals, clip=float("inf")), expected)


def test_a_clip_of_zero_is_no_switch(signals):
    """The published code reads 0 as "no clip"; here None means that, and 0 leaves no reward."""
    assert (implicit(signals, clip=0.0) == 0).all()


def test_implicit_telescopes_to_the_answers_log_ratio(signals):
    """Without a clip its sum is scale * (log pi_guide(y) - log pi_ref(y))."""
    assert_close(implicit(signals, scale=0.1, clip=None).sum(-1), 0.1 * torch.tensor([-1.7, 1.5, -7.0, 0.0]))


def test_implicit_moves_what_it_clipped(signals):
    """Each token is held within the clip before it is moved: -2.5 counts as -1."""
    assert_close(implicit(signals, placement="end").sum(-1), IMPLICIT.sum(-1))
    assert implicit(signals, placement="end")[0].tolist() == pytest.approx([0, 0, 0, -0.01])


def test_shaped_takes_back_what_implicit_gives(signals):
    taken = implicit(signals) - shaped(signals)
    assert_close(taken, implicit(signals, placement="end"))


def test_terminal_by_hand(signals):
    assert_close(terminal(signals), TERMINAL)
    assert_close(terminal(signals, scale=3.0), 3 * TERMINAL)  # the clip acts before the scale
    assert terminal(signals, clip=None)[1, 1] == -12.0
    assert terminal(signals, clip=1.0).sum(-1).tolist() == [1.0, -1.0, 0.5, 0.0]


def test_terminal_does_not_look_at_finished(signals):
    """An answer cut at the limit is scored at its last token, as in the published code."""
    cut = replace(signals, finished=torch.zeros(4).bool())
    assert torch.equal(terminal(cut), terminal(signals))


# --- the sum ------------------------------------------------------------------------------------------


def test_rto_by_hand(signals):
    """Eq. 4.7 with beta_1 = 0.05 (clip 0.05), beta_2 = 0.01, beta_3 = 1."""
    total, parts = rewards.total(METHODS["rto"], signals, kl_coef=0.01)
    expected = torch.tensor(
        [[0.008, 0.035, -0.05, 1.995], [-0.02, -9.93, 0, 0], [0.445, 0, 0, 0], [0, 0, 0, 0]],
    )
    assert_close(total, expected)
    assert list(parts) == ["implicit", "terminal", "kl"]
    for name, part in {"implicit": IMPLICIT, "terminal": TERMINAL, "kl": KL}.items():
        assert_close(parts[name], part)


def test_ppo_by_hand(signals):
    """Eq. 2.3: the score at the end, minus beta * KL."""
    total, parts = rewards.total(METHODS["ppo"], replace(signals, guide=None), kl_coef=0.01)
    assert_close(total, torch.tensor([[-0.002, 0.01, 0, 1.99], [0, -9.98, 0, 0], [0.495, 0, 0, 0], [0, 0, 0, 0]]))
    assert list(parts) == ["terminal", "kl"]


def test_rto_without_its_dense_part_is_ppo(signals):
    """Scale 0 means off, bit for bit, and what is off asks for no guide."""
    terms = [{"type": "implicit", "scale": 0.0, "clip": 0.05}, {"type": "terminal"}]
    assert rewards.needs(terms) == rewards.needs(METHODS["ppo"]) == {"scores"}
    without_guide = replace(signals, guide=None)
    total, parts = rewards.total(terms, without_guide, kl_coef=0.03)
    expected, expected_parts = rewards.total(METHODS["ppo"], without_guide, kl_coef=0.03)
    assert torch.equal(total, expected) and list(parts) == list(expected_parts)


def test_needs():
    assert rewards.needs(METHODS["rto"]) == {"guide", "scores"}
    assert rewards.needs([{"type": "implicit"}, {"type": "terminal", "scale": 0}]) == {"guide"}
    assert rewards.needs([]) == set()


def test_needs_follow_an_option():
    assert rewards.needs([{"type": "implicit", "placement": "sentence"}]) == {"guide", "sentence_ends"}
    assert rewards.needs([{"type": "implicit", "placement": "token"}, {"type": "shaped"}]) == {"guide"}
    assert rewards.needs([{"type": "implicit", "placement": "sentence", "scale": 0.0}]) == set()


def test_penalties_need_nothing():
    assert rewards.needs([{"type": "missing_eos"}, {"type": "length", "limit": 3}]) == set()


def test_no_term_leaves_the_kl_penalty(signals):
    total, parts = rewards.total([], signals, kl_coef=0.01)
    assert_close(total, KL)
    assert list(parts) == ["kl"]


def test_two_terms_of_one_type_keep_their_names_apart(signals):
    terms = [{"type": "implicit"}, {"type": "terminal"}, {"type": "implicit", "scale": 0.1, "clip": None}]
    terms += [{"type": "terminal", "scale": -1.0}, {"type": "implicit", "scale": 0.2}]
    total, parts = rewards.total(terms, signals, kl_coef=0.01)
    assert len(parts) == len(terms) + 1
    assert_close(total, sum(parts.values()))
    others = implicit(signals) + implicit(signals, scale=0.1, clip=None) + implicit(signals, scale=0.2)
    assert_close(total, others + KL)  # the two terminals cancel


def test_rows_do_not_see_each_other(signals):
    total, _ = rewards.total(METHODS["rto"], signals, kl_coef=0.01)
    alone = [rewards.total(METHODS["rto"], signals.rows(slice(i, i + 1)), kl_coef=0.01)[0] for i in range(4)]
    assert torch.equal(torch.cat(alone), total)
