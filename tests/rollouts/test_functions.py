"""Rewards from Python functions: what may come back, and one clear line for everything else."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy
import pytest
import torch

from rto.rollouts.functions import call_function, load_function, token_rewards

PROMPTS = ["a", "b", "c"]
ANSWERS = ["x y.", "z.", "w."]
TOKENS = [["x", " y", "."], ["z", "."], ["w", "."]]


def call(function, name: str = "mine:reward") -> torch.Tensor:
    return call_function(function, name, PROMPTS, ANSWERS, TOKENS)


def same(found: torch.Tensor, expected: list[list[float]]) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), equal_nan=True)


# --- what a function may return -----------------------------------------------------------------------


def test_number_list_and_none():
    """A number stands on the last token, a list on its tokens, None is missing; padding is 0."""
    nan = math.nan
    same(call(lambda prompts, answers: [2, [0.5, -1], None]), [[0, 0, 2], [0.5, -1, 0], [nan, nan, 0]])


def test_two_and_three_parameters():
    same(call(lambda prompts, answers: [float(len(a)) for a in answers]), [[0, 0, 4], [0, 2, 0], [0, 2, 0]])
    third = [[0, 0, 1], [0, 1, 0], [0, 1, 0]]
    same(call(lambda prompts, answers, tokens: [[float(t == ".") for t in row] for row in tokens]), third)
    same(call(lambda *given: [[float(t == ".") for t in row] for row in given[2]]), third)


def test_a_default_keeps_a_third_parameter():
    same(call(lambda prompts, answers, weight=3.0: [weight] * len(answers)), [[0, 0, 3], [0, 3, 0], [0, 3, 0]])


@pytest.mark.parametrize(
    "rewards",
    [
        numpy.array([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0]),
        [numpy.float32(1), torch.tensor(2), True + 2],
        (1, 2.0, 3),
        [numpy.array([0.0, 0.0, 1.0]), torch.tensor([0, 2]), (0, 3)],
    ],
)
def test_arrays_and_tensors_count_as_lists(rewards):
    same(call(lambda prompts, answers: rewards), [[0, 0, 1], [0, 2, 0], [0, 3, 0]])


def test_an_empty_batch():
    assert token_rewards([], [], "nobody").shape == (0, 0)


# --- what it may not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0, 2.0], "gave 2 rewards for 3 answers"),
        (1.0, "gave a float, not a list"),
        (None, "gave a NoneType, not a list"),
        ({"a": 1}, "gave a dict, not a list"),
        ([1.0, [1.0], 1.0], "row 1: 1 token rewards for an answer of 2 tokens"),
        ([1.0, 1.0, math.nan], "row 2: nan is no finite float32. A reward that is unknown is None"),
        ([1.0, [1.0, -math.inf], 1.0], "row 1, token 1: -inf is no finite float32"),
        ([1e39, 1.0, 1.0], "row 0: 1e\\+39 is no finite float32"),
        ([10**400, 1.0, 1.0], "row 0: 1000.* is no finite float32"),
        (["good", 1.0, 1.0], "row 0: 'good' is a str, not a number"),
        ([1.0, [1.0, None], 1.0], "row 1, token 1: None is a NoneType, not a number"),
        ([1.0, [1.0, [2.0]], 1.0], "row 1, token 1: .* is a list, not a number"),
        (numpy.array([1.0, math.nan, 1.0]), "row 1: nan"),
    ],
)
def test_other_results_are_refused(rewards, message):
    with pytest.raises(ValueError, match=f"reward function mine:reward.*{message}"):
        call(lambda prompts, answers: rewards)


def test_an_error_inside_is_passed_on():
    with pytest.raises(ValueError, match="reward function mine:reward failed: KeyError: 'gone'") as caught:
        call(lambda prompts, answers: [{}["gone"]])
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_costs_the_answers_that_it_is_about():
    """The batch fails as a whole, so each answer is asked about alone."""
    said: list[str] = []
    odd = ANSWERS[1]
    given = lambda prompts, answers: [1.0 / (answer != odd) for answer in answers]  # noqa: E731
    found = call_function(given, "mine:reward", PROMPTS, ANSWERS, TOKENS, said.append)
    expected = call_function(lambda prompts, answers: [1.0] * len(answers), "mine:reward", PROMPTS, ANSWERS, TOKENS)
    expected[1, : len(TOKENS[1])] = math.nan
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert len(said) == 1 and "ZeroDivisionError" in said[0] and repr(odd) in said[0]


# --- loading ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with modules in it."""
    files = {
        "rto_mine.py": "SCALE = 3\ndef reward(prompts, answers):\n    return [SCALE] * len(answers)\n",
        "rto_pack/__init__.py": "",
        "rto_pack/deep.py": "def reward(prompts, answers, tokens):\n    return [[1.0] * len(t) for t in tokens]\n",
        "rto_broken.py": "1 / 0\n",
        "rto_needy.py": "import rto_no_such_library\n",
        "rto_odd.py": "def one(prompts): ...\ndef four(a, b, c, d): ...\ndef named(prompts, answers, *, k): ...\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("rto_"):
            del sys.modules[name]


def test_the_current_directory_is_searched(folder):
    same(call(load_function("rto_mine:reward")), [[0, 0, 3], [0, 3, 0], [0, 3, 0]])
    same(call(load_function("rto_pack.deep:reward")), [[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    assert sys.path.count(str(folder)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is not of the form 'package.module:name'"),
        ("rto_mine", "is not of the form"),
        ("rto_mine.py:reward", "there is no module rto_mine.py"),
        ("rto_mine:reward()", "is not of the form"),
        ("./rto_mine:reward", "is not of the form"),
        ("rto_absent:reward", "there is no module rto_absent. It must be installed, or lie in "),
        ("rto_pack.absent:reward", "there is no module rto_pack.absent"),
        ("rto_mine:rewards", "rto_mine.py has no rewards"),
        ("rto_mine:SCALE", "is a int, not a function"),
        ("rto_broken:reward", "its module fails to load: ZeroDivisionError"),
        ("rto_needy:reward", "fails to load: ModuleNotFoundError: No module named 'rto_no_such_library'"),
        ("rto_odd:one", r"has the parameters \(prompts\): it must take \(prompts, answers\) or"),
        ("rto_odd:four", "it must take"),
        ("rto_odd:named", "it must take"),
    ],
)
def test_what_cannot_be_loaded(folder, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_function(name)
    assert repr(name) in str(caught.value)


def test_a_function_without_a_signature():
    with pytest.raises(ValueError, match="'builtins:min'.*cannot tell its parameters"):
        load_function("builtins:min")
