"""Files of AlpacaEval 2: what is read and refused, what is written, and the command."""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from rto.commands import alpaca as command
from rto.evaluation.alpaca import BASELINE, length_controlled, win_rates
from rto.evaluation.alpaca_files import (
    LEADERBOARD,
    read_annotations,
    read_difficulty,
    write_leaderboard,
)

ROWS = 12


def annotation(number: int, **changed: object) -> dict[str, object]:
    row = {"instruction": f"Task {number}", "output_1": "b" * (20 + number), "output_2": "é" * (5 + 7 * number % 40)}
    row |= {"generator_1": BASELINE, "generator_2": "mine", "preference": 1 + (number * 5 % 11) / 10}
    return row | changed


def written(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def reference(folder: Path, n: int = ROWS) -> Path:
    rows = [{"instruction": f"Task {i}", "output": "b", "dataset": "koala", "generator": BASELINE} for i in range(n)]
    return written(folder / "reference.json", rows)


def gamed(folder: Path, n: int = ROWS) -> Path:
    lines = ["model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for model, sign in (("verbose", -1), ("concise", 1)):
        for i in range(n):
            lines.append(f"{model},{0.3 + 0.03 * i},{i},{sign * (0.2 + 0.1 * i)},{math.sin(i)},False")
    return written(folder / "df_gamed.csv", "\n".join(lines) + "\n")


# --- annotations --------------------------------------------------------------------------------------


def test_official_annotations(tmp_path):
    rows = [annotation(0), annotation(1, preference=None), annotation(2, preference=0)]
    found = read_annotations(written(tmp_path / "annotations.json", rows), "mine")
    np.testing.assert_array_equal(found.preference, [1.0, math.nan, 1.5])
    assert found.len_model.tolist() == [5, 12, 19]  # code points, not bytes
    assert found.len_baseline.tolist() == [20, 21, 22]
    assert (found.name, found.baseline, found.indexed_by) == ("mine", BASELINE, "position")
    assert found.index.tolist() == [0, 1, 2]


def test_a_reference_numbers_the_instructions(tmp_path):
    rows = [annotation(number) for number in (7, 2, 5)]
    path = written(tmp_path / "annotations.json", rows)
    found = read_annotations(path, reference=reference(tmp_path))
    assert (found.index.tolist(), found.indexed_by) == ([7, 2, 5], "reference")
    with pytest.raises(ValueError, match="1 instructions are not in .*reference.json, the first in row 1"):
        read_annotations(path, reference=reference(tmp_path, 6))


def test_a_shuffled_part_with_a_reference_gives_the_numbers_of_the_part_in_order(tmp_path):
    difficulty = read_difficulty(gamed(tmp_path))
    found = []
    for order in ((9, 1, 4, 6, 3), (1, 3, 4, 6, 9)):
        path = written(tmp_path / "annotations.json", [annotation(number) for number in order])
        found.append(length_controlled(read_annotations(path, reference=reference(tmp_path)), difficulty))
    assert found[0].weights == found[1].weights
    with pytest.raises(ValueError, match="--reference"):
        length_controlled(read_annotations(path), difficulty)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preference": 2.5}, "row 2: preference = 2.5"),
        ({"preference": "1"}, "row 2: preference = '1' is no number"),
        ({"preference": True}, "row 2: preference = True is no number"),
        ({"output_1": None}, "row 2: output_1 = None: a text is needed"),
        ({"instruction": "Task 0"}, "rows 1 and 2 hold one instruction"),
        ({"generator_2": "other"}, "row 2: generator_2 is 'other', not 'mine'"),
        ({"generator_1": "other"}, "row 2: generator_1 is 'other', not 'gpt4_1106_preview'"),
    ],
)
def test_bad_annotations_are_refused_with_their_row(tmp_path, changed, message):
    path = written(tmp_path / "annotations.json", [annotation(0), annotation(1, **changed)])
    with pytest.raises(ValueError, match=message):
        read_annotations(path)


def test_a_file_holds_one_judge(tmp_path):
    path = written(tmp_path / "annotations.json", [annotation(i, annotator="weighted") for i in range(2)])
    assert read_annotations(path).annotator == "weighted"
    written(path, [annotation(0, annotator="weighted"), annotation(1, annotator="gpt4")])
    with pytest.raises(ValueError, match="row 2: annotator is 'gpt4', not 'weighted': .* one judge"):
        read_annotations(path)


def test_swapped_systems_are_refused(tmp_path):
    rows = [annotation(0, generator_1="mine", generator_2=BASELINE)]
    path = written(tmp_path / "annotations.json", rows)
    with pytest.raises(ValueError, match="row 1: mine is generator_1, .* swapped"):
        read_annotations(path, "mine")
    with pytest.raises(ValueError, match="the baseline .* is 'mine'"):
        length_controlled(read_annotations(path), read_difficulty(gamed(tmp_path)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"a": 1}\n{"a": 2}\n', "not JSON lines"),
        ("a.json", "[]", "one JSON array"),
        ("a.json", "[1]", "row 1: an object is needed, not int"),
        ("a.json", '[{"instruction": "a", "output_1": "", "output_2": ""}]', "row 1: no key 'preference'"),
        ("a.txt", "", "a .json file .* or a .csv file"),
        ("a.csv", "index,preference\n0,1\n", "no column len_model, len_baseline"),
        ("a.csv", "index,preference,len_model,len_baseline\n", "no row below the header"),
        ("a.csv", "index,preference,len_model,len_baseline\n0,1,2,3\n0,1,2,3\n", "rows 1 and 2 hold one instruction"),
        ("a.csv", "index,preference,len_model,len_baseline\n0,1,2\n", "row 1: fewer cells"),
        ("a.csv", "index,preference,len_model,len_baseline\n0,x,2,3\n", "row 1: preference = 'x' is no number"),
        (
            "a.csv",
            "index,preference,len_model,len_baseline\n0,1,2.5,3\n",
            "row 1: len_model = '2.5' is no whole number",
        ),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_annotations(written(tmp_path / name, text))


def test_numbers_alone(tmp_path):
    path = written(tmp_path / "a.csv", "index,preference,len_model,len_baseline\n4,,2,3\n1,0,5,6\n")
    found = read_annotations(path, "mine")
    np.testing.assert_array_equal(found.preference, [math.nan, 1.5])
    assert (found.index.tolist(), found.indexed_by, found.name) == ([4, 1], "file", "mine")
    with pytest.raises(ValueError, match="leave the reference out"):
        read_annotations(path, reference=path)


# --- difficulty ---------------------------------------------------------------------------------------


def test_the_difficulty_file(tmp_path):
    path = gamed(tmp_path)
    path.write_text(path.read_text().replace("verbose,0.3,", "verbose,,"))
    found = read_difficulty(path)
    assert found.of[3] == math.sin(3)
    assert len(found.of) == ROWS
    assert len(found.share) == len(found.scaled_gap) == len(found.difficulty) == 2 * ROWS - 1
    assert found.weight == 0.1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("False", "True", "row 1: not_gamed_baseline = 'True'"),
        ("verbose,0.3,", "verbose,1.3,", "row 1: preference = 1.3"),
        ("verbose,0.3,0,-0.2", "verbose,0.3,0,inf", "row 1: std_delta_len = 'inf' is no number"),
        ("std_delta_len", "gap", "no column std_delta_len"),
    ],
)
def test_a_bad_difficulty_file_is_refused(tmp_path, old, new, message):
    path = gamed(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_difficulty(path)


# --- out ----------------------------------------------------------------------------------------------


def test_the_leaderboard_has_the_official_columns(tmp_path):
    difficulty = read_difficulty(gamed(tmp_path))
    found = read_annotations(written(tmp_path / "a.json", [annotation(number) for number in range(ROWS)]))
    raw, lc = win_rates(found), length_controlled(found, difficulty)
    write_leaderboard(tmp_path / "leaderboard.csv", {"mine": (raw, lc), "other": (raw, None)})
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        head, first, second = csv.reader(file)
    assert head == ["", *LEADERBOARD]
    assert first[:2] == ["mine", repr(raw.win_rate)]
    assert first[8:] == ["community", str(raw.avg_length), repr(lc.win_rate), repr(lc.standard_error)]
    assert second[-2:] == ["", ""]


# --- the command --------------------------------------------------------------------------------------


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    path = written(tmp_path / "annotations.json", [annotation(number) for number in range(ROWS)])
    assert run(path, "--difficulty", gamed(tmp_path), "--out", tmp_path / "out", "--bootstrap", 5, "--seed", 3) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    lc = report["length_controlled"]
    assert f"mine against {BASELINE}" in shown
    assert f"WR                   {report['win_rate']:.2f} %" in shown
    assert f"LC                   {lc['win_rate']:.2f} %" in shown
    assert f"LC SE (bootstrap)    {lc['bootstrap']['standard_error']:.2f} from 5 rounds" in shown
    assert (lc["bootstrap"]["rounds"], lc["bootstrap"]["seed"], len(lc["difficulty_file"]["sha256"])) == (5, 3, 64)
    assert (tmp_path / "out" / "leaderboard.csv").read_text().splitlines()[1].startswith("mine,")


def test_without_the_difficulty_file_nothing_is_called_lc(tmp_path, capsys):
    path = written(tmp_path / "run.csv", "index,preference,len_model,len_baseline\n0,1,2,3\n1,2,5,6\n2,,1,1\n")
    assert run(path, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "LC" not in shown
    assert "--difficulty" in shown
    assert "discrete verdicts" in shown
    assert "2, 1 rows without a preference" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert "length_controlled" not in report
    assert report["verdicts"] == "discrete"
    assert (tmp_path / "leaderboard.csv").read_text().splitlines()[1].endswith(",community,2,,")


def test_one_round_is_no_bootstrap(tmp_path):
    with pytest.raises(ValueError, match="--bootstrap 1"):
        run(tmp_path / "none.json", "--bootstrap", 1)
