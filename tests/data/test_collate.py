"""Padding: the worked example of ``rto.batch``, and that packing and trimming lose no token."""

import pytest
import torch

from rto.data.chat import PairRow
from rto.data.collate import collate_completions, collate_pairs, collate_prompts, micro_batches, trim

PROMPTS = [[5, 6, 7], [5, 6]]
ANSWERS = [[8, 9, 8, 2], [8, 2]]


def test_worked_example():
    rows = collate_completions(PROMPTS, ANSWERS, [True, False], pad=0)
    assert rows.prompt.ids.tolist() == [[5, 6, 7], [0, 5, 6]]
    assert rows.prompt.mask.tolist() == [[True, True, True], [False, True, True]]
    assert rows.ids.tolist() == [[8, 9, 8, 2], [8, 2, 0, 0]]
    assert rows.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert rows.finished.tolist() == [True, False]
    assert rows.sequence()[0].tolist() == [[5, 6, 7, 8, 9, 8, 2], [0, 5, 6, 8, 2, 0, 0]]


def test_padding_with_the_end_token_does_not_leak_into_the_mask():
    rows = collate_completions(PROMPTS, ANSWERS, [True, True], pad=2)
    assert rows.ids.tolist() == [[8, 9, 8, 2], [8, 2, 2, 2]]
    assert rows.lengths.tolist() == [4, 2]


def test_prompts():
    batch = collate_prompts([[5], [5, 6]], pad=9)
    assert batch.ids.tolist() == [[9, 5], [5, 6]] and batch.mask.tolist() == [[False, True], [True, True]]


def test_pairs_share_one_width():
    rows = [
        PairRow(1, "a", [5, 6], [8, 2], True, [8, 9, 8], False, 0.5),
        PairRow(2, "b", [7], [9, 2], True, [2], True, 0.0),
    ]
    pairs = collate_pairs(rows, pad=0)
    assert pairs.chosen.ids.tolist() == [[8, 2, 0], [9, 2, 0]]
    assert pairs.rejected.ids.tolist() == [[8, 9, 8], [2, 0, 0]]
    assert pairs.chosen.finished.tolist() == [True, True] and pairs.rejected.finished.tolist() == [False, True]
    assert torch.equal(pairs.chosen.prompt.ids, pairs.rejected.prompt.ids)
    assert pairs.margin.tolist() == [0.5, 0.0] and pairs.margin.dtype == torch.float32


def test_uneven_lists_are_an_error():
    with pytest.raises(ValueError, match="2 prompts, 1 answers and 2 finished"):
        collate_completions(PROMPTS, ANSWERS[:1], [True, True], pad=0)


def test_trim_drops_the_columns_that_nobody_needs():
    rows = collate_completions(PROMPTS, ANSWERS, [True, False], pad=0)
    short = trim(rows.rows(torch.tensor([1])))
    assert short.prompt.ids.tolist() == [[5, 6]] and short.prompt.mask.all()
    assert short.ids.tolist() == [[8, 2]] and short.mask.all()
    assert short.finished.tolist() == [False]
    assert trim(rows).ids.shape == (2, 4) and trim(rows).prompt.ids.shape == (2, 3)
    assert trim(rows.rows(slice(0, 0))).sequence()[0].shape == (0, 0)


def test_trim_of_a_trimmed_selection_is_what_collate_gives():
    rows = collate_completions([[1], [1, 2, 3, 4], [5, 6]], [[7, 7, 7], [7], [7, 7]], [True] * 3, pad=0)
    again = collate_completions([[1], [5, 6]], [[7, 7, 7], [7, 7]], [True] * 2, pad=0)
    for left, right in zip(trim(rows.rows(torch.tensor([0, 2]))).sequence(), again.sequence(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("lengths", "budget", "groups"),
    [
        ([3, 1, 2, 5], 6, [[3], [0, 2], [1]]),  # 1x5, 2x3, 1x1
        ([3, 1, 2, 5], 20, [[3, 0, 2, 1]]),  # 4x5
        ([3, 1, 2, 5], 19, [[3, 0, 2], [1]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),  # ties keep their order
        ([9, 1, 1], 4, [[0], [1, 2]]),  # one row over the budget goes alone
        ([], 4, []),
    ],
)
def test_micro_batches(lengths, budget, groups):
    assert micro_batches(lengths, budget) == groups


def test_micro_batches_keep_every_row_and_the_budget():
    lengths = [(7 * i) % 50 + 1 for i in range(300)]
    groups = micro_batches(lengths, 128)
    assert sorted(sum(groups, [])) == list(range(300))
    assert all(len(group) * max(lengths[i] for i in group) <= 128 for group in groups)
