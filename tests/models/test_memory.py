"""Out of memory: the step again in smaller pieces, with the same result."""

from __future__ import annotations

import pytest
import torch

from rto.data.chat import AnswerRow
from rto.finite import Culprit, NotFinite
from rto.models.memory import Budget, lacks_memory
from rto.room import Room


def small(limit: int):
    """Work that fits only with fewer than so many tokens, and what it was tried with."""
    tried: list[int] = []

    def work(tokens: int) -> int:
        tried.append(tokens)
        if tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return tokens

    return work, tried


def test_it_halves_until_it_fits_and_remembers():
    said: list[str] = []
    undone: list[int] = []
    budget = Budget(1000, said.append)
    work, tried = small(300)
    assert budget.within(work, lambda: undone.append(1)) == 250
    assert (tried, len(undone), len(said)) == ([1000, 500, 250], 2, 2)
    assert budget.within(work, lambda: undone.append(1)) == 250  # the next step begins there
    assert "micro_tokens 1000 -> 500" in said[0]


def test_one_row_alone_that_does_not_fit_is_an_error():
    work, tried = small(0)
    with pytest.raises(RuntimeError, match="out of memory"):
        Budget(8, print).within(work, lambda: None)
    assert tried == [8, 4, 2, 1]


def test_of_several_processes_all_halve_where_one_lacks_memory():
    said: list[str] = []
    budget = Budget(8, said.append, lambda mine: [mine, (True, None)] if budget.tokens == 8 else [mine, mine])
    work, tried = small(100)
    assert budget.within(work) == 4
    assert tried == [8, 4] and len(said) == 1


def test_a_fault_of_another_process_is_raised_here_too():
    culprit = Culprit("policy", "log-prob", "nan", 0, "answer", 3)
    row, undone = AnswerRow(7, "a", [1], [2, 3, 4, 5], True), []
    budget = Budget(8, print, lambda mine: [mine, (False, (culprit, [row]))])
    with pytest.raises(NotFinite) as caught:
        budget.within(lambda tokens: tokens, lambda: undone.append(1))
    assert caught.value.culprit == culprit and caught.value.rows == [row] and undone == [1]


def test_other_errors_stay_errors():
    def work(tokens: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        Budget(8, print).within(work, lambda: None)
    assert lacks_memory(MemoryError()) and lacks_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )


def test_what_lies_ready_is_given_up(monkeypatch):
    monkeypatch.setattr(Room, "idle", [torch.empty(8)])
    work, _ = small(4)
    assert Budget(8, print).within(work) == 4 and Room.idle == []
