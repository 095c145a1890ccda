"""What every preference loss and every reward-model loss promises: a value by hand on ragged rows, finite numbers and
gradients on extreme inputs, the gradient that numbers give, and rows, absent answers and padding that touch nothing.

A new loss needs a row here, or the suite fails. Its finer tests mirror its file.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.preferences.groups import READABLE_GROUP
from rto.preferences.objectives import READABLE
from rto.recipe import complete

NAN = float("nan")
LOSSES = PREFERENCE_LOSSES | REWARD_LOSSES

# --- inputs: three pairs, three prompts with three, two and one answers -------------------------------

PAIRS: dict[str, Tensor] = {
    "chosen": torch.tensor([-10.0, -7.0, -9.0]),
    "rejected": torch.tensor([-12.0, -3.0, -2.0]),
    "chosen_reference": torch.tensor([-12.0, -7.0, -5.0]),  # log-ratios 2, 0, -4
    "rejected_reference": torch.tensor([-11.0, -3.0, -8.0]),  # -1, 0, 6; so h = 3, 0, -10
    "chosen_length": torch.tensor([4.0, 2.0, 1.0]),  # a token: -2.5, -3.5, -9
    "rejected_length": torch.tensor([2.0, 2.0, 1.0]),  # -6, -1.5, -2
    "chosen_kl": torch.tensor([1.0, 0.0, 2.0]),
    "rejected_kl": torch.tensor([3.0, 0.0, 1.0]),
    "margin": torch.tensor([2.0, 0.0, 0.5]),
    "chosen_score": torch.tensor([3.0, 1.0, -1.0]),
    "rejected_score": torch.tensor([1.0, 1.0, 0.0]),
}
GROUPS: dict[str, Tensor] = {
    "there": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool(),
    "logprobs": torch.tensor([[-4.0, -6.0, -9.0], [-5.0, -2.0, NAN], [-3.0, NAN, NAN]]),
    "reference": torch.tensor([[-6.0, -6.0, -8.0], [-1.0, -4.0, NAN], [-3.0, NAN, NAN]]),  # r = 2 0 -1, -4 2, 0
    "lengths": torch.tensor([[4.0, 3.0, 6.0], [5.0, 1.0, NAN], [1.0, NAN, NAN]]),  # a token: -1 -2 -1.5, -1 -2, -3
    "scores": torch.tensor([[1.0, 0.0, 0.25], [0.0, 1.0, NAN], [1.0, NAN, NAN]]),
    "baseline": torch.tensor([1.0, 1.0, -3.0]),
}


def softplus(x: float) -> float:
    """-log sigma(-x)."""
    return math.log(1 + math.exp(x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logit(log_p: float) -> float:
    return math.log(math.exp(log_p) / (1 - math.exp(log_p)))


P = [math.exp(-x) for x in (0, 1, 1.5, 2)]  # exp(-x) for the log-probs a token above

# The value that the default options give.
BY_HAND: dict[str, list[float]] = {
    "dpo": [softplus(-0.3), math.log(2), softplus(1)],
    "ipo": [(1 - 5) ** 2, (0 - 5) ** 2, (-10 - 5) ** 2],  # 2/4 + 1/2, 0, -4 - 6 against 1 / (2 * 0.1)
    "rdpo": [softplus(-0.302), math.log(2), softplus(1)],  # 0.3 + 0.001 * (4 - 2)
    "simpo": [softplus(-8.25), softplus(5.5), softplus(18)],  # 2.5 * (3.5, -2, -7) - 0.5
    "tdpo1": [softplus(-0.1), math.log(2), softplus(0.9)],  # 0.1 * (3 - 2, 0, -10 + 1)
    "tdpo2": [softplus(-0.2), math.log(2), softplus(0.95)],  # 0.1 * (3 - 1, 0, -10 + 0.5)
    "orpo": [a + 0.1 * softplus(logit(-b) - logit(-a)) for a, b in ((2.5, 6.0), (3.5, 1.5), (9.0, 2.0))],
    "cpo": [softplus(-0.2) + 2.5, softplus(0.4) + 3.5, softplus(0.7) + 9],
    "mpo": [-sigma(2) + 0.25, -sigma(-4) + 0.35, -sigma(-7) + 0.9],
    "rebel": [(3 - 2) ** 2, 0, (-10 - 0.5) ** 2],
    # 0.1 * (2 - 1, 0 - 1, -1 - 1), 0.1 * (-4 - 1, 2 - 1), 0.1 * (0 - 0); the first, fifth and sixth are desirable
    "kto": [(sigma(-0.1) + sigma(-0.1) + sigma(-0.2)) / 3, (sigma(-0.5) + sigma(-0.1)) / 2, 0.5],
    "mppo": [softplus(-(2 * P[1] - P[3] - P[2])), softplus(-(P[3] - P[1])), 0],
    "bradley_terry": [softplus(-2), math.log(2), softplus(1)],
}

# Options beside the defaults, for everything but the values.
FURTHER: dict[str, list[dict[str, Any]]] = {
    "dpo": [
        {"label_smoothing": 0.2},
        {"variant": "hinge"},
        {"variant": "robust", "label_smoothing": 0.2},
        {"nll": 0.5},
    ],
    "ipo": [{"average": False}],
    "simpo": [{"gamma": None, "ratio": 0.3, "label_smoothing": 0.1, "nll": 1.0}],
    "kto": [{"desirable": 1.3, "undesirable": 0.7, "desirable_above": 0.2}],
    "mppo": [{"variant": name} for name in ("single", "mns", "mcs", "mcm", "list_mle", "point_ce", "point_mse")],
    "bradley_terry": [{"use_margin": True}, {"centre": 0.01}],
}
CASES = [(name, options) for name in LOSSES for options in [{}, *FURTHER.get(name, [])]]
LENGTHS = {"chosen_length", "rejected_length", "lengths"}
DATA = LENGTHS | {"there", "scores"}  # no gradient is asked for
DETACHED = {"tdpo2": {"chosen_kl"}, "kto": {"baseline"}}

every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o or 'default'}" for n, o in CASES])


def reads(name: str) -> list[str]:
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]


def inputs_of(name: str) -> dict[str, Tensor]:
    return {key: (GROUPS if "there" in reads(name) else PAIRS)[key] for key in reads(name)}


def differentiable(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x if key in DATA else x.clone().requires_grad_() for key, x in inputs.items()}


# --- the table ----------------------------------------------------------------------------------------


def test_every_row_has_a_value_by_hand():
    assert set(BY_HAND) == set(LOSSES), f"the tables of rto.preferences and BY_HAND in {__name__} differ"
    assert not set(PREFERENCE_LOSSES) & set(REWARD_LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_what_pairs_have_or_what_groups_have(name):
    assert set(reads(name)) <= set(READABLE_GROUP if "there" in reads(name) else READABLE)


@pytest.mark.parametrize("name", LOSSES)
def test_options_are_keyword_only_typed_and_have_defaults(name):
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
    assert all((p.default is inspect.Parameter.empty) == (p.name not in options) for p in parameters)
    assert complete({"type": name}, LOSSES, "here") == {"type": name, **options}


# --- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    loss = LOSSES[name](**inputs_of(name))
    assert loss.dtype == torch.float32
    assert_close(loss, torch.tensor(BY_HAND[name], dtype=torch.float32))


@every_case
def test_positional_as_the_loop_calls_it(name, options):
    inputs = inputs_of(name)
    assert torch.equal(LOSSES[name](*inputs.values(), **options), LOSSES[name](**inputs, **options))


@every_case
def test_gradient_is_that_of_the_numbers(name, options):
    """Absent answers hold NaN here: their gradient must be 0."""
    inputs = {key: x if key == "there" else x.double() for key, x in inputs_of(name).items()}
    moved = [key for key in inputs if key not in DATA | DETACHED.get(name, set())]

    def loss(*values: Tensor) -> Tensor:
        return LOSSES[name](**inputs | dict(zip(moved, values, strict=True)), **options)

    assert torch.autograd.gradcheck(loss, [inputs[key].clone().requires_grad_() for key in moved])


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in DETACHED.items() for key in keys])
def test_what_is_detached_has_no_gradient(name, key):
    inputs = differentiable(inputs_of(name))
    LOSSES[name](**inputs).sum().backward()
    assert inputs[key].grad is None
    assert any(x.grad is not None for x in inputs.values())


# --- extremes -----------------------------------------------------------------------------------------

FAR = [-1e4, -1e3, -1.0, 0.0, 1e3]  # as far out as log-probs, scores and margins may ever get
FAR_OF = {
    **dict.fromkeys(LENGTHS, [1.0, 7.0, 1e4]),
    **dict.fromkeys(("chosen_kl", "rejected_kl"), [0.0, 1.0, 1e4]),
}


def far_pairs(names: list[str]) -> dict[str, Tensor]:
    """Every combination."""
    grids = torch.meshgrid(*(torch.tensor(FAR_OF.get(name, FAR)) for name in names), indexing="ij")
    return {name: grid.flatten() for name, grid in zip(names, grids, strict=True)}


def far_groups(names: list[str], options: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Random combinations in 2,000 rows of up to four answers, none included."""
    there = torch.rand(2000, 4, generator=generator) < 0.7
    drawn = {"there": there, "baseline": torch.tensor(FAR)[torch.randint(5, (2000,), generator=generator)]}
    for name in set(names) - set(drawn):
        choices = torch.tensor(FAR_OF.get(name, FAR))
        if name == "scores" and str(options.get("variant")).startswith("point"):
            choices = torch.tensor([0.0, 5.0, 10.0])
        values = choices[torch.randint(len(choices), there.shape, generator=generator)]
        drawn[name] = torch.where(there, values, NAN)
    return {name: drawn[name] for name in names}


@every_case
def test_finite_on_extremes(name, options, generator):
    names = reads(name)
    inputs = differentiable(far_groups(names, options, generator) if "there" in names else far_pairs(names))
    loss = LOSSES[name](**inputs, **options)
    assert loss.shape == next(iter(inputs.values())).shape[:1]
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    for key, x in inputs.items():
        assert x.grad is None or torch.isfinite(x.grad).all(), key


# --- rows, absent answers, padding --------------------------------------------------------------------


@every_case
def test_rows_are_apart(name, options):
    inputs = differentiable(inputs_of(name))
    whole = LOSSES[name](**inputs, **options)
    for row in range(3):
        alone = LOSSES[name](**{key: x[row : row + 1] for key, x in inputs.items()}, **options)
        assert_close(alone, whole[row : row + 1], rtol=1e-6, atol=1e-6)
        wanted = [x for x in inputs.values() if x.requires_grad]
        for gradient in torch.autograd.grad(whole[row], wanted, retain_graph=True, allow_unused=True):
            assert gradient is None or not gradient[torch.arange(3) != row].any()


GROUP_CASES = [(name, options) for name, options in CASES if "there" in reads(name)]


@pytest.mark.parametrize(("name", "options"), GROUP_CASES)
def test_absent_answers_touch_nothing_and_the_order_of_answers_does_not_matter(name, options):
    inputs = inputs_of(name)
    loss = LOSSES[name](**inputs, **options)
    wide = {
        key: x if x.ndim == 1 else pad(x, (1, 2), value=False if key == "there" else 7.0) for key, x in inputs.items()
    }
    assert_close(LOSSES[name](**wide, **options), loss)
    turned = {key: x if x.ndim == 1 else x[:, [2, 0, 1]] for key, x in inputs.items()}
    assert_close(LOSSES[name](**turned, **options), loss)


@pytest.mark.parametrize(("name", "options"), GROUP_CASES)
def test_a_row_without_answers_gives_zero(name, options):
    inputs = inputs_of(name)
    empty = LOSSES[name](**inputs | {"there": torch.zeros(3, 3).bool()}, **options)
    assert torch.equal(empty, torch.zeros(3))
