"""The published methods: sums by hand, which signals they ask for, and the identities between them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto import rewards
from rto.batch import Signals
from rto.rewards import CUTOFFS, METHODS, TERMS
from rto.rewards.normaliser import Normaliser
from rto.segments import segment_counts, segment_ends, sentence_ends

NAN = float("nan")
NORMALISER = Normaliser(w_mu=0.7668, b_mu=0.4705, w_sigma=0.2569, b_sigma=2.8339, floor=0.1)  # Phi-3-mini, cutoff 1.75


def drawn(generator: torch.Generator, cutoff: float | None = 1.75, rows: int = 32, width: int = 60) -> Signals:
    """Ragged answers, finished and cut, an empty one and a lone end of sequence among them."""
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0], lengths[1] = 0, 1
    mask = torch.arange(width) < lengths[:, None]
    finished = (torch.rand(rows, generator=generator) < 0.6) & mask.any(-1)
    finished[1] = True

    def cells(scale: float = 1.0) -> Tensor:
        return torch.where(mask, scale * torch.randn(rows, width, generator=generator), NAN)

    ends = segment_ends(cells().abs() * 2, mask, finished, cutoff)
    words = [[["a", "b.", "c", "d", "e\n"][i % 5] for i in range(width)] for _ in range(rows)]
    weight = torch.where(mask, torch.rand(rows, width, generator=generator), 0.0)
    return Signals(
        mask=mask,
        finished=finished,
        logprobs=cells(),
        reference=cells(),
        guide=cells(),
        scores=3 * torch.randn(rows, generator=generator),
        segments=NORMALISER.apply(cells(3.0), ends, mask),
        segment_ends=ends,
        sentence_ends=sentence_ends(words, mask),
        attention=weight / weight.sum(-1, keepdim=True).clamp(min=1e-9),
    )


@pytest.fixture
def signals(generator) -> Signals:
    return drawn(generator)


def reward(method: str, signals: Signals, kl_coef: float = 0.01) -> Tensor:
    return rewards.total(METHODS[method], signals, kl_coef)[0]


def same(a: Tensor, b: Tensor) -> None:
    assert_close(a, b, atol=1e-6, rtol=1e-6)


# --- what they are ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ("ppo", {"scores"}),
        ("rto", {"guide", "scores"}),
        ("rto-v1", {"guide"}),
        ("ddpo", {"guide", "scores"}),
        ("dppo", {"guide"}),
        ("semi-rto", {"guide", "scores", "sentence_ends"}),
        ("rs-ppo", {"guide", "scores"}),
        ("segment-ppo", {"segments", "segment_ends"}),
        ("token-ppo", {"segments", "segment_ends"}),
        ("bandit-ppo", {"segments", "segment_ends"}),
        ("abc", {"scores", "attention"}),
        ("opd", {"guide"}),
    ],
)
def test_a_method_asks_for_what_it_reads(method, needs, signals):
    assert rewards.needs(METHODS[method]) == needs
    optional = {field.name for field in fields(Signals) if field.default is None}
    bare = replace(signals, **dict.fromkeys(optional - needs))
    assert torch.equal(reward(method, bare), reward(method, signals))


def test_methods_name_known_terms():
    assert {term["type"] for terms in METHODS.values() for term in terms} <= set(TERMS)


def test_cutoffs_are_those_of_the_methods_that_read_segments():
    reading = {name for name, terms in METHODS.items() if "segments" in rewards.needs(terms)}
    assert reading == set(CUTOFFS)
    assert CUTOFFS == {"segment-ppo": "positive", "token-ppo": 0, "bandit-ppo": None}


@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(method, signals):
    wide = {}
    for field in fields(Signals):
        x = getattr(signals, field.name)
        if x is not None and x.dim() == 2:
            wide[field.name] = torch.nn.functional.pad(x, (0, 3), value=False if x.dtype == torch.bool else NAN)
    got = reward(method, replace(signals, **wide))
    same(got, torch.nn.functional.pad(reward(method, signals), (0, 3)))
    assert torch.isfinite(got).all()


# --- identities ---------------------------------------------------------------------------------------


def test_rto_with_scale_0_is_ppo(signals):
    terms = [{**term, "scale": 0.0} if term["type"] == "implicit" else term for term in METHODS["rto"]]
    assert rewards.needs(terms) == rewards.needs(METHODS["ppo"])
    assert torch.equal(rewards.total(terms, signals, 0.01)[0], reward("ppo", signals))


def test_token_ppo_is_segment_ppo_with_cutoff_0(generator):
    signals = drawn(generator, cutoff=0)
    assert torch.equal(reward("token-ppo", signals), reward("segment-ppo", signals))
    body = signals.mask.sum(-1) - signals.finished.long()
    assert torch.equal(segment_counts(signals.segment_ends), body)


def test_with_tokens_all_layouts_agree(generator):
    signals = drawn(generator, cutoff=0)
    layouts = [rewards.segment(signals, layout=layout) for layout in ("even", "last", "same")]
    same(layouts[0], layouts[1])
    same(layouts[0], layouts[2])


def test_segment_even_and_last_have_the_same_total(signals):
    even, last = (rewards.segment(signals, layout=layout, clip=None).sum(-1) for layout in ("even", "last"))
    assert_close(even, last, atol=1e-5, rtol=1e-6)
    assert_close(last, torch.where(signals.segment_ends, signals.segments, 0.0).sum(-1))


def test_bandit_ppo_is_ppo_with_the_scorers_mean_and_std(generator):
    """One segment, the whole answer: (v - mean) / std on the last token, as the sentence reward is."""
    signals = drawn(generator, cutoff=None)
    flat = Normaliser(w_mu=0.0, b_mu=-0.5195, w_sigma=0.0, b_sigma=2.156, floor=0.1)
    values = torch.randn(signals.mask.shape, generator=generator)
    scores = (torch.where(signals.segment_ends, values, 0.0).sum(-1) + 0.5195) / 2.156
    segments = flat.apply(values, signals.segment_ends, signals.mask)
    signals = replace(signals, segments=segments, scores=scores)
    same(reward("bandit-ppo", signals), reward("ppo", signals))


@pytest.mark.parametrize("method", ["ddpo", "semi-rto"])
def test_delayed_rewards_have_rtos_total(method, signals):
    same(reward(method, signals).sum(-1), reward("rto", signals).sum(-1))
    exact = Signals(
        **{k: v.double() if v.is_floating_point() else v for k, v in vars(signals).items() if v is not None}
    )
    assert_close(reward(method, exact).sum(-1), reward("rto", exact).sum(-1), atol=1e-12, rtol=0)


def test_dppo_has_rto_v1s_total(signals):
    same(reward("dppo", signals, 0.0).sum(-1), reward("rto-v1", signals, 0.0).sum(-1))


def test_semi_rto_lies_between(signals):
    """A sentence a token is RTO, a sentence an answer is DDPO."""
    same(reward("semi-rto", replace(signals, sentence_ends=signals.mask)), reward("rto", signals))
    none = torch.zeros_like(signals.mask)
    same(reward("semi-rto", replace(signals, sentence_ends=none)), reward("ddpo", signals))


@pytest.mark.parametrize("clip", [0.05, 0.01, None])
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_rs_ppo_sums_to_the_terminal_reward(clip, scale, signals):
    terms = [{"type": "shaped", "scale": scale, "clip": clip}, {"type": "terminal"}]
    totals = rewards.total(terms, signals, 0.0)[0].sum(-1)
    assert_close(totals, rewards.terminal(signals).sum(-1), atol=1e-5 * scale, rtol=1e-6)
    exact = Signals(
        **{k: v.double() if v.is_floating_point() else v for k, v in vars(signals).items() if v is not None}
    )
    totals = rewards.total(terms, exact, 0.0)[0].sum(-1)
    assert_close(totals, rewards.terminal(exact).sum(-1), atol=1e-12, rtol=0)


def test_abc_without_attention_is_ppo(signals):
    same(rewards.total([{"type": "attention", "share": 0.0}], signals, 0.01)[0], reward("ppo", signals))
    same(reward("abc", signals).sum(-1), reward("ppo", signals).sum(-1))


def test_opd_is_the_log_ratio_to_the_teacher(signals):
    """With its scale and the KL coefficient equal, log pi_ref cancels: coef * (log pi_teacher - log pi)."""
    expected = torch.where(signals.mask, 0.01 * (signals.guide - signals.logprobs), 0.0)
    assert_close(reward("opd", signals, kl_coef=0.01), expected, atol=1e-7, rtol=1e-5)


# --- the penalty --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_taken_against_the_moving_reference_where_there_is_one(estimator, signals, generator):
    moving = torch.where(signals.mask, signals.logprobs - 1.0, NAN)
    total, parts = rewards.total(METHODS["rto"], replace(signals, moving=moving), 0.01, estimator)
    k = {"k1": 1.0, "k2": 0.5, "k3": torch.tensor(-1.0).exp().item()}[estimator]
    assert_close(parts["kl"], torch.where(signals.mask, -0.01 * k, 0.0))
    assert torch.equal(parts["implicit"], rewards.implicit(signals))  # the term keeps to the frozen one
    assert_close(total, sum(parts.values()))
