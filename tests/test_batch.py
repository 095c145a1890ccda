"""The containers: the worked example of ``rto.batch``, row choice through nested fields, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from jaxtyping import TypeCheckError

from rto.batch import Completions, Pairs, Prompts, Rollouts, Signals


def bits(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows).bool()


@pytest.fixture
def example() -> Completions:
    """Prompts "a b c" and "a b", responses "x y z ." and "x ."."""
    return Completions(
        prompt=Prompts(torch.tensor([[5, 6, 7], [0, 5, 6]]), bits([1, 1, 1], [0, 1, 1])),
        ids=torch.tensor([[8, 9, 8, 2], [8, 2, 0, 0]]),
        mask=bits([1, 1, 1, 1], [1, 1, 0, 0]),
        finished=torch.tensor([True, False]),
    )


def test_worked_example(example):
    ids, mask = example.sequence()
    assert ids.tolist() == [[5, 6, 7, 8, 9, 8, 2], [0, 5, 6, 8, 2, 0, 0]]
    assert mask.int().tolist() == [[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]]
    assert example.lengths.tolist() == [4, 2]
    assert len(example) == 2 and len(example.prompt) == 2


@pytest.mark.parametrize("index", [slice(1, 2), torch.tensor([1]), torch.tensor([False, True])])
def test_rows_reach_nested_fields(example, index):
    row = example.rows(index)
    assert row.prompt.ids.tolist() == [[0, 5, 6]] and row.prompt.mask.int().tolist() == [[0, 1, 1]]
    assert row.ids.tolist() == [[8, 2, 0, 0]] and row.finished.tolist() == [False]
    assert len(example) == 2  # the whole is as it was


def test_rows_may_repeat_reorder_and_be_none(example):
    again = example.rows(torch.tensor([1, 0, 1]))
    assert again.lengths.tolist() == [2, 4, 2]
    empty = example.rows(slice(0, 0))
    assert len(empty) == 0 and empty.sequence()[0].shape == (0, 7)


def test_pairs_and_rollouts_nest(example):
    pairs = Pairs(chosen=example, rejected=example.rows(torch.tensor([1, 0])), margin=torch.tensor([0.5, 0.0]))
    second = pairs.rows(torch.tensor([1]))
    assert len(pairs) == 2 and second.margin.tolist() == [0.0]
    assert second.chosen.prompt.ids.tolist() == [[0, 5, 6]] and second.rejected.prompt.ids.tolist() == [[5, 6, 7]]

    rollouts = Rollouts(example, torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, 0.0, 0.0]]))
    assert rollouts.rows(slice(1, None)).logprobs.tolist() == [[-5.0, -6.0, 0.0, 0.0]]


def test_absent_signals_stay_absent(example):
    zeros = torch.zeros(2, 4)
    signals = Signals(mask=example.mask, finished=example.finished, logprobs=zeros, reference=zeros)
    chosen = signals.rows(torch.tensor([0])).to("cpu")
    assert chosen.guide is None and chosen.scores is None and chosen.segments is None
    assert chosen.logprobs.shape == (1, 4)


def test_to_moves_every_field(example):
    moved = example.to("meta")
    parts = [moved.prompt.ids, moved.prompt.mask, moved.ids, moved.mask, moved.finished]
    assert {part.device.type for part in parts} == {"meta"}
    assert example.ids.device.type == "cpu"


def test_frozen(example):
    with pytest.raises(FrozenInstanceError):
        example.mask = example.mask


def test_fields_must_agree(example):
    with pytest.raises(TypeCheckError):
        Completions(example.prompt, example.ids, example.mask[:, :3], example.finished)
    with pytest.raises(TypeCheckError):
        Rollouts(example, torch.zeros(2, 4).long())
