"""Segments and sentences: worked by hand on ragged answers, and against a plain loop over the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.segments import (
    last_token,
    segment_counts,
    segment_ends,
    segment_index,
    segment_lengths,
    segment_sums,
    sentence_ends,
    to_ends,
)

NAN = float("nan")


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def bools(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows).bool()


# A finished answer of six tokens, only an end of sequence, a cut answer of four, a finished one of two, a cut
# one of a single token, padding.
MASK = mask_of([6, 1, 4, 2, 1, 0], 6)
FINISHED = torch.tensor([True, True, False, True, False, False])
ENTROPY = torch.tensor(
    [
        # entropy[t] predicts token t, so the entropy after token j is entropy[j + 1]
        [9.0, 0.5, 2.0, 1.75, 3.0, 0.1],
        [9.0, NAN, NAN, NAN, NAN, NAN],
        [0.0, 2.0, 2.0, 0.5, NAN, NAN],
        [9.0, 0.0, NAN, NAN, NAN, NAN],
        [0.0, NAN, NAN, NAN, NAN, NAN],
        [NAN, NAN, NAN, NAN, NAN, NAN],
    ]
)
ENDS = bools(
    [
        # after token 0: 0.5; 1: 2.0, an end; 2: exactly 1.75, none; 3: 3.0, an end; 4 stands before the end of sequence
        [0, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
)


# --- ends of segments ---------------------------------------------------------------------------------


def test_ends_by_hand():
    assert torch.equal(segment_ends(ENTROPY, MASK, FINISHED, 1.75), ENDS)


def test_cutoff_zero_means_tokens():
    """All of the body, also where the reference is certain (0) or its entropy was rounded below 0."""
    for entropy in (ENTROPY, torch.zeros_like(ENTROPY), torch.full_like(ENTROPY, -1e-7)):
        assert torch.equal(segment_ends(entropy, MASK, FINISHED, 0), mask_of([5, 0, 4, 1, 1, 0], 6))


def test_no_cutoff_means_whole_answers():
    ends = segment_ends(ENTROPY, MASK, FINISHED, None)
    assert ends.nonzero().tolist() == [[0, 5], [1, 0], [2, 3], [3, 1], [4, 0]]
    assert torch.equal(ends, last_token(MASK))


def test_a_huge_cutoff_leaves_one_segment_without_the_end_of_sequence():
    ends = segment_ends(ENTROPY, MASK, FINISHED, 1e4)
    assert ends.nonzero().tolist() == [[0, 4], [2, 3], [3, 0], [4, 0]]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_is_fine(shape):
    mask, entropy = torch.zeros(shape).bool(), torch.zeros(shape)
    finished = torch.zeros(shape[0]).bool()
    for cutoff in (None, 0, 1.0):
        ends = segment_ends(entropy, mask, finished, cutoff)
        assert ends.shape == shape
        assert segment_index(ends, mask).shape == to_ends(entropy, ends, mask).shape == shape


# --- what lies in which segment -----------------------------------------------------------------------


def test_index_counts_and_lengths_by_hand():
    index = [[0, 0, 1, 1, 2, -1], [-1] * 6, [0, 1, 2, 2, -1, -1], [0, -1, -1, -1, -1, -1], [0] + [-1] * 5, [-1] * 6]
    lengths = [[2, 2, 2, 2, 1, 0], [0] * 6, [1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0], [1] + [0] * 5, [0] * 6]
    assert segment_index(ENDS, MASK).tolist() == index
    assert segment_counts(ENDS).tolist() == [3, 0, 3, 1, 1, 0]
    assert segment_lengths(ENDS, MASK).tolist() == lengths


def test_sums_by_hand():
    x = torch.where(MASK, torch.arange(1.0, 7.0), NAN).expand(6, 6)
    assert_close(segment_sums(x, ENDS, MASK)[0], torch.tensor([3.0, 3.0, 7.0, 7.0, 5.0, 0.0]))
    assert_close(segment_sums(x, ENDS, MASK)[1], torch.zeros(6))


def test_to_ends_by_hand():
    """What comes after the last end goes to the last token: the end of sequence, and all of an answer without ends."""
    x = torch.where(MASK, torch.arange(1.0, 7.0), NAN)
    expected = [
        [0, 3, 0, 7, 5, 6],
        [1, 0, 0, 0, 0, 0],
        [1, 2, 0, 7, 0, 0],
        [1, 2, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert_close(to_ends(x, ENDS, MASK), torch.tensor(expected).float())
    none = torch.zeros_like(MASK)
    assert to_ends(x, none, MASK).sum(-1).tolist() == [21.0, 1.0, 10.0, 3.0, 1.0, 0.0]
    assert torch.equal(to_ends(x, none, MASK) != 0, last_token(MASK))


def test_to_ends_has_a_gradient():
    x = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: to_ends(x, ENDS, MASK), x)


# --- against a loop -----------------------------------------------------------------------------------


def slowly(entropy: Tensor, mask: Tensor, finished: Tensor, cutoff: float | None) -> list[list[tuple[int, int]]]:
    """The first and last token of each segment, one token after the other, as formulas say it: e is the index of the
    end of sequence and token j is followed by an entropy H_j."""
    found = []
    for row in range(len(mask)):
        e = int(mask[row].sum()) - (1 if finished[row] else 0)
        if cutoff is None:
            last = int(mask[row].sum()) - 1
            found.append([(0, last)] if last >= 0 else [])
            continue
        segments, first = [], 0
        for j in range(e):
            if j == e - 1 or cutoff == 0 or entropy[row, j + 1] > cutoff:
                segments.append((first, j))
                first = j + 1
        found.append(segments)
    return found


@pytest.mark.parametrize("cutoff", [None, 0, 0.7, 1.75, 100.0])
def test_agrees_with_a_loop_on_ragged_batches(cutoff, generator):
    for _ in range(5):
        mask = mask_of(torch.randint(0, 25, (9,), generator=generator).tolist(), 24)
        finished = (torch.rand(9, generator=generator) < 0.6) & mask.any(-1)
        entropy = torch.where(mask, 3 * torch.rand(9, 24, generator=generator), NAN)
        x = torch.where(mask, torch.randn(9, 24, generator=generator), NAN)
        ends = segment_ends(entropy, mask, finished, cutoff)
        index, lengths = segment_index(ends, mask), segment_lengths(ends, mask)
        sums, moved = segment_sums(x, ends, mask), to_ends(x, ends, mask)
        assert (ends.sum(-1) == segment_counts(ends)).all()
        for row, segments in enumerate(slowly(entropy, mask, finished, cutoff)):
            assert ends[row].nonzero().flatten().tolist() == [last for _, last in segments]
            for k, (first, last) in enumerate(segments):
                span = slice(first, last + 1)
                assert (index[row, span] == k).all() and (lengths[row, span] == last + 1 - first).all()
                assert_close(sums[row, span], x[row, span].sum().expand(last + 1 - first))
            rest = segments[-1][1] + 1 if segments else 0
            assert (
                (index[row, rest:] == -1).all() and (lengths[row, rest:] == 0).all() and (sums[row, rest:] == 0).all()
            )
        assert_close(moved.sum(-1), torch.where(mask, x, 0.0).sum(-1), atol=1e-5, rtol=1e-6)
        assert (moved[~(ends | last_token(mask))] == 0).all()


def test_padding_and_other_rows_change_nothing():
    wide = segment_ends(
        torch.nn.functional.pad(ENTROPY, (0, 3), value=NAN), torch.nn.functional.pad(MASK, (0, 3)), FINISHED, 1.75
    )
    assert torch.equal(wide, torch.nn.functional.pad(ENDS, (0, 3)))
    for i in range(6):
        row = slice(i, i + 1)
        assert torch.equal(segment_ends(ENTROPY[row], MASK[row], FINISHED[row], 1.75), ENDS[row])


# --- sentences ----------------------------------------------------------------------------------------


def test_sentence_ends_by_hand():
    texts = [
        ["Hi", ".", " How", " are you", "?\n", "<eos>"],
        ["<eos>"],
        ["好", "。", "第", "二"],
        ["Oh", "!?"],
        ["x", "beyond the mask."],
        [".", "."],
    ]
    expected = [
        [0, 1, 0, 0, 1, 1],
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert sentence_ends(texts, MASK).long().tolist() == expected


@pytest.mark.parametrize("mark", list(".!?\n。！？．｡"))
def test_every_mark_ends_a_sentence(mark):
    mask = torch.ones(1, 3).bool()
    assert sentence_ends([["a", f"b{mark} ", "c"]], mask).tolist() == [[False, True, True]]


@pytest.mark.parametrize("text", ["", ",", ";", ":", "-", "'", "、", "\t"])
def test_other_marks_do_not(text):
    assert sentence_ends([[text, "c"]], torch.ones(1, 2).bool()).tolist() == [[False, True]]


def test_a_row_with_too_few_texts_is_refused():
    with pytest.raises(AssertionError, match="row 0 has 1 texts for 2 tokens"):
        sentence_ends([["a"]], torch.ones(1, 2).bool())
