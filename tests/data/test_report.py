"""The data report: counted by hand on a few rows."""

from __future__ import annotations

import pytest

from rto.data.chat import AnswerRow, Encoder, PairRow, PromptRow
from rto.data.report import Lengths, data_report, duplicates, fold, summary
from rto.data.rows import Rows
from rto.data.sources import RejectedRow
from rto.data.worlds import world_tokenizer


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(world_tokenizer(), max_prompt=4, max_response=3)


def pair(encoder: Encoder, row: int, prompt: str, chosen: str, rejected: str) -> PairRow:
    above, below = encoder.answer(prompt, chosen), encoder.answer(prompt, rejected)
    return PairRow(row, prompt, encoder.prompt(prompt), *above, *below, 0.0)


def rows_of(encoder: Encoder, pairs: list[PairRow], held_out: list[PairRow]) -> Rows:
    answers = [AnswerRow(p.row, p.prompt_text, p.prompt, p.chosen, p.chosen_finished) for p in pairs]
    prompts = [PromptRow(p.row, p.prompt_text, p.prompt) for p in pairs]
    return Rows(encoder, answers, pairs, prompts, held_out, [], rejected=[RejectedRow("f", 9, "same_answers", "")])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([7], Lengths(1, 7, 7, 7, 0)),
        ([3, 1], Lengths(2, 1, 3, 3, 0)),
        (list(range(1, 11)), Lengths(10, 5, 9, 10, 0)),  # nine of ten have at most 9
        (list(range(1, 12)), Lengths(11, 6, 10, 11, 0)),
    ],
)
def test_lengths_are_order_statistics(lengths, expected):
    assert summary(lengths, 0) == expected


def test_case_and_white_space_do_not_count():
    assert fold("  Straße\n\tA ") == fold("STRASSE a") == "strasse a"


def test_rows_lengths_and_cuts(encoder):
    words = [word for word in encoder.tokenizer.get_vocab() if word.isalpha()][:6]
    long = " ".join(words[:5])  # of 5 tokens; prompts keep 4
    exact = " ".join(words[:4])
    pairs = [
        pair(encoder, 1, long, words[0], " ".join(words[:3])),  # the rejected answer fills the limit: cut
        pair(encoder, 2, exact, " ".join(words[:2]), words[1]),
    ]
    report = data_report(rows_of(encoder, pairs, pairs[1:]))
    assert report.rows["training pairs"] == 2
    assert report.rows["held-out pairs"] == 1
    assert "scored answers" not in report.rows
    assert report.lengths["training pairs: prompts"] == Lengths(2, 4, 4, 4, 1)
    assert report.lengths["training pairs: answers"] == Lengths(4, 2, 3, 3, 1)  # 2, 3, 3, 2 with the end token
    assert report.lengths["demonstrations: answers"] == Lengths(2, 2, 3, 3, 0)
    assert report.rejected == {"same_answers": [9]}


def test_duplicates_are_counted_by_kind(encoder):
    a, b, c = [word for word in encoder.tokenizer.get_vocab() if word.isalpha()][:3]
    trained = [
        pair(encoder, 1, a, b, c),
        pair(encoder, 2, f" {a.upper()}  ", b, c),  # the tokenizer does not know it, the text is the same
        pair(encoder, 3, a, c, b),
        pair(encoder, 4, b, a, c),
    ]
    held_out = [pair(encoder, 5, a, b, a), pair(encoder, 6, b, b, b + " " + b), pair(encoder, 7, c, a, b)]
    assert list(duplicates(rows_of(encoder, trained, held_out)).values()) == [
        2,  # rows 2 and 3 have row 1's prompt
        1,  # row 2 is row 1
        1,  # the demonstration of row 2 is that of row 1
        2,  # rows 5 and 6
        1,  # row 5: b was an answer to a
    ]
