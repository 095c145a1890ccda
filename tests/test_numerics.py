"""Masked statistics, the reduction, and token log-probs against the formula that holds all logits at once."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.numerics import masked_mean, masked_sum, predicting, reduce, token_logprobs, whiten

NAN = float("nan")
# A full row, a partial one, one token, and padding only.
RAGGED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
NOTHING = torch.zeros(2, 3).bool()


# --- masked statistics --------------------------------------------------------------------------------


def test_masked_sum_and_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, NAN, NAN], [-2.0, NAN, NAN, NAN], [NAN] * 4])
    assert masked_sum(x, RAGGED).tolist() == [10.0, 12.0, -2.0, 0.0]
    assert masked_mean(x, RAGGED).item() == pytest.approx((10 + 12 - 2) / 7)


def test_statistics_of_nothing_are_zero():
    x = torch.full((2, 3), NAN)
    assert masked_sum(x, NOTHING).tolist() == [0.0, 0.0]
    assert masked_mean(x, NOTHING).item() == 0.0
    assert whiten(x, NOTHING).tolist() == [[0.0] * 3] * 2


def test_whiten_by_hand():
    """Cells 1, 2, 6: mean 3, population variance ((-2)^2 + (-1)^2 + 3^2) / 3 = 14/3."""
    x, mask = torch.tensor([[1.0, 2.0], [6.0, NAN]]), torch.tensor([[True, True], [True, False]])
    std = math.sqrt(14 / 3)
    assert_close(whiten(x, mask), torch.tensor([[-2.0, -1.0], [3.0, 0.0]]) / std)
    assert_close(whiten(x, mask, shift_mean=False), torch.tensor([[1.0, 2.0], [6.0, 0.0]]) / std)


def test_whiten_has_mean_zero_and_population_variance_one(generator):
    x = torch.randn(4, 4, generator=generator, dtype=torch.float64) * 7 + 100
    cells = whiten(x, RAGGED)[RAGGED]
    assert_close(cells.mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close((cells**2).mean(), torch.ones((), dtype=torch.float64))
    assert (whiten(x, RAGGED)[~RAGGED] == 0).all()


def test_whiten_a_constant():
    """The variance is held at 1e-8: no spread gives zero, not NaN; without the shift it gives x * 1e4."""
    x = torch.full((4, 4), 2.0)
    assert (whiten(x, RAGGED) == 0).all()
    assert_close(whiten(x, RAGGED, shift_mean=False), torch.where(RAGGED, 2e4, 0.0))


# --- the reduction ------------------------------------------------------------------------------------


def test_reduce_by_hand():
    loss = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 7.0, NAN, NAN], [-2.0, NAN, NAN, NAN], [NAN] * 4])
    assert reduce(loss, RAGGED, "token", 7).item() == pytest.approx((12 + 12 - 2) / 7)
    assert reduce(loss, RAGGED, "sequence", 4).item() == pytest.approx((12 / 4 + 12 / 2 - 2 / 1 + 0) / 4)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_shares_of_micro_batches_add_up(reduction, micro, generator):
    mask = torch.cat([RAGGED, RAGGED.flip(0)])
    total = mask.sum().item() if reduction == "token" else len(mask)
    values = torch.randn(8, 4, generator=generator, dtype=torch.float64)

    def whole_and_gradient(size: int) -> tuple[Tensor, Tensor]:
        weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
        shares = [
            reduce((weight * values[i : i + size]) ** 2, mask[i : i + size], reduction, total)
            for i in range(0, 8, size)
        ]
        for share in shares:
            share.backward()
        assert weight.grad is not None
        return torch.stack(shares).sum().detach(), weight.grad

    (loss, gradient), (cut_loss, cut_gradient) = whole_and_gradient(8), whole_and_gradient(micro)
    assert_close(cut_loss, loss, atol=1e-14, rtol=1e-14)
    assert_close(cut_gradient, gradient, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_nan_outside_the_mask_does_not_leak(reduction):
    """The value and the gradient at the loss itself are clean whatever the masked cells hold."""
    loss = torch.where(RAGGED, 1.0, NAN).requires_grad_()
    share = reduce(loss, RAGGED, reduction, 4)
    share.backward()
    assert torch.isfinite(share)
    assert loss.grad is not None
    assert torch.isfinite(loss.grad).all() and (loss.grad[~RAGGED] == 0).all() and (loss.grad[RAGGED] > 0).all()


def test_what_reduce_cannot_mend():
    """Upstream, a masked cell sends back 0 times its own derivative: NaN where that derivative is NaN or infinite.

    So a loss must be differentiable in masked cells too; the log-probs there are 0, never NaN or -inf.
    """
    x = torch.ones(1, 2, requires_grad=True)
    reduce(x * torch.tensor([[3.0, NAN]]), torch.tensor([[True, False]]), "token", 1).backward()
    assert x.grad is not None
    assert x.grad[0, 0] == 3.0 and x.grad[0, 1].isnan()


# --- the one shift ------------------------------------------------------------------------------------


def test_predicting_by_hand():
    """Prompt at positions 0 1 2, response at 3 4: the states at 2 and 3 predict it."""
    hidden = torch.arange(5.0).reshape(1, 5, 1)
    assert predicting(hidden, 2).flatten().tolist() == [2.0, 3.0]
    assert predicting(hidden, 1).flatten().tolist() == [3.0]
    assert predicting(hidden, 4).flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


# --- token log-probs ----------------------------------------------------------------------------------

B, T, H, V = 4, 4, 3, 11


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, projection and labels; the labels of masked cells are no tokens at all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (B, T), generator=generator).masked_fill(~RAGGED, -100)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def unchunked(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log softmax(h W^T / temperature), gathered; and -sum p log p."""
    all_logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return torch.where(RAGGED, logprobs, 0.0), torch.where(RAGGED, entropy, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_token_logprobs_equal_the_unchunked_formula(chunk, temperature):
    outer = torch.arange(1.0, B * T + 1, dtype=torch.float64).reshape(B, T)  # another weight for every token
    results = []
    for chunked in (True, False):
        hidden, weight, labels = case()
        if chunked:
            project = lambda states, weight=weight: states @ weight.T  # noqa: E731
            logprobs, entropy = token_logprobs(hidden, labels, RAGGED, project, temperature, chunk)
            assert not entropy.requires_grad
        else:
            logprobs, entropy = unchunked(hidden, weight, labels, temperature)
        (outer * logprobs).sum().backward()
        results.append((logprobs, entropy.detach(), hidden.grad, weight.grad))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_masked_cells_are_zero_and_get_no_gradient():
    hidden, weight, labels = case()
    logprobs, entropy = token_logprobs(hidden, labels, RAGGED, lambda states: states @ weight.T, chunk=2)
    assert (logprobs[~RAGGED] == 0).all() and (entropy[~RAGGED] == 0).all()
    assert (logprobs[RAGGED] < 0).all() and (entropy[RAGGED] > 0).all()
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[~RAGGED] == 0).all() and (hidden.grad[RAGGED] != 0).all()


def test_masked_states_may_be_nan():
    hidden, weight, labels = case()
    hidden = torch.where(RAGGED[..., None], hidden.detach(), NAN).requires_grad_()
    logprobs, _ = token_logprobs(hidden, labels, RAGGED, lambda states: states @ weight.T)
    logprobs.sum().backward()
    assert torch.isfinite(logprobs).all()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


def test_padding_only_gives_zero_with_a_zero_gradient():
    hidden, weight, labels = case()
    logprobs, entropy = token_logprobs(hidden, labels, RAGGED & False, lambda states: states @ weight.T)
    logprobs.sum().backward()
    assert (logprobs == 0).all() and (entropy == 0).all()
    assert hidden.grad is not None and (hidden.grad == 0).all()
    assert weight.grad is not None and (weight.grad == 0).all()


def test_gradcheck():
    hidden, weight, labels = case()

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return token_logprobs(hidden, labels, RAGGED, lambda states: states @ weight.T, 0.8, chunk=3)[0]

    assert torch.autograd.gradcheck(logprobs, (hidden, weight))


def test_half_precision_states_give_float32():
    hidden, weight, labels = case(torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, labels, RAGGED, lambda states: states @ weight.T)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logits = hidden.detach()[RAGGED] @ weight.detach().T  # rounded to bfloat16; everything after it is not
    expected = logits.float().log_softmax(-1).gather(-1, labels[RAGGED][:, None]).squeeze(-1)
    assert_close(logprobs.detach()[RAGGED], expected)


def test_uniform_logits_by_hand():
    _, _, labels = case()
    logprobs, entropy = token_logprobs(torch.zeros(B, T, H), labels, RAGGED, lambda states: states @ torch.ones(H, V))
    assert_close(logprobs[RAGGED], torch.full((7,), -math.log(V)))
    assert_close(entropy[RAGGED], torch.full((7,), math.log(V)))


def test_extreme_logits_stay_finite():
    """Logits 1e4, 0, -1e4: the labels' log-probs are 0, -1e4, -2e4; the entropy is 0."""
    hidden = torch.ones(1, 3, 1, requires_grad=True)
    row = torch.tensor([[1e4, 0.0, -1e4]])
    mask = torch.ones(1, 3).bool()
    logprobs, entropy = token_logprobs(hidden, torch.tensor([[0, 1, 2]]), mask, lambda states: states @ row)
    assert logprobs.tolist() == [[0.0, -1e4, -2e4]] and entropy.tolist() == [[0.0, 0.0, 0.0]]
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [0.0, -1e4, -2e4]


def test_a_forbidden_word_leaves_the_entropy_finite():
    """A logit of -inf has probability 0 and adds 0 to the entropy: two words are left, log 2."""
    mask = torch.ones(1, 1).bool()
    forbid = torch.tensor([0.0, 0.0, -math.inf])
    _, entropy = token_logprobs(
        torch.zeros(1, 1, 1), torch.tensor([[0]]), mask, lambda states: states.expand(-1, 3) + forbid
    )
    assert entropy.item() == pytest.approx(math.log(2))


def test_logits_are_never_held():
    """Forward keeps no logits for the backward pass, and both passes see at most ``chunk`` rows at a time."""
    hidden, weight, labels = case()
    alive: list[weakref.ref[Tensor]] = []
    rows: list[int] = []
    saved: list[int] = []

    def project(states: Tensor) -> Tensor:
        logits = states @ weight.T
        alive.append(weakref.ref(logits))
        rows.append(len(states))
        return logits

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, _ = token_logprobs(hidden, labels, RAGGED, project, chunk=2)
        assert rows == [2, 2, 2, 1]
        assert not [reference for reference in alive if reference() is not None]
        assert saved and max(saved) < RAGGED.sum() * V < B * T * V
    logprobs.sum().backward()
    assert sorted(rows) == [1, 1, 2, 2, 2, 2, 2, 2]  # each chunk once more, not more at once


def test_without_gradients_nothing_is_computed_twice():
    hidden, weight, labels = case()
    calls = []

    def project(states: Tensor) -> Tensor:
        calls.append(len(states))
        return states @ weight.T

    with torch.no_grad():
        logprobs, _ = token_logprobs(hidden, labels, RAGGED, project, chunk=3)
    assert calls == [3, 3, 1] and not logprobs.requires_grad
    assert_close(logprobs, unchunked(hidden, weight, labels)[0].detach())
