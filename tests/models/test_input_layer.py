from typing import Any

import pytest
import torch
from torch import nn

from rto import output_layer
from rto.input_layer import SummingEmbedding, sum_in_place
from rto.output_layer import selected_logprobs


def test_rows_and_their_gradient_are_those_of_torch() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(7, 3, padding_idx=2, dtype=torch.float64)
    ours = nn.Embedding(7, 3, padding_idx=2, dtype=torch.float64)
    ours.load_state_dict(plain.state_dict())
    sum_in_place(ours)
    assert type(ours) is SummingEmbedding
    ids, weights = torch.tensor([[0, 2, 6], [6, 6, 1]]), torch.randn(2, 3, 3, dtype=torch.float64)
    for _ in range(2):  # a second pass adds to the first
        for layer in (plain, ours):
            (layer(ids) * weights).sum().backward()
        assert plain.weight.grad is not None
        assert torch.equal(ours(ids), plain(ids))
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=0, atol=1e-14)
    assert not ours.weight.grad[2].any()  # padding is never trained


def test_a_table_that_embeds_and_predicts_gets_one_gradient() -> None:
    """Two passes over tied weights, against logits and log-softmax written out. The gradient stays where it is."""
    torch.manual_seed(0)
    ours = nn.Embedding(11, 4, dtype=torch.float64)
    plain = nn.Parameter(ours.weight.detach().clone())
    sum_in_place(ours)
    place = None
    for seed in (1, 2):
        torch.manual_seed(seed)
        ids, labels = torch.randint(11, (6,)), torch.randint(11, (6,))
        selected_logprobs(ours(ids).tanh(), ours.weight, labels, 0.7, block=4)[0].sum().backward()
        logits = plain[ids].tanh() @ plain.T / 0.7
        logits.log_softmax(-1).gather(1, labels[:, None]).sum().backward()
        torch.testing.assert_close(ours.weight.grad, plain.grad, rtol=0, atol=1e-13)
        assert ours.weight.grad is not None
        place = place or ours.weight.grad.data_ptr()
        assert ours.weight.grad.data_ptr() == place


def test_a_table_that_only_predicts_sums_too() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(9, 4, dtype=torch.float64))
    states, labels = torch.randn(5, 4, dtype=torch.float64), torch.randint(9, (5,))
    for _ in range(2):
        selected_logprobs(states, weight, labels, block=4)[0].sum().backward()
    twin = weight.detach().clone().requires_grad_()
    (2 * (states @ twin.T).log_softmax(-1).gather(1, labels[:, None]).sum()).backward()
    torch.testing.assert_close(weight.grad, twin.grad, rtol=0, atol=1e-13)


def test_other_embeddings_are_left_alone() -> None:
    class Scaled(nn.Embedding):
        pass

    for layer in (Scaled(3, 2), nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2, scale_grad_by_freq=True)):
        kind = type(layer)
        sum_in_place(layer)
        assert type(layer) is kind
    frozen = nn.Embedding(3, 2).requires_grad_(False)
    sum_in_place(frozen)
    assert not frozen(torch.tensor([1])).requires_grad


def test_a_gradient_that_lacks_memory_half_way_leaves_nothing(monkeypatch) -> None:
    weight = nn.Parameter(torch.randn(9, 4))
    states, labels = torch.randn(5, 4, requires_grad=True), torch.randint(9, (5,))
    scores = selected_logprobs(states, weight, labels, block=4)[0]
    blocks = output_layer._blocks

    def lacking(*given: Any) -> Any:
        yield blocks(*given)[0]
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(output_layer, "_blocks", lacking)
        scores.sum().backward()
    assert weight.grad is None
