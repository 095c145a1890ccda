"""The simulation of benchmarks/coverage.py in short, with bounds as wide as its few draws ask for."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rto.evaluation.winrate import paired_bootstrap, win_probability

DRAWS = 100
ERROR = math.sqrt(0.95 * 0.05 / DRAWS)  # of a share of 95 %: 2.2 points
LOW, HIGH = 0.93 - 3 * ERROR, 0.97 + 3 * ERROR  # 93 to 97 % of a thousand draws, and three errors of ours

KINDS = ("continuous", "ties", "ties, 4 answers")


@pytest.fixture(scope="module")
def study() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_study", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_contain_the_truth(study, kind):
    found = study.coverage(kind, 60, DRAWS, 200)
    false_alarms = found.pop("false alarms")
    assert all(LOW <= share <= HIGH for share in found.values()), found
    assert false_alarms <= 0.05 + 3 * ERROR


def test_length_controlled_intervals_contain_the_truth(study):
    assert LOW <= study.length_coverage(60, DRAWS, 200) <= HIGH


@pytest.mark.parametrize("n", [50, 200])
def test_the_sign_test_keeps_its_size_exactly(study, n):
    assert 0.025 < study.size_of_sign_test(n) <= 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_of_the_simulation_is_the_truth(study, kind):
    a, b = study.draw(kind, 40_000, np.random.default_rng(0))
    gap, chances = a.mean(1) - b.mean(1), win_probability(a, b)
    for values, known in ((gap, study.truth(kind)[0]), (chances, study.truth(kind)[1])):
        assert values.mean() == pytest.approx(known, abs=4 * values.std() / 200)


def test_ten_thousand_prompts_in_five_seconds(record_property):
    """Of the processor's time: what other programs do at the moment does not count."""
    values = np.random.default_rng(0).normal(size=10_000)
    start = time.process_time()
    paired_bootstrap(values, 10_000, 0)
    seconds = time.process_time() - start
    print(f"bootstrap of 10,000 prompts, 10,000 rounds: {seconds:.2f} s")
    record_property("seconds", seconds)
    assert seconds < 5
