"""What every reward term promises: values by hand on ragged answers (cut ones and a lone end of sequence too), that it
reads what its row names and no more, the total that it declares, zeros outside the mask, no look at padding or
at other rows, finite numbers and gradients on extreme inputs.

A new term needs a row in ``HAND``, or the suite fails.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.batch import Signals
from rto.recipe import complete
from rto.rewards import TERMS

NAN = float("nan")
# Finished answers of four and two tokens, a lone end of sequence, a cut answer of three, padding.
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()


def padded(*rows: list[float]) -> Tensor:
    return torch.tensor([row + [NAN] * (4 - len(row)) for row in [*rows, []]])


def marked(*rows: list[int]) -> Tensor:
    return torch.tensor([row + [0] * (4 - len(row)) for row in [*rows, []]]).bool()


SIGNALS = Signals(
    mask=MASK,
    finished=torch.tensor([True, True, True, False, False]),
    logprobs=padded([-1, -2, -0.5, -3], [-1, -4], [-2], [-1, -1, -1]),
    # log pi_guide - log pi_ref:  0.2 0.5 -2.5 0.1 | -0.4 1.9 | -7 | 1 -0.2 0.6
    reference=padded([-1.2, -1, -0.5, -4], [-1, -2], [-2.5], [-2, -2, -2]),
    guide=padded([-1, -0.5, -3, -3.9], [-1.4, -0.1], [-9.5], [-1, -2.2, -1.4]),
    moving=padded([-1, -1, -1, -1], [-1, -1], [-1], [-1, -1, -1]),
    scores=torch.tensor([2, -12, 0.5, 1, NAN]),
    segments=padded([0, 3, -1.5, 0], [24, 0], [0], [0, -1, 0.6]),
    segment_ends=marked([0, 1, 1, 0], [1, 0], [0], [0, 1, 1]),  # the lone end of sequence has none
    sentence_ends=marked([0, 1, 0, 1], [0, 1], [1], [1, 0, 1]),
    attention=padded([0.1, 0.2, 0.3, 0.4], [0.75, 0.25], [1], [0.5, 0.3, 0.2]),
    function=padded([1, -2, 3, -4], [0, 20], [5], [-0.5, 0, 0.5]),
    http=padded([0, 0, 0, 7], [0, -20], [1], [0, 0, 3]),
)
ALWAYS = ("mask", "finished", "logprobs", "reference")
TOKENWISE = [f.name for f in fields(Signals) if f.name not in ("mask", "finished", "scores")]
FLOATS = [name for name in TOKENWISE if not name.endswith("_ends")]

IMPLICIT = ([0.01, 0.025, -0.05, 0.005], [-0.02, 0.05], [-0.05], [0.05, -0.01, 0.03])
# Name -> options -> the rewards of the four answers.
HAND: dict[str, list[tuple[dict, tuple[list[float], ...]]]] = {
    "terminal": [
        ({}, ([0, 0, 0, 2], [0, -10], [0.5], [0, 0, 1])),
        ({"scale": 3, "clip": None}, ([0, 0, 0, 6], [0, -36], [1.5], [0, 0, 3])),
    ],
    "implicit": [
        ({}, IMPLICIT),
        ({"placement": "sentence"}, ([0, 0.035, 0, -0.045], [0, 0.03], [-0.05], [0.05, 0, 0.02])),
        ({"placement": "end"}, ([0, 0, 0, -0.01], [0, 0.03], [-0.05], [0, 0, 0.07])),
        ({"placement": "end", "clip": None, "scale": 0.1}, ([0, 0, 0, -0.17], [0, 0.15], [-0.7], [0, 0, 0.14])),
    ],
    "shaped": [
        # the sums of the clipped rewards, taken back at the end: -0.01, 0.03, -0.05, 0.07
        ({}, ([0.01, 0.025, -0.05, 0.015], [-0.02, 0.02], [0], [0.05, -0.01, -0.04])),
        ({"clip": None}, ([0.01, 0.025, -0.125, 0.09], [-0.02, 0.02], [0], [0.05, -0.01, -0.04])),
    ],
    "segment": [
        ({}, ([1.5, 1.5, -1.5, 0], [10, 0], [0], [-0.5, -0.5, 0.6])),
        ({"layout": "last"}, ([0, 3, -1.5, 0], [10, 0], [0], [0, -1, 0.6])),
        ({"layout": "same"}, ([3, 3, -1.5, 0], [10, 0], [0], [-1, -1, 0.6])),
        ({"clip": None, "length_norm": True}, ([0.375, 0.375, -0.375, 0], [12, 0], [0], [-1 / 6, -1 / 6, 0.2])),
        ({"scale": -2, "clip": 2}, ([-2, -2, 2, 0], [-2, 0], [0], [1, 1, -1.2])),  # the clip acts after the scale
    ],
    "attention": [
        # 0.8 R of it by attention, 0.2 R at the end; R = 2, -10 (clipped), 0.5, 1
        ({}, ([0.16, 0.32, 0.48, 1.04], [-6, -4], [0.5], [0.4, 0.24, 0.36])),
        ({"share": 0}, ([0, 0, 0, 2], [0, -10], [0.5], [0, 0, 1])),
        ({"share": 1, "scale": 2, "clip": None}, ([0.4, 0.8, 1.2, 1.6], [-18, -6], [1], [1, 0.6, 0.4])),
    ],
    "missing_eos": [
        ({}, ([0, 0, 0, 0], [0, 0], [0], [-0.05, -0.05, -0.05])),
        ({"value": -1, "placement": "end"}, ([0, 0, 0, 0], [0, 0], [0], [0, 0, -1])),
    ],
    "length": [
        ({}, ([0, 0, 0, 0], [0, 0], [0], [0, 0, 0])),
        ({"limit": 3}, ([-0.05, -0.05, -0.05, -0.05], [0, 0], [0], [0, 0, 0])),  # more than, not as many as
        ({"limit": 2, "value": -1, "placement": "end"}, ([0, 0, 0, -1], [0, 0], [0], [0, 0, -1])),
    ],
    "function": [
        ({}, ([1, -2, 3, -4], [0, 20], [5], [-0.5, 0, 0.5])),
        ({"scale": 0.5, "clip": 4}, ([0.5, -1, 1.5, -2], [0, 2], [2], [-0.25, 0, 0.25])),  # the clip acts first
    ],
    "http": [
        ({}, ([0, 0, 0, 7], [0, -20], [1], [0, 0, 3])),
        ({"scale": 0.5, "clip": 4}, ([0, 0, 0, 2], [0, -2], [0.5], [0, 0, 1.5])),
    ],
}
CASES = [(name, options, expected) for name, rows in HAND.items() for options, expected in rows]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'default'}" for name, options, _ in CASES]
each = pytest.mark.parametrize(("name", "options", "expected"), CASES, ids=IDS)


def test_every_term_has_a_value_by_hand():
    assert set(HAND) == set(TERMS)
    assert all(rows[0][0] == {} for rows in HAND.values()), "the first row of a term is its default"


@each
def test_options_are_those_of_a_recipe(name, options, expected):
    spec = complete({"type": name, **options}, {name: TERMS[name].function}, "here")
    assert_close(call(name, spec, SIGNALS), call(name, options, SIGNALS))


def call(name: str, options: dict, signals: Signals) -> Tensor:
    return TERMS[name].function(signals, **{key: value for key, value in options.items() if key != "type"})


@each
def test_by_hand_and_zero_outside_the_mask(name, options, expected):
    reward = call(name, options, SIGNALS)
    assert reward.dtype == torch.float32
    assert_close(reward, padded(*expected).nan_to_num(0.0))
    assert (reward[~MASK] == 0).all()


@each
def test_reads_what_it_needs_and_no_more(name, options, expected):
    term = TERMS[name]
    wanted = set(term.needs)
    for (option, value), further in term.needs_if.items():
        wanted |= set(further) if options.get(option) == value else set()
    optional = {field.name for field in fields(Signals)} - set(ALWAYS)
    assert wanted <= optional
    bare = replace(SIGNALS, **dict.fromkeys(optional - wanted))
    assert torch.equal(call(name, options, bare), call(name, options, SIGNALS))
    for need in wanted:
        with pytest.raises(AssertionError):
            call(name, options, replace(SIGNALS, **{need: None}))


@each
def test_keeps_the_total_that_it_declares(name, options, expected, generator):
    sums = call(name, options, SIGNALS).sum(-1)
    if TERMS[name].keeps == "score":
        clip, scale = options.get("clip", 10), options.get("scale", 1)
        scores = SIGNALS.scores if clip is None else SIGNALS.scores.clamp(-clip, clip)
        assert_close(sums, torch.where(MASK.any(-1), scale * scores, 0.0), atol=1e-6, rtol=1e-6)
    if TERMS[name].keeps == "zero":
        assert_close(sums, torch.zeros(5), atol=1e-6, rtol=0)


def test_which_totals_are_declared():
    kept = {name: term.keeps for name, term in TERMS.items() if term.keeps}
    assert kept == {"terminal": "score", "attention": "score", "shaped": "zero"}


@each
def test_sees_no_padding_and_no_other_row(name, options, expected):
    reward = call(name, options, SIGNALS)
    tokenwise = {key: getattr(SIGNALS, key) for key in [*TOKENWISE, "mask"]}
    wide = {
        key: torch.nn.functional.pad(x, (0, 5), value=False if x.dtype == torch.bool else NAN)
        for key, x in tokenwise.items()
    }
    assert_close(
        call(name, options, replace(SIGNALS, **wide)), torch.nn.functional.pad(reward, (0, 5)), atol=1e-7, rtol=1e-6
    )
    rows = [call(name, options, SIGNALS.rows(slice(i, i + 1))) for i in range(len(MASK))]
    assert_close(torch.cat(rows), reward, atol=1e-7, rtol=1e-6)
    turned = call(name, options, SIGNALS.rows(torch.arange(4, -1, -1)))
    assert_close(turned.flip(0), reward, atol=1e-7, rtol=1e-6)


@each
def test_finite_values_and_gradients_on_extremes(name, options, expected, generator):
    extremes = torch.tensor([-1e4, -1e3, -1.0, 0.0, 1e3, 1e4])
    rows, width = 400, 5
    mask = torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=generator)

    def drawn(*shape: int) -> Tensor:
        return extremes[torch.randint(0, len(extremes), shape, generator=generator)].requires_grad_()

    given = {key: drawn(rows, width) for key in FLOATS}
    ends = {key: mask & (torch.rand(rows, width, generator=generator) < 0.5) for key in TOKENWISE if key not in FLOATS}
    finished = torch.rand(rows, generator=generator) < 0.5
    signals = Signals(mask=mask, finished=finished, scores=drawn(rows), **given, **ends)
    reward = call(name, options, signals)
    assert torch.isfinite(reward).all() and (reward[~mask] == 0).all()
    if reward.requires_grad:
        for gradient in torch.autograd.grad(reward.sum(), [signals.scores, *given.values()], allow_unused=True):
            assert gradient is None or torch.isfinite(gradient).all()


@each
def test_numeric_gradient(name, options, expected, generator):
    """Of the signals that the term reads, small enough to be off the kinks of a clip."""
    some = SIGNALS.rows(torch.tensor([0, 3]))
    read = ["reference", *(need for need in TERMS[name].needs if need in FLOATS)]
    values = [(0.3 * torch.rand(2, 4, generator=generator) - 0.15).double().requires_grad_() for _ in read]
    scores = torch.rand(2, generator=generator).double().requires_grad_()

    def reward(scores: Tensor, *values: Tensor) -> Tensor:
        return call(name, options, replace(some, scores=scores, **dict(zip(read, values, strict=True))))

    if reward(scores, *values).requires_grad:
        assert torch.autograd.gradcheck(reward, (scores, *values))


def test_no_term_is_called_kl():
    """``rewards.total`` files the penalty under that name."""
    assert "kl" not in TERMS
