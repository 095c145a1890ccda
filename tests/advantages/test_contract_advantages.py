"""What every advantage estimator promises: a value by hand on ragged answers, finite numbers on extreme inputs, zero
outside the mask, prompts kept apart, and padding that changes nothing. An estimator without a row here fails."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.advantages import ADVANTAGES, reads
from rto.recipe import complete

NAN = float("nan")
# Two answers to one prompt; one answer that has lost the others, and a row of padding that is no answer.
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
GROUP = torch.tensor([0, 0, 7, 7])
TOKENWISE = {
    "rewards": [[1.0, 2.0, 3.0], [0.0, 4.0, NAN], [5.0, NAN, NAN], [NAN] * 3],
    "values": [[4.0, 4.0, 2.0], [1.0, 2.0, NAN], [7.0, NAN, NAN], [NAN] * 3],
    "penalty": [[-1.0, 0.0, 1.0], [0.0, 1.0, NAN], [-2.0, NAN, NAN], [NAN] * 3],
    "greedy": [[0.0, 3.0, 3.0], [1.0, 1.0, NAN], [1.0, NAN, NAN], [NAN] * 3],
}
RETURNS = [[6.0, 5.0, 3.0], [4.0, 4.0, 0.0], [5.0, 0.0, 0.0], [0.0] * 3]
BY_HAND = {
    # delta 1 0 1 | 1 2 | -2 and A_t = delta_t + 0.95 A_(t+1)
    "gae": [[1.9025, 0.95, 1.0], [2.9, 2.0, 0.0], [-2.0, 0.0, 0.0], [0.0] * 3],
    "reinforce": RETURNS,
    "reinforce++": RETURNS,
    # the other's return at the same place: 4 4 4 | 6 5 | none
    "rloo": [[2.0, 1.0, -1.0], [-2.0, -1.0, 0.0], [0.0] * 3, [0.0] * 3],
    # means 5 4.5 3.5; variances 2 0.5 0.5, in the mean 1
    "grpo": [[1.0, 0.5, -0.5], [-1.0, -0.5, 0.0], [0.0] * 3, [0.0] * 3],
    # returns without KL 6 4 2 | 3 3 | 7, less greedy 6 1 -1 | 2 2 | 6, at most 5, and the token's own KL again
    "remax": [[4.0, 1.0, 0.0], [2.0, 3.0, 0.0], [3.0, 0.0, 0.0], [0.0] * 3],
}
NAMES = pytest.mark.parametrize("name", ADVANTAGES)


def estimate(name: str, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    function = ADVANTAGES[name].function
    return function(**{key: inputs[key] for key in reads(function)}, **options)


def example() -> dict[str, Tensor]:
    return {"mask": MASK, "group": GROUP, **{key: torch.tensor(value) for key, value in TOKENWISE.items()}}


def widen(inputs: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
    """The same answers with more padding."""
    fill = {"mask": False}
    return {
        key: x if key == "group" else torch.nn.functional.pad(x, (0, extra), value=fill.get(key, NAN))
        for key, x in inputs.items()
    }


def test_every_row_has_a_value_by_hand():
    assert set(BY_HAND) == set(ADVANTAGES)


@NAMES
def test_by_hand(name):
    advantages, returns = estimate(name, example())
    assert_close(advantages, torch.tensor(BY_HAND[name]))
    if name == "gae":
        values = torch.where(MASK, torch.tensor(TOKENWISE["values"]), 0.0)
        assert_close(returns, advantages + values)
    else:
        assert returns.tolist() == RETURNS


@NAMES
def test_what_it_reads_is_known_and_its_options_are_complete(name):
    function = ADVANTAGES[name].function
    assert set(reads(function)) <= set(example())
    parameters = inspect.signature(function).parameters
    options = {key: p.default for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    functions = {key: row.function for key, row in ADVANTAGES.items()}
    assert complete({"type": name}, functions, "policy.advantage") == {"type": name, **options}


@NAMES
def test_padding_changes_nothing_and_is_zero(name):
    inputs = example()
    for got, wide in zip(estimate(name, inputs), estimate(name, widen(inputs, 2)), strict=True):
        assert torch.equal(wide, torch.nn.functional.pad(got, (0, 2)))
        assert (got[~MASK] == 0).all() and torch.isfinite(got).all()
    dropped = {key: x[:3] for key, x in inputs.items()}  # a row without tokens takes no part
    for got, fewer in zip(estimate(name, inputs), estimate(name, dropped), strict=True):
        assert torch.equal(got[:3], fewer)


@NAMES
def test_prompts_are_kept_apart(name, generator):
    """Each prompt alone gives the same numbers, in any order of the rows and whatever the prompts are numbered."""
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 4])[:, None]
    inputs = {key: torch.randn(6, 5, generator=generator) for key in TOKENWISE}
    inputs |= {"mask": mask, "group": torch.tensor([3, 1, 3, 8, 1, 3])}
    whole = estimate(name, inputs)
    for number in (1, 3, 8):
        rows = inputs["group"] == number
        for got, alone in zip(whole, estimate(name, {k: x[rows] for k, x in inputs.items()}), strict=True):
            assert_close(got[rows], alone)
    order = torch.tensor([4, 0, 5, 3, 1, 2])
    for got, mixed in zip(whole, estimate(name, {k: x[order] for k, x in inputs.items()}), strict=True):
        assert_close(mixed, got[order])


@NAMES
def test_finite_on_extremes(name):
    far = torch.tensor([-1e4, -1.0, 0.0, 1e4])
    grids = [g.reshape(64, 4) for g in torch.meshgrid(far, far, far, far, indexing="ij")]
    inputs = dict(zip(TOKENWISE, grids, strict=True))
    inputs |= {"mask": torch.arange(4) < (torch.arange(64) % 5)[:, None], "group": torch.arange(64) // 3}
    for found in estimate(name, inputs):
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
        assert (found[~inputs["mask"]] == 0).all()


@NAMES
def test_double_precision_stays(name):
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in example().items()}
    assert all(found.dtype == torch.float64 for found in estimate(name, inputs))


def test_unknown_option_is_refused():
    functions = {key: row.function for key, row in ADVANTAGES.items()}
    with pytest.raises(ValueError, match="unknown key lam"):
        complete({"type": "rloo", "lam": 0.9}, functions, "policy.advantage")


def test_conventions():
    """As published: the rows that are whitened, and those that compare answers."""
    assert {name for name, row in ADVANTAGES.items() if row.whiten} == {"gae", "reinforce++"}
    assert {name for name, row in ADVANTAGES.items() if row.group > 1} == {"rloo", "grpo"}
    assert {name for name, row in ADVANTAGES.items() if "values" in reads(row.function)} == {"gae"}
    assert reads(ADVANTAGES["remax"].function) == ("rewards", "mask", "penalty", "greedy")
