"""What every row of every table promises: a value by hand, finite numbers and gradients on extreme inputs, zero
outside the mask, and padding that changes nothing.

A new term, loss or estimator needs a row here, or the suite fails. Its finer tests mirror its file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.advantages import ADVANTAGES
from rto.batch import Signals
from rto.policy import LOSSES
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.recipe import complete
from rto.rewards import TERMS

NAN = float("nan")
# A full answer, a partial one, one token, and padding only.
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
# Log-probs, scores, values and advantages as far out as they may ever get.
EXTREMES = torch.tensor([-1e4, -1e3, -1.0, 0.0, 1e3])

FUNCTIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "rewards.TERMS": {name: term.function for name, term in TERMS.items()},
    "preferences.PREFERENCE_LOSSES": PREFERENCE_LOSSES,
    "preferences.REWARD_LOSSES": REWARD_LOSSES,
    "advantages.ADVANTAGES": ADVANTAGES,
    "policy.LOSSES": LOSSES,
}


@dataclass
class Hand:
    """Inputs by name and the value that the default options give, worked by hand."""

    inputs: dict[str, list]
    expected: list


TERM_ROWS = {  # with SIGNALS below
    "terminal": [[0, 0, 0, 2.0], [0, -10.0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]],
    "implicit": [[0.01, 0.025, -0.05, 0.005], [-0.02, 0.05, 0, 0], [-0.05, 0, 0, 0], [0, 0, 0, 0]],
}

PREFERENCE_ROWS = {
    # z = 0.1 * ((-10 + 12) - (-12 + 11)) = 0.3
    "dpo": Hand(
        {"chosen": [-10.0], "rejected": [-12.0], "chosen_reference": [-12.0], "rejected_reference": [-11.0]},
        [math.log(1 + math.exp(-0.3))],
    ),
}

REWARD_ROWS = {
    "bradley_terry": Hand(
        {"chosen_score": [3.0, 1.0], "rejected_score": [1.0, 1.0], "margin": [0.0, 0.0]},
        [math.log(1 + math.exp(-2)), math.log(2)],
    ),
}

ADVANTAGE_ROWS = {
    # delta = 1 + 3 - 2, 4 - 3 = 2, 1;  A = 2 + 0.95 * 1, 1
    "gae": Hand({"rewards": [[1.0, 4.0]], "values": [[2.0, 3.0]]}, [[2.95, 1.0]]),
}

POLICY_ROWS = {
    # ratio 2 with A = 1 is cut at 1.2; ratio 1/2 with A = 1 is not cut
    "ppo": Hand(
        {"logprobs": [[-1.0, -2.0]], "old": [[-1.0 - math.log(2), -2.0 + math.log(2)]], "advantages": [[1.0, 1.0]]},
        [[-1.2, -0.5]],
    ),
}

SIGNALS = Signals(
    mask=MASK,
    finished=torch.tensor([True, True, False, False]),
    logprobs=torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-1.0, -4.0, NAN, NAN], [-2.0, NAN, NAN, NAN], [NAN] * 4]),
    reference=torch.tensor([[-1.2, -1.0, -0.5, -4.0], [-1.0, -2.0, NAN, NAN], [-2.5, NAN, NAN, NAN], [NAN] * 4]),
    guide=torch.tensor([[-1.0, -0.5, -3.0, -3.9], [-1.4, -0.1, NAN, NAN], [-9.5, NAN, NAN, NAN], [NAN] * 4]),
    scores=torch.tensor([2.0, -12.0, 0.5, NAN]),
    values=torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, NAN, NAN], [7.0, NAN, NAN, NAN], [NAN] * 4]),
)
TOKENWISE = [name for name in ("logprobs", "reference", "guide", "values") if name in {f.name for f in fields(Signals)}]


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("rewards.TERMS", TERM_ROWS),
        ("preferences.PREFERENCE_LOSSES", PREFERENCE_ROWS),
        ("preferences.REWARD_LOSSES", REWARD_ROWS),
        ("advantages.ADVANTAGES", ADVANTAGE_ROWS),
        ("policy.LOSSES", POLICY_ROWS),
    ],
)
def test_every_row_has_a_value_by_hand(table, rows):
    assert set(rows) == set(FUNCTIONS[table]), f"{table} and its rows in {__name__} differ"


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in FUNCTIONS for name in FUNCTIONS[table]])
def test_options_are_keyword_only_typed_and_have_defaults(table, name):
    """So a recipe can leave them out, and ``complete`` can check them."""
    parameters = inspect.signature(FUNCTIONS[table][name]).parameters.values()
    options = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
    assert all(p.default is inspect.Parameter.empty for p in parameters if p.name not in options)
    assert complete({"type": name}, FUNCTIONS[table], "here") == {
        "type": name,
        **{key: option.default for key, option in options.items()},
    }


def product(count: int) -> list[Tensor]:
    """Every combination of the extremes for ``count`` inputs, as ``count`` vectors."""
    grids = torch.meshgrid(*[EXTREMES] * count, indexing="ij")
    return [grid.flatten().clone().requires_grad_() for grid in grids]


def check_finite(output: Tensor, inputs: list[Tensor]) -> None:
    assert torch.isfinite(output).all()
    for gradient in torch.autograd.grad(output.sum(), inputs, allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


# --- reward terms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_term_by_hand_and_zero_outside_the_mask(name):
    reward = TERMS[name].function(SIGNALS)
    assert_close(reward, torch.tensor(TERM_ROWS[name]))
    assert (reward[~MASK] == 0).all()


@pytest.mark.parametrize("name", TERMS)
def test_term_reads_what_it_needs_and_no_more(name):
    """It works without the signals that its row does not name, and asks for each one that it does."""
    term = TERMS[name]
    optional = {field.name for field in fields(Signals) if field.default is None}
    bare = replace(SIGNALS, **dict.fromkeys(optional - set(term.needs)))
    assert torch.equal(term.function(bare), term.function(SIGNALS))
    for need in set(term.needs) & optional:
        with pytest.raises(AssertionError):
            term.function(replace(SIGNALS, **{need: None}))


@pytest.mark.parametrize("name", TERMS)
def test_term_keeps_the_sentence_reward(name):
    if TERMS[name].keeps:
        sums = TERMS[name].function(SIGNALS).sum(-1)
        assert_close(sums, torch.where(MASK.any(-1), SIGNALS.scores.clamp(-10, 10), 0.0))


@pytest.mark.parametrize("name", TERMS)
def test_term_does_not_see_padding_or_other_rows(name):
    reward = TERMS[name].function(SIGNALS)
    wide = replace(
        SIGNALS,
        mask=torch.nn.functional.pad(MASK, (0, 2)),
        **{key: torch.nn.functional.pad(getattr(SIGNALS, key), (0, 2), value=NAN) for key in TOKENWISE},
    )
    assert torch.equal(TERMS[name].function(wide), torch.nn.functional.pad(reward, (0, 2)))
    rows = [TERMS[name].function(SIGNALS.rows(slice(i, i + 1))) for i in range(len(MASK))]
    assert torch.equal(torch.cat(rows), reward)


@pytest.mark.parametrize("name", TERMS)
def test_term_is_finite_on_extremes(name):
    values = product(len(TOKENWISE))
    signals = Signals(
        mask=torch.ones(len(values[0]), 1).bool(),
        finished=torch.ones(len(values[0])).bool(),
        scores=values[0].detach() * 7,
        **{key: value[:, None] for key, value in zip(TOKENWISE, values, strict=True)},
    )
    reward = TERMS[name].function(signals)
    assert torch.isfinite(reward).all()
    if reward.requires_grad:
        check_finite(reward, values)


def test_no_term_is_called_kl():
    """``rewards.total`` files the penalty under that name."""
    assert "kl" not in TERMS


# --- preference and reward-model losses ---------------------------------------------------------------

PAIRWISE = [(PREFERENCE_LOSSES[name], row) for name, row in PREFERENCE_ROWS.items() if name in PREFERENCE_LOSSES]
PAIRWISE += [(REWARD_LOSSES[name], row) for name, row in REWARD_ROWS.items() if name in REWARD_LOSSES]
PAIRWISE_NAMES = [function.__name__ for function, _ in PAIRWISE]


@pytest.mark.parametrize(("loss", "row"), PAIRWISE, ids=PAIRWISE_NAMES)
def test_pairwise_loss_by_hand(loss, row):
    assert_close(loss(**{key: torch.tensor(value) for key, value in row.inputs.items()}), torch.tensor(row.expected))


@pytest.mark.parametrize(("loss", "row"), PAIRWISE, ids=PAIRWISE_NAMES)
def test_pairwise_loss_is_finite_on_extremes_and_keeps_rows_apart(loss, row):
    values = product(len(row.inputs))
    whole = loss(**dict(zip(row.inputs, values, strict=True)))
    assert whole.shape == values[0].shape
    check_finite(whole, values)
    some = torch.arange(0, len(whole), 7)
    assert_close(loss(**{key: value[some] for key, value in zip(row.inputs, values, strict=True)}), whole[some])


# --- advantages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantage_by_hand(name):
    row = ADVANTAGE_ROWS[name]
    inputs = {key: torch.tensor(value) for key, value in row.inputs.items()}
    advantages, _ = ADVANTAGES[name](**inputs, mask=torch.ones_like(inputs["rewards"]).bool())
    assert_close(advantages, torch.tensor(row.expected))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantage_does_not_see_padding(name, generator):
    rewards, values = (torch.where(MASK, torch.randn(4, 4, generator=generator), NAN) for _ in range(2))
    whole = ADVANTAGES[name](rewards, values, MASK)
    wide = ADVANTAGES[name](
        *(torch.nn.functional.pad(x, (0, 2), value=NAN) for x in (rewards, values)),
        torch.nn.functional.pad(MASK, (0, 2)),
    )
    for got, padded in zip(whole, wide, strict=True):
        assert torch.isfinite(got).all() and (got[~MASK] == 0).all()
        assert_close(padded, torch.nn.functional.pad(got, (0, 2)))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantage_is_finite_on_extremes(name):
    values = product(2)
    rewards, critic = (value.reshape(5, 5) for value in values)
    mask = torch.arange(5) < torch.arange(1, 6)[:, None]
    check_finite(torch.stack(ADVANTAGES[name](rewards, critic, mask)), values)


# --- policy losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss_by_hand(name):
    row = POLICY_ROWS[name]
    inputs = {key: torch.tensor(value) for key, value in row.inputs.items()}
    assert_close(LOSSES[name](**inputs), torch.tensor(row.expected))


@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss_is_finite_on_extremes(name):
    values = product(3)
    check_finite(LOSSES[name](*(value.reshape(25, 5) for value in values)), values)


@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss_does_not_see_padding(name, generator):
    """Padded cells hold zeros (log-probs and advantages are zero there): their loss is finite, the others' unmoved."""
    inputs = [torch.where(MASK, torch.randn(4, 4, generator=generator), 0.0) for _ in range(3)]
    whole = LOSSES[name](*inputs)
    wide = LOSSES[name](*(torch.nn.functional.pad(x, (0, 2)) for x in inputs))
    assert torch.equal(wide[:, :4], whole) and torch.isfinite(wide).all()
