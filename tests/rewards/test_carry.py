"""Rewards that cross tokenisations: values by hand, and sums that stay."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from rto.rewards.carry import at_ends, carry


def spans(*lengths: int) -> list[tuple[int, int]]:
    """Tokens of these lengths, one after the other."""
    ends = list(accumulate(lengths))
    return list(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize(
    ("values", "source", "target", "expected", "misaligned"),
    [
        ([1.0, 2.0], spans(3, 2), spans(3, 2), [1.0, 2.0], 0.0),
        ([1.0, 2.0, 3.0], spans(1, 2, 2), spans(3, 2), [3.0, 3.0], 0.0),  # finer: every token lies in one
        ([6.0], spans(3), spans(1, 2), [2.0, 4.0], 1.0),  # coarser: by characters
        ([4.0, -1.0], spans(4, 1), spans(2, 3), [2.0, 1.0], 0.8),  # 4 is split in half
        ([4.0, -1.0], spans(4, 1), spans(1, 4), [1.0, 2.0], 0.8),
        ([0.0, 0.0], spans(4, 1), spans(1, 4), [0.0, 0.0], 0.0),  # no mass
        ([], [], spans(2), [0.0], 0.0),
        ([], [], [], [], 0.0),
    ],
)
def test_values_go_where_the_characters_are(values, source, target, expected, misaligned):
    carried, share = carry(values, source, target)
    assert carried == pytest.approx(expected)
    assert share == pytest.approx(misaligned)


@pytest.mark.parametrize(
    ("source", "target", "place", "misaligned"),
    [
        ([(2, 2)], spans(2, 3), 1, 0.0),  # the token that begins there
        ([(2, 2)], spans(5), 0, 0.0),  # a token around it
        ([(2, 2)], [(0, 2), (3, 5)], 1, 1.0),  # the next one
        ([(5, 5)], spans(2, 3), 1, 1.0),  # nothing follows: the last
        ([(5, 5)], [(0, 5), (5, 5)], 1, 0.0),  # an empty one, as empty
        ([(5, 6)], [(0, 5), (6, 7)], 1, 1.0),  # characters that nobody has
        ([(5, 9)], [(0, 5)], 0, 1.0),
    ],
)
def test_a_token_without_overlap(source, target, place, misaligned):
    carried, share = carry([3.0], source, target)
    assert carried == [3.0 if index == place else 0.0 for index in range(len(target))]
    assert share == misaligned


def test_empty_tokens_at_one_place_keep_their_order():
    """Three bytes of one character, then the end: n-th goes to n-th."""
    source = [(0, 1), (1, 1), (1, 1), (1, 2), (2, 2)]
    target = [(0, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 2)]
    assert carry([1.0, 2.0, 3.0, 4.0, 5.0], source, target) == ([1.0, 2.0, 3.0, 4.0, 5.0, 0.0], 0.0)
    carried, share = carry([1.0, 2.0, 3.0, 4.0, 5.0], source, [(0, 1), (1, 1), (1, 2), (2, 2)])
    assert carried == [1.0, 2.0, 7.0, 5.0]  # one byte less: the second goes with the character
    assert share == 0.0


def test_characters_that_no_token_stands_for_do_not_count():
    """Some tokenizers leave the spaces out: "to be" is (0, 2), (3, 5), or (0, 2), (2, 5)."""
    assert carry([1.0, 2.0], [(0, 2), (2, 5)], [(0, 2), (3, 5)]) == ([1.0, 2.0], 0.0)


def test_sums_are_preserved():
    draw = random.Random(0)
    for _ in range(300):
        source = spans(*(draw.choice([0, 1, 1, 2, 5]) for _ in range(draw.randint(1, 12))))
        target = spans(*(draw.choice([0, 1, 2, 3, 4]) for _ in range(draw.randint(1, 12))))
        values = [draw.uniform(-1e4, 1e4) for _ in source]
        carried, share = carry(values, source, target)
        assert sum(carried) == pytest.approx(sum(values), abs=1e-6)
        assert 0.0 <= share <= 1.0
        assert carry(values, source, source) == (values, 0.0)


def test_mass_stays_positive():
    """Attention shares stay shares."""
    carried, _ = carry([0.2, 0.3, 0.5], spans(3, 1, 2), spans(1, 4, 1))
    assert carried == pytest.approx([0.2 / 3, 0.4 / 3 + 0.3 + 0.25, 0.25])


@pytest.mark.parametrize(
    ("ends", "expected", "misaligned"),
    [
        ([2, 5], [1.0, -3.0], 0.0),
        ([1, 2, 3, 5], [1.0, 1.0, -3.0, -3.0], 4 / 8),  # 1 and 3 lie inside a token
        ([5], [-3.0], 0.0),
        ([0, 6], [1.0, -3.0], 1.0),  # nothing ends after 6: the last reading
        ([], [], 0.0),
    ],
)
def test_readings_at_ends(ends, expected, misaligned):
    read, share = at_ends([1.0, -3.0], spans(2, 3), ends)
    assert read == expected
    assert share == pytest.approx(misaligned)


def test_ends_at_one_place_keep_their_order():
    """Two bytes of a character that a third completes: n-th goes to n-th."""
    source = [(0, 1), (1, 1), (1, 1), (1, 2)]
    assert at_ends([1.0, 2.0, 3.0, 4.0], source, [1, 1, 1, 2]) == ([1.0, 2.0, 3.0, 4.0], 0.0)
    assert at_ends([1.0, 2.0, 3.0, 4.0], source, [1, 2]) == ([1.0, 4.0], 0.0)
    assert at_ends([1.0, 4.0], spans(1, 1), [1, 1, 1, 2]) == ([1.0, 1.0, 1.0, 4.0], 0.0)
    assert at_ends([1.0, 4.0], [(0, 1), (2, 3)], [2, 2, 3]) == ([4.0, 4.0, 4.0], pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("source", "target"), [([(3, 5), (0, 3)], spans(5)), (spans(5, 1), [(3, 5), (0, 3)]), ([(0, 1), (4, 2)], spans(5))]
)
def test_spans_out_of_order_are_a_bug(source, target):
    with pytest.raises(AssertionError, match="out of order"):
        carry([1.0, 2.0], source, target)


def test_mismatched_lengths_are_a_bug():
    with pytest.raises(AssertionError, match="1 values for 2 spans"):
        carry([1.0], spans(1, 1), spans(2))
    with pytest.raises(AssertionError, match="no tokens"):
        carry([1.0], spans(1), [])
    with pytest.raises(AssertionError, match="no readings"):
        at_ends([], [], [1])
