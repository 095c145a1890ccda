"""What every row of every table promises beside its maths: options that a recipe can check and complete.

The values by hand, extreme inputs, gradients, padding and totals are held by the contract test of each family:
tests/rewards, tests/preferences, tests/advantages and tests/policy. A row that lacks its hand value fails there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from rto.advantages import ADVANTAGES
from rto.policy import LOSSES
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.recipe import complete
from rto.rewards import TERMS

FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "rewards.TERMS": {name: term.function for name, term in TERMS.items()},
    "preferences.PREFERENCE_LOSSES": PREFERENCE_LOSSES,
    "preferences.REWARD_LOSSES": REWARD_LOSSES,
    "advantages.ADVANTAGES": {name: row.function for name, row in ADVANTAGES.items()},
    "policy.LOSSES": LOSSES,
}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in FUNCTIONS for name in FUNCTIONS[table]])
def test_options_are_keyword_only_typed_and_have_defaults(table, name):
    """So a recipe can leave them out, and ``complete`` can check them."""
    parameters = inspect.signature(FUNCTIONS[table][name]).parameters.values()
    options = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)
    assert all(p.default is inspect.Parameter.empty for p in parameters if p.name not in options)
    assert complete({"type": name}, FUNCTIONS[table], "here") == {
        "type": name,
        **{key: option.default for key, option in options.items()},
    }


def test_no_term_is_called_kl():
    """``rewards.total`` files the penalty under that name."""
    assert "kl" not in TERMS
