"""Gradients of a table that are made at the end of a batch, against those of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rto import late, output_layer
from rto.input_layer import sum_in_place
from rto.late import Late, late_gradients
from rto.output_layer import selected_logprobs
from rto.room import Room

V, H = 11, 4


def a_table(seed: int = 0) -> nn.Embedding:
    torch.manual_seed(seed)
    table = nn.Embedding(V, H, dtype=torch.float64)
    sum_in_place(table)
    return table


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids, labels and outer gradients of passes."""
    torch.manual_seed(1)
    return [(torch.randint(V, (n,)), torch.randint(V, (n,)), torch.randn(n, dtype=torch.float64)) for n in sizes]


def losses(table: nn.Embedding, sizes: list[int], temperature: float = 0.7) -> list[Tensor]:
    """A table that embeds and predicts, a pass each."""
    return [
        (outer * selected_logprobs(table(ids).tanh(), table.weight, labels, temperature)[0]).sum()
        for ids, labels, outer in batches(sizes)
    ]


def by_torch(table: nn.Embedding, sizes: list[int], temperature: float = 0.7) -> Tensor:
    plain = table.weight.detach().clone().requires_grad_()
    for ids, labels, outer in batches(sizes):
        logits = plain[ids].tanh() @ plain.T / temperature
        (outer * logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)).sum().backward()
    assert plain.grad is not None
    return plain.grad


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Rows of each product of the output layer's gradient."""
    found: list[int] = []
    work = output_layer._sum_products

    def counted(*given: Any) -> None:
        found.append(len(given[4]))
        work(*given)

    monkeypatch.setattr(output_layer, "_sum_products", counted)
    return found


def test_passes_of_a_batch_have_one_product_at_the_end(made):
    table, sizes = a_table(), [6, 1, 3]
    with late_gradients():
        for loss in losses(table, sizes):
            loss.backward()
        assert table.weight.grad is None and not made
    assert made == [10]
    assert_close(table.weight.grad, by_torch(table, sizes), rtol=0, atol=1e-13)


@pytest.mark.parametrize("most, expected", [(9, [9, 5]), (4, [3, 6, 3, 2]), (1, [3, 6, 3, 2]), (14, [14])])
def test_no_more_waits_than_the_bound(most, expected, made, monkeypatch):
    """Rows that do not fit beside others make these go first; more than the bound go by themselves."""
    monkeypatch.setattr(late, "FEWEST", most)
    table, sizes = a_table(), [3, 6, 3, 2]
    with late_gradients():
        for loss in losses(table, sizes):
            loss.backward()
    assert made == expected
    assert_close(table.weight.grad, by_torch(table, sizes), rtol=0, atol=1e-13)


def test_a_large_table_lets_more_rows_wait():
    table = nn.Parameter(torch.zeros(late.SHARE * (late.FEWEST + 5), 1, dtype=torch.float64))
    with late_gradients():
        for rows in (late.FEWEST, 5):
            logprobs, _ = selected_logprobs(table.new_ones(rows, 1), table, torch.zeros(rows).long())
            logprobs.sum().backward()
            assert table.grad is None
    assert table.grad is not None and table.grad[0].item() == pytest.approx(261 * (1 - 1 / len(table)))


def test_it_adds_to_what_is_there():
    table, sizes = a_table(), [2, 5]
    for _ in range(2):
        with late_gradients():
            for loss in losses(table, sizes):
                loss.backward()
    assert_close(table.weight.grad, 2 * by_torch(table, sizes), rtol=0, atol=1e-13)


def test_what_waits_is_what_it_was():
    """The memory of a pass is used again by the next one."""
    table = nn.Parameter(torch.zeros(3, 1))
    rows, found = torch.ones(2, 1), []
    with late_gradients():
        assert Late.now is not None
        Late.now.add(table, lambda table, rows: found.append((table, rows.clone())), rows)
        rows.zero_()
    assert found[0][0] is table and found[0][1].tolist() == [[1.0], [1.0]]


def test_tables_of_two_models_and_two_precisions_stay_apart():
    first, second = a_table(0), a_table(2)
    low = second.weight.detach().float()
    with late_gradients():
        for loss in (*losses(first, [3]), *losses(second, [3, 4])):
            loss.backward()
        ids, labels, outer = batches([5])[0]
        states = low[ids].tanh()
        (outer.float() * selected_logprobs(states, second.weight, labels)[0]).sum().backward()
    assert_close(first.weight.grad, by_torch(first, [3]), rtol=0, atol=1e-13)
    plain = second.weight.detach().clone().requires_grad_()
    (outer * (states.double() @ plain.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)).sum().backward()
    assert_close(second.weight.grad, by_torch(second, [3, 4]) + plain.grad, rtol=0, atol=1e-5)


def test_an_error_leaves_nothing_and_the_next_batch_begins_anew():
    table = a_table()
    with pytest.raises(MemoryError), late_gradients():
        losses(table, [4])[0].backward()
        raise MemoryError
    assert table.weight.grad is None and Late.now is None
    losses(table, [4])[0].backward()  # outside, at once
    assert_close(table.weight.grad, by_torch(table, [4]), rtol=0, atol=1e-13)


def test_a_pass_whose_gradient_comes_too_late_is_told():
    table = a_table()
    with late_gradients():
        loss = losses(table, [4])[0]
    with pytest.raises(RuntimeError, match="late_gradients"):
        loss.backward()


@pytest.mark.parametrize("there", [False, True])
def test_what_passes_kept_makes_room_for_a_large_gradient(there, monkeypatch):
    monkeypatch.setattr(late, "CHUNK", 0)
    monkeypatch.setattr(Room, "idle", [torch.empty(1)])
    table = a_table()
    if there:
        table.weight.grad = torch.zeros_like(table.weight)
    with late_gradients():
        losses(table, [4])[0].backward()
        assert len(Room.idle) == 1
    assert len(Room.idle) == there
