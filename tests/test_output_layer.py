"""Log-probs from the output layer's weights, block by block, against the formula that holds all logits at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.numerics import token_logprobs
from rto.output_layer import selected_logprobs

N, H, V = 7, 5, 23


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states, weight = (torch.randn(rows, H, generator=generator, dtype=dtype) for rows in (N, V))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[:2] = torch.tensor([0, V - 1])  # the edges of the first and the last block
    return states, weight, labels, torch.randn(N, generator=generator, dtype=dtype)


def formula(states: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logprobs = (states @ weight.T / temperature).log_softmax(-1)
    return logprobs.gather(1, labels[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("block", [1, 4, 23, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", ["both", "states", "weight", "none"])
def test_equal_to_the_formula(trained, temperature, block):
    results = []
    for of in (formula, lambda *given: selected_logprobs(*given, block=block)):
        states, weight, labels, outer = case()
        states.requires_grad_(trained in ("both", "states"))
        weight.requires_grad_(trained in ("both", "weight"))
        logprobs, entropy = of(states, weight, labels, temperature)
        if trained != "none":
            (outer * logprobs).sum().backward()
        results.append((logprobs, entropy, states.grad, weight.grad))
    for expected, got in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert_close(got.detach(), expected.detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(frozen):
    states, weight, labels, _ = case()
    states.requires_grad_()
    weight.requires_grad_(not frozen)

    def logprobs(states: Tensor, weight: Tensor) -> Tensor:
        return selected_logprobs(states, weight, labels, 0.8, block=6)[0]

    assert torch.autograd.gradcheck(logprobs, (states, weight))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_precision(dtype, atol, frozen):
    """Products in the precision of the states, everything else in float32."""
    states, weight, labels, outer = case()
    expected = formula(states, weight, labels)
    low = states.to(dtype).requires_grad_()
    master = weight.float().requires_grad_(not frozen)
    logprobs, entropy = selected_logprobs(low, master, labels, block=6)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_close(logprobs.double(), expected[0], atol=atol, rtol=1e-2)
    assert_close(entropy.double(), expected[1], atol=atol, rtol=1e-2)
    (outer.float() * logprobs).sum().backward()
    assert low.grad is not None and low.grad.dtype == dtype
    assert (master.grad is None) == frozen


def test_an_entropy_that_nobody_reads_is_left_out():
    states, weight, labels, _ = case()
    logprobs, entropy = selected_logprobs(states, weight, labels, entropy=False, block=6)
    assert_close(logprobs, formula(states, weight, labels)[0])
    assert entropy.tolist() == [0.0] * N


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_extreme_logits_by_hand(block, frozen):
    """Logits 1e4, 0, -1e4: the labels' log-probs are 0, -1e4, -2e4, and the entropy is 0. The gradient of a log-prob to
    the one state is its weight less the first word's."""
    states = torch.ones(3, 1).requires_grad_()
    weight = torch.tensor([[1e4], [0.0], [-1e4]]).requires_grad_(not frozen)
    logprobs, entropy = selected_logprobs(states, weight, torch.tensor([0, 1, 2]), block=block)
    assert logprobs.tolist() == [0.0, -1e4, -2e4] and entropy.tolist() == [0.0] * 3
    logprobs.sum().backward()
    assert states.grad is not None and states.grad.flatten().tolist() == [0.0, -1e4, -2e4]
    if not frozen:
        assert weight.grad is not None and weight.grad.flatten().tolist() == [-2.0, 1.0, 1.0]


def test_a_forbidden_word_leaves_the_entropy_finite():
    """Logits 0, 0 and -inf: two words are left, log 2."""
    weight = torch.tensor([[0.0], [0.0], [-math.inf]])
    for block in (1, 2, 3):
        logprobs, entropy = selected_logprobs(torch.ones(1, 1), weight, torch.tensor([0]), block=block)
        assert logprobs.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))


def test_numbers_that_are_none_are_told():
    """A state that is not finite has no log-prob, and the rows beside it keep theirs."""
    states, weight, labels, _ = case()
    expected, _ = formula(states, weight, labels)
    states[3] = math.nan
    logprobs, _ = selected_logprobs(states, weight, labels, block=6)
    assert logprobs[3].isnan()
    rest = torch.arange(N) != 3
    assert_close(logprobs[rest], expected[rest])


@pytest.mark.parametrize("frozen", [False, True])
def test_no_rows_have_a_zero_gradient(frozen):
    _, weight, _, _ = case()
    states = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_(not frozen)
    logprobs, entropy = selected_logprobs(states, weight, torch.zeros(0, dtype=torch.long), block=6)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert states.grad is not None and states.grad.shape == (0, H)
    assert frozen or (weight.grad is not None and (weight.grad == 0).all())


def test_nothing_as_wide_as_the_vocabulary_is_kept():
    states, weight, labels, _ = case()
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    for frozen in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            selected_logprobs(states.requires_grad_(), weight.requires_grad_(not frozen), labels)
        assert kept and all(shape in ((V, H), (N, H), (N,)) for shape in kept)


def test_token_logprobs_take_weights():
    """The same numbers as from a function that makes logits of the states; zero outside the mask."""
    states, weight, labels, _ = case()
    hidden, ids = states[:6].reshape(2, 3, H), labels[:6].reshape(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    for got, expected in zip(
        token_logprobs(hidden, ids, mask, weight, 0.9),
        token_logprobs(hidden, ids, mask, lambda states: states @ weight.T, 0.9),
        strict=True,
    ):
        assert_close(got, expected, atol=1e-12, rtol=1e-12)
