"""Accuracies by hand, weights of sections, intervals, and what is refused."""

from __future__ import annotations

import json
import math

import pytest

from rto.commands import rewardbench as command
from rto.evaluation.rewardbench import (
    SECTIONS,
    Scored,
    accuracy,
    read_pairs,
    read_scores,
    read_sections,
    write_scores,
)
from rto.evaluation.winrate import wilson


def rows(
    subset: str, right: int, wrong: int = 0, ties: int = 0, lengths: tuple[int, int] | None = None
) -> list[Scored]:
    made = [Scored(subset, 2.0, 1.0, lengths)] * right + [Scored(subset, 1.0, 2.0, lengths)] * wrong
    return made + [Scored(subset, 1.0, 1.0, lengths)] * ties


def test_a_tie_is_wrong_and_counted():
    found = accuracy(rows("mine", 3, 1, 1))["subsets"]["mine"]
    assert (found["right"], found["ties"], found["n"], found["missing"]) == (3, 1, 5, 0)
    assert found["accuracy"] == 0.6
    assert (found["low"], found["high"]) == (wilson(3, 5).low, wilson(3, 5).high)


def test_published_sections_weigh_math_as_984():
    found = accuracy(rows("math-prm", 1) + rows("hep-python", 1, 3) + rows("alpacaeval-easy", 1, 1))
    assert found["weights"] == "published"
    assert list(found["sections"]) == ["Chat", "Reasoning"]
    assert found["sections"]["Reasoning"]["accuracy"] == pytest.approx((984 * 1.0 + 164 * 0.25) / (984 + 164))
    assert found["overall"]["accuracy"] == pytest.approx((0.5 + 1025 / 1148) / 2)
    assert found["pooled"]["accuracy"] == 3 / 7  # every pair alike


def test_the_published_weights():
    assert [len(part) for part in SECTIONS.values()] == [5, 6, 5, 7]
    assert sum(SECTIONS["Chat"].values()) == 358
    assert sum(SECTIONS["Chat Hard"].values()) == 456
    assert sum(SECTIONS["Safety"].values()) == 740
    assert SECTIONS["Reasoning"]["math-prm"] == 6 * 164


def test_a_mapping_weighs_by_pairs():
    given = rows("a", 1) + rows("b", 1, 2) + rows("c", 0, 2)
    found = accuracy(given, {"a": "one", "b": "one", "c": "two"})
    assert found["weights"] == "pairs"
    assert found["sections"]["one"]["accuracy"] == pytest.approx(2 / 4)
    assert found["overall"]["accuracy"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no section for the subsets c"):
        accuracy(given, {"a": "one", "b": "one"})


def test_unknown_subsets_are_their_own_sections():
    found = accuracy(rows("mine", 1) + rows("alpacaeval-easy", 0, 1))
    assert list(found["sections"]) == ["mine", "alpacaeval-easy"]
    assert found["overall"]["accuracy"] == 0.5


def test_the_interval_of_a_mean_combines_the_subsets():
    found = accuracy(rows("a", 8, 2) + rows("b", 3, 7))["overall"]
    one, other = wilson(8, 10), wilson(3, 10)
    below = math.hypot(one.estimate - one.low, other.estimate - other.low) / 2
    above = math.hypot(one.high - one.estimate, other.high - other.estimate) / 2
    assert (found["low"], found["high"]) == (pytest.approx(0.55 - below), pytest.approx(0.55 + above))
    alone = accuracy(rows("a", 8, 2))
    assert alone["overall"]["low"] == pytest.approx(one.low)  # one subset: Wilson's own


def test_longer_wins_stands_beside_it():
    given = rows("a", 2, lengths=(9, 5)) + rows("a", 1, lengths=(5, 5)) + rows("a", 1, lengths=(2, 5))
    longer = accuracy(given)["longer_wins"]["subsets"]["a"]
    assert (longer["right"], longer["ties"], longer["n"]) == (2, 1, 4)
    assert accuracy([*given, *rows("a", 1)])["longer_wins"] is None  # not known for all


def test_a_missing_score_is_left_out_and_counted():
    found = accuracy([*rows("a", 1), Scored("a", None, 1.0), Scored("b", 1.0, None)])
    assert found["subsets"]["a"] | {} == found["subsets"]["a"]
    assert (found["subsets"]["a"]["n"], found["subsets"]["a"]["missing"]) == (1, 1)
    assert (found["subsets"]["b"]["n"], found["subsets"]["b"]["accuracy"]) == (0, None)
    assert found["overall"]["accuracy"] is None  # the mean of sections is not known without one of them
    json.dumps(found, allow_nan=False)
    with pytest.raises(ValueError, match="no pairs"):
        accuracy([])


def test_scores_come_back(tmp_path):
    given = [Scored("a", 1.0, -0.5, (3, 4)), Scored("b", None, 2.0)]
    write_scores(tmp_path / "scores.jsonl", given)
    assert read_scores(tmp_path / "scores.jsonl") == given


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"chosen": 1, "rejected": 0}', "needs the keys subset, chosen and rejected"),
        ('{"subset": "a", "chosen": 1}', "needs the keys"),
        ('{"subset": "a", "chosen": "Yes.", "rejected": "No."}', "chosen is text: score the pairs with a run"),
        ('{"subset": "a", "chosen": 1, "rejected": NaN}', "rejected is nan, not a finite number"),
    ],
)
def test_rows_that_are_no_scores_are_refused(tmp_path, row, said):
    (tmp_path / "scores.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=said):
        read_scores(tmp_path / "scores.jsonl")


def test_pairs_with_a_subset(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "A colour?", "chosen": "Blue.", "rejected": "No.", "subset": "a"}
    path.write_text(json.dumps(pair) + "\n" + json.dumps(pair | {"rejected": "Blue."}) + "\n")
    loaded, subsets = read_pairs(str(path), chat=True)
    assert subsets == ["a"]
    assert loaded.rows[0].prompt == [{"role": "user", "content": "A colour?"}]
    assert loaded.counts() == {"same_answers": 1}
    assert read_pairs(str(path), chat=False)[0].rows[0].prompt == "A colour?"
    path.write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(ValueError, match="row 1: no subset"):
        read_pairs(str(path), chat=True)
    path.write_text('{"prompt": "Hi"}\n')
    with pytest.raises(ValueError, match="no pair can be used"):
        read_pairs(str(path), chat=True)


def test_sections_from_a_file(tmp_path):
    path = tmp_path / "sections.json"
    path.write_text('{"a": "one"}')
    assert read_sections(path) == {"a": "one"}
    for text in ("[1]", "{", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"sections\.json"):
            read_sections(path)


def parse(*words: str):
    import argparse

    parser = argparse.ArgumentParser()
    command.add(parser)
    return parser.parse_args(words)


def test_the_command_reads_scores(tmp_path, capsys):
    write_scores(tmp_path / "scores.jsonl", rows("a", 3, 1, lengths=(1, 2)))
    assert command.run(parse(str(tmp_path / "scores.jsonl"), "--out", str(tmp_path / "out"))) == 0
    shown = capsys.readouterr().out
    assert "| a | 75.0 | 30.1 to 95.4 | 4 | 0 | 0 | 0.0 |" in shown
    assert json.loads((tmp_path / "out" / "report.json").read_text())["overall"]["accuracy"] == 0.75
    assert read_scores(tmp_path / "out" / "scores.jsonl") == rows("a", 3, 1, lengths=(1, 2))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scores.jsonl", "--role", "guide"], "--role goes with a run and --pairs"),
        (["."], "is a folder: give --pairs FILE"),
        ([".", "--pairs", "p.jsonl"], "not a run folder"),
        (["scores.jsonl", "--limit", "0"], "--limit: at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        command.run(parse(*words))
