"""KL between two models' next-token distributions against the formula that holds all logits at once."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.numerics import token_kl

NAN = float("nan")
# A full row, a partial one, one token, and padding only.
RAGGED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
B, T, H, K, V = 4, 4, 3, 2, 11  # the reference's states are smaller


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States and output layer of the policy, states and output layer of the reference."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, H), (V, H), (B, T, K), (V, K)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return tuple(tensor.requires_grad_() for tensor in tensors)  # type: ignore[return-value]


def kl(states: Tensor, weight: Tensor, frozen: Tensor, frozen_weight: Tensor, chunk: int = 256) -> Tensor:
    return token_kl(states, frozen, RAGGED, lambda s: s @ weight.T, lambda s: s @ frozen_weight.T, chunk)


def unchunked(states: Tensor, weight: Tensor, frozen: Tensor, frozen_weight: Tensor) -> Tensor:
    """sum over words of q (log q - log p), q the reference."""
    q, p = (frozen @ frozen_weight.T).softmax(-1).detach(), (states @ weight.T).softmax(-1)
    return torch.where(RAGGED, (q * (q.log() - p.log())).sum(-1), 0.0)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_the_unchunked_formula(chunk):
    outer = torch.arange(1.0, B * T + 1, dtype=torch.float64).reshape(B, T)  # another weight for every token
    results = []
    for read in (lambda *given: kl(*given, chunk=chunk), unchunked):
        states, weight, frozen, frozen_weight = case()
        found = read(states, weight, frozen, frozen_weight)
        (outer * found).sum().backward()
        assert frozen.grad is None and frozen_weight.grad is None
        results.append((found.detach(), states.grad, weight.grad))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_by_hand():
    """Reference (1/2, 1/2), policy (3/4, 1/4): 1/2 log(2/3) + 1/2 log 2. The other way round it would be another."""
    one, yes = torch.ones(1, 1, 1), torch.ones(1, 1).bool()
    found = token_kl(one, one, yes, lambda s: s * torch.tensor([3.0, 1.0]).log(), lambda s: s * torch.zeros(2))
    assert found.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)


def test_equal_models_have_no_kl_and_no_slope():
    states, weight, _, _ = case()
    found = token_kl(states, states.detach(), RAGGED, lambda s: s @ weight.T, lambda s: s @ weight.T)
    found.sum().backward()
    assert states.grad is not None
    assert (found == 0).all() and states.grad.abs().max() < 1e-12


def test_outside_the_mask_there_is_nothing():
    states, weight, frozen, frozen_weight = case()
    states = torch.where(RAGGED[..., None], states.detach(), NAN).requires_grad_()
    frozen = torch.where(RAGGED[..., None], frozen.detach(), NAN)
    found = kl(states, weight, frozen, frozen_weight, chunk=2)
    found.sum().backward()
    assert (found[~RAGGED] == 0).all() and (found[RAGGED] > 0).all()
    assert states.grad is not None and weight.grad is not None
    assert (states.grad[~RAGGED] == 0).all() and torch.isfinite(states.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_padding_only_gives_zero_with_a_zero_gradient():
    states, weight, frozen, frozen_weight = case()
    found = token_kl(states, frozen, RAGGED & False, lambda s: s @ weight.T, lambda s: s @ frozen_weight.T)
    found.sum().backward()
    assert (found == 0).all()
    assert states.grad is not None and (states.grad == 0).all()


def test_gradcheck():
    states, weight, frozen, frozen_weight = case()

    def read(states: Tensor, weight: Tensor) -> Tensor:
        return kl(states, weight, frozen.detach(), frozen_weight.detach(), chunk=3)

    assert torch.autograd.gradcheck(read, (states, weight))


def test_extreme_logits_stay_finite():
    """The reference is sure of word 0 and the policy of word 1: 2e4 nats. Where both agree, 0."""
    row, yes = torch.tensor([[1e4, -1e4]]), torch.ones(1, 2).bool()
    states = torch.tensor([[[-1.0], [1.0]]], requires_grad=True)
    found = token_kl(states, torch.ones(1, 2, 1), yes, lambda s: s @ row, lambda s: s @ row)
    assert found.tolist() == [[2e4, 0.0]]
    found.sum().backward()
    assert states.grad is not None and torch.isfinite(states.grad).all()


def test_a_word_that_both_forbid_adds_nothing():
    forbid, yes = torch.tensor([0.0, 0.0, -math.inf]), torch.ones(1, 1).bool()
    states = torch.zeros(1, 1, 1, requires_grad=True)

    def project(states: Tensor) -> Tensor:
        return states.expand(-1, 3) * torch.tensor([1.0, 2.0, 3.0]) + forbid

    found = token_kl(states, states.detach(), yes, project, project)
    found.sum().backward()
    assert found.item() == 0.0
    assert states.grad is not None and torch.isfinite(states.grad).all()


def test_half_precision_states_give_float32():
    found = kl(*case(torch.bfloat16))
    states, weight, frozen, frozen_weight = (tensor.detach() for tensor in case(torch.bfloat16))
    q, p = ((s @ w.T).float().log_softmax(-1) for s, w in ((frozen, frozen_weight), (states, weight)))
    assert found.dtype == torch.float32
    assert_close(found[RAGGED].detach(), (q.exp() * (q - p)).sum(-1)[RAGGED])


def test_logits_are_never_held():
    """Forward keeps no logits for the backward pass, and both passes see at most ``chunk`` rows at a time."""
    states, weight, frozen, frozen_weight = case()
    alive: list[weakref.ref[Tensor]] = []
    rows: list[int] = []

    def project(states: Tensor) -> Tensor:
        logits = states @ weight.T
        alive.append(weakref.ref(logits))
        rows.append(len(states))
        return logits

    found = token_kl(states, frozen, RAGGED, project, lambda s: s @ frozen_weight.T, chunk=2)
    assert rows == [2, 2, 2, 1]
    assert not [reference for reference in alive if reference() is not None]
    found.sum().backward()
    assert sorted(rows) == [1, 1, 2, 2, 2, 2, 2, 2]  # each chunk once more, not more at once
    with torch.no_grad():
        rows.clear()
        assert not token_kl(states, frozen, RAGGED, project, lambda s: s @ frozen_weight.T, chunk=3).requires_grad
    assert rows == [3, 3, 1]  # nothing twice without gradients
