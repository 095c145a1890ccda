"""Rewards from a Python function of the user's: ``package.module:name``."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``package.module:name`` names. The current directory is searched first, as by ``python -m``.

    Raises:
        ValueError: the form is wrong, the module is missing or fails to load, it has no such name, or what has the
            name is no function of two or three arguments.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise ValueError(f"function = {name!r} is not of the form 'package.module:name'")
    module_name, attribute = name.split(":")
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise ValueError(
                f"function = {name!r}: there is no module {missing}. It must be installed, or lie in {folder}"
            ) from error
        raise ValueError(f"function = {name!r}: its module fails to load: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"function = {name!r}: {getattr(module, '__file__', None) or module_name} has no {attribute}")
    function = getattr(module, attribute)
    if not callable(function):
        raise ValueError(f"function = {name!r} is a {type(function).__name__}, not a function")
    _takes_tokens(function, name)
    return function


def call_function(
    function: Callable[..., Any],
    name: str,
    prompts: list[str],
    answers: list[str],
    tokens: list[list[str]],
    failed: Callable[[str], None] | None = None,
) -> Float[Tensor, "B T"]:
    """``function(prompts, answers, tokens)``, or ``function(prompts, answers)``, as token rewards.

    ``tokens`` holds the text of each response token, T is the longest answer. See :func:`token_rewards` for what the
    function may return. ``name`` is for messages. Where the function raises it is asked again for each answer alone,
    and the answers for which it raises then are missing; ``failed`` is told of each.

    Raises:
        ValueError: the function returns something else, or raises and there is no ``failed``.
    """
    takes_tokens, source = _takes_tokens(function, name), f"reward function {name}"

    def ask(rows: slice) -> Any:
        given = (prompts[rows], answers[rows], tokens[rows]) if takes_tokens else (prompts[rows], answers[rows])
        try:
            return function(*given)
        except Exception as error:
            raise _Failed(f"{source} failed: {type(error).__name__}: {error}") from error

    lengths = [len(row) for row in tokens]
    try:
        return token_rewards(ask(slice(None)), lengths, source)
    except _Failed as error:
        if failed is None:
            raise ValueError(str(error)) from error.__cause__
    rewards = torch.zeros(len(lengths), max(lengths, default=0))
    for i, length in enumerate(lengths):
        try:
            rewards[i, :length] = token_rewards(ask(slice(i, i + 1)), [length], source)
        except _Failed as error:
            failed(f"{error} (for the answer {answers[i][:60]!r} alone)")
            rewards[i, :length] = math.nan
    return rewards


class _Failed(Exception):
    """What the user's function raised."""


def token_rewards(rewards: Any, lengths: Sequence[int], source: str) -> Float[Tensor, "B T"]:
    """A list of B rewards, for answers of ``lengths`` tokens, as a tensor; T is the longest answer.

    A number goes on the last token, a list has a number for every token, None is missing: NaN on every token of the
    row. Padding is 0. Arrays and tensors count as lists.

    Raises:
        ValueError: anything else, with ``source`` in front and the row named.
    """
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if not isinstance(rewards, (list, tuple)):
        raise ValueError(f"{source} gave a {type(rewards).__name__}, not a list with a reward for each answer")
    if len(rewards) != len(lengths):
        raise ValueError(f"{source} gave {len(rewards)} rewards for {len(lengths)} answers")
    out = torch.zeros(len(lengths), max(lengths, default=0))
    for row, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        where = f"{source}, row {row}"
        reward = reward.tolist() if hasattr(reward, "tolist") else reward
        if reward is None:
            out[row, :length] = math.nan
        elif isinstance(reward, (list, tuple)):
            if len(reward) != length:
                raise ValueError(f"{where}: {len(reward)} token rewards for an answer of {length} tokens")
            values = [_number(value, f"{where}, token {t}") for t, value in enumerate(reward)]
            out[row, :length] = torch.tensor(values, dtype=torch.float32)
        else:
            assert length > 0, f"{where}: an answer without tokens"
            out[row, length - 1] = _number(reward, where)
    return out


def _number(value: Any, where: str) -> float:
    value = value.tolist() if hasattr(value, "tolist") else value
    known = isinstance(value, Real)
    if not known:
        raise ValueError(f"{where}: {value!r:.80} is a {type(value).__name__}, not a number")
    if not abs(value) <= LARGEST:  # an int may be too large for a float
        raise ValueError(f"{where}: {value!r:.80} is no finite float32. A reward that is unknown is None (JSON: null)")
    return float(value)


def _takes_tokens(function: Callable[..., Any], name: str) -> bool:
    """Whether three arguments are needed, not two. Parameters with a default keep it, whatever they are called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ValueError(f"function = {name!r}: Python cannot tell its parameters: wrap it in a function") from error
    free = [p for p in parameters if p.default is inspect.Parameter.empty]
    positional = [p for p in free if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = 3 if any(p.kind is p.VAR_POSITIONAL for p in free) and len(positional) < 3 else len(positional)
    if count not in (2, 3) or any(p.kind is p.KEYWORD_ONLY for p in free):
        raise ValueError(
            f"function = {name!r} has the parameters {inspect.signature(function)}: it must take "
            "(prompts, answers) or (prompts, answers, tokens)"
        )
    return count == 3
