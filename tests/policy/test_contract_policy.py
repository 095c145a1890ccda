"""What every policy loss promises: a value by hand, a numeric gradient check, finite numbers and gradients on extreme
inputs, rows and pairs kept apart, and one loss however the batch is cut. A loss without a row here fails."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.numerics import reduce
from rto.policy import LOSSES, is_pairwise
from rto.recipe import complete

SQRT_E = math.exp(0.5)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()

# Three pairs, kl_coef 0.5. In the first the policy has not moved; in the others log rho_1 = 0.5 and rho_2 = 1.
PAIRS = {
    "first": [-10.0, -9.5, -9.5],
    "second": [-11.0, -11.0, -11.0],
    "first_old": [-10.0, -10.0, -10.0],
    "second_old": [-11.0, -11.0, -11.0],
    "first_reference": [-12.0, -10.5, -10.5],
    "second_reference": [-11.0, -11.0, -11.0],
    "first_reward": [3.0, 1.0, 3.5],
    "second_reward": [1.0, 3.0, 1.0],
    "kl_coef": 0.5,
}


@dataclass
class Hand:
    """Inputs by name and the value that the default options give; ``smooth`` are options and inputs for the numeric
    gradient check, under which nothing that moves is held without gradient."""

    inputs: dict
    expected: list
    smooth: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)


ROWS = {
    # ratio 2 with A = 1 is cut at 1.2, ratio 1/2 is not; with A = -1 the other way round
    "ppo": Hand(
        {
            "logprobs": [[-1.0, -2.0], [-1.0, -2.0]],
            "old": [[-1.0 - math.log(2), -2.0 + math.log(2)]] * 2,
            "advantages": [[1.0, 1.0], [-1.0, -1.0]],
        },
        [[-1.2, -0.5], [2.0, 0.8]],
    ),
    # q = 2 - 0.5 * 2 = 1 with D = 2; then q = -2.5, w = e^0.5 and D = 1, better than its clip 0.7; then q = 2 and the
    # clip binds
    "p3o": Hand(PAIRS, [-1.0, 1.25 * SQRT_E, -0.7 * SQRT_E], smooth={"kl_coef": 0.0}, options={"weight_clip": 1.0}),
    # 0 - (2 - 1); 0.5 - (0.75 - 3); 0.5 - (3.25 - 1)
    "rebel": Hand(PAIRS, [1.0, 2.75**2, 1.75**2]),
}
TOKENWISE = [name for name, function in LOSSES.items() if not is_pairwise(function)]
PAIRWISE = [name for name in LOSSES if name not in TOKENWISE]


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=dtype) for key, value in ROWS[name].inputs.items()}


def moving(name: str) -> list[str]:
    """What a gradient goes to: the policy's own log-probs."""
    return ["logprobs"] if name in TOKENWISE else ["first", "second"]


def test_every_row_has_a_value_by_hand():
    assert set(ROWS) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    assert_close(LOSSES[name](**inputs_of(name)), torch.tensor(ROWS[name].expected))


@pytest.mark.parametrize("name", LOSSES)
def test_reads_what_its_kind_reads_and_options_are_complete(name):
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    read = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert read == (list(PAIRS) if is_pairwise(LOSSES[name]) else ["logprobs", "old", "advantages"])
    options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert complete({"type": name}, LOSSES, "policy.loss") == {"type": name, **options}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    row = ROWS[name]
    inputs = inputs_of(name, torch.float64) | {k: torch.tensor(v, dtype=torch.float64) for k, v in row.smooth.items()}

    def of(*values: Tensor) -> Tensor:
        return LOSSES[name](**inputs | dict(zip(moving(name), values, strict=True)), **row.options)

    assert torch.autograd.gradcheck(of, [inputs[key].clone().requires_grad_() for key in moving(name)])


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_goes_to_the_policy_alone(name):
    """What is old, frozen or a reward gets a gradient only where the formula has it: never from a detached part."""
    inputs = {key: x.requires_grad_(key in moving(name)) for key, x in inputs_of(name).items()}
    LOSSES[name](**inputs).sum().backward()
    assert all((x.grad is not None) == (key in moving(name)) for key, x in inputs.items())


@pytest.mark.parametrize("name", LOSSES)
def test_finite_on_extremes_and_rows_are_kept_apart(name):
    names = list(ROWS[name].inputs)
    wide = [key for key in names if key != "kl_coef"]
    far = torch.tensor([-1e4, -1.0, 0.0, 1e4] if len(wide) < 5 else [-1e4, 0.0, 1e4])
    grid = torch.meshgrid(*[far] * len(wide), indexing="ij")
    inputs = {key: g.flatten().clone().requires_grad_() for key, g in zip(wide, grid, strict=True)}
    if name in TOKENWISE:
        inputs = {key: g.reshape(-1, 1) for key, g in inputs.items()}
    rest = {"kl_coef": torch.tensor(0.05)} if "kl_coef" in names else {}
    whole = LOSSES[name](**inputs, **rest)
    assert whole.shape == inputs[wide[0]].shape and torch.isfinite(whole).all()
    for gradient in torch.autograd.grad(whole.sum(), [inputs[key] for key in moving(name)]):
        assert torch.isfinite(gradient).all()
    some = torch.arange(0, len(whole), 7)
    assert torch.equal(LOSSES[name](**{key: x[some] for key, x in inputs.items()}, **rest), whole[some])


@pytest.mark.parametrize("name", TOKENWISE)
def test_padding_changes_nothing(name, generator):
    """Padded cells hold zeros, as log-probs and advantages do there."""
    inputs = [torch.where(MASK, torch.randn(4, 4, generator=generator), 0.0) for _ in range(3)]
    whole = LOSSES[name](*inputs)
    wide = LOSSES[name](*(torch.nn.functional.pad(x, (0, 2)) for x in inputs))
    assert torch.equal(wide[:, :4], whole) and torch.isfinite(wide).all()


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("name", TOKENWISE)
def test_micro_batches_give_one_loss_and_gradient(name, reduction, generator):
    values = [torch.where(MASK, torch.randn(4, 4, generator=generator, dtype=torch.float64), 0.0) for _ in range(3)]
    logprobs, rest = values[0].requires_grad_(), values[1:]
    total = float(MASK.sum() if reduction == "token" else len(MASK))

    def share(rows: list[int]) -> Tensor:
        losses = LOSSES[name](logprobs[rows], *(x[rows] for x in rest))
        return reduce(losses, MASK[rows], reduction, total)

    whole = share([0, 1, 2, 3])
    gradient = torch.autograd.grad(whole, logprobs)[0]
    for cut in ([[0], [1], [2], [3]], [[3, 0], [2, 1]], [[1, 2, 3], [0]]):
        parts = sum(share(rows) for rows in cut)
        assert_close(parts, whole)
        assert_close(torch.autograd.grad(parts, logprobs)[0], gradient)
    assert (gradient[~MASK] == 0).all()


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_reward_that_both_answers_get_changes_nothing(name):
    """r -> r + delta(x): value and gradient."""
    inputs = inputs_of(name, torch.float64)
    shift = torch.tensor([5.0, -3.0, 100.0], dtype=torch.float64)
    found = []
    for more in (0.0, shift):
        leaves = {key: inputs[key].clone().requires_grad_() for key in moving(name)}
        rewards = {key: inputs[key] + more for key in ("first_reward", "second_reward")}
        loss = LOSSES[name](**inputs | leaves | rewards)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), list(leaves.values()))))
    for plain, shifted in zip(*found, strict=True):
        assert_close(shifted, plain)


@pytest.mark.parametrize("name", PAIRWISE)
def test_swapping_the_answers_changes_nothing(name):
    inputs = inputs_of(name, torch.float64)
    names = {"first": "second", "second": "first"}
    swapped = {}
    for key, value in inputs.items():
        side, _, what = key.partition("_")
        swapped["_".join([names[side], what]).strip("_") if side in names else key] = value
    assert_close(LOSSES[name](**swapped), LOSSES[name](**inputs))
