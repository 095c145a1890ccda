"""From a TOML file and ``--key value`` overrides to a :class:`~rto.config.Config`, with errors a person can act on."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, create_model

from rto.config import Config, Policy, Prefer, Reward, Section, Spec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_DEPTH = 16  # levels of tables and lists
_LINES = 20  # mistakes that are told


def load(path: str | Path, overrides: Iterable[tuple[str, str]] = ()) -> Config:
    """Read a recipe. ``overrides`` are (dotted key, value) with the value in TOML, or a bare string.

    Raises:
        ValueError: the file is missing or no TOML, or a key or value is refused; a line for each.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: give a recipe, a TOML file")
    if not os.path.exists(path):  # Path.exists raises for a name that is too long to be one
        raise ValueError(f"{path}: no such recipe; the recipes that come with rto are in recipes/*.toml")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: also not UTF-8, and a number of 5,000 digits
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    for key, value in overrides:
        put(table, key, value)
    return build(table, str(path))


def build(table: Mapping[str, Any], source: str = "recipe") -> Config:
    """Validate a plain table.

    Raises:
        ValueError: a line for each key or value that is refused, with ``source`` in front.
    """
    try:
        config = Config.model_validate(_values(table))
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {line}" for line in explain(error, Config))) from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    for named, section, members in (
        ("guides", Prefer, Config.preferences),
        ("scorers", Reward, Config.rewards),
        ("baselines", Policy, Config.policies),
    ):
        for name, changed in getattr(config, named).items():
            try:
                members(config.model_copy(update={named: {name: changed}}))
            except ValidationError as error:
                lines = explain(error, section)
                raise ValueError("\n".join(f"{source}: in [{named}.{name}]: {line}" for line in lines)) from None
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
    return config


def _values(value: Any, key: str = "", depth: int = 0) -> Any:
    """``value`` with null for "none", which TOML has not.

    Raises ValueError for what TOML can spell and no key takes: numbers that are not finite or need more than 64 bits
    (a run could not read them back from its config.json), tables in tables without end, a type that is no name.
    """
    if depth > _DEPTH:
        raise ValueError(f"{_cut(key)}: nested too deep: a recipe needs {_DEPTH} levels at most")
    if isinstance(value, dict):
        inside = {part: f"{key}.{_name(str(part))}" if key else _name(str(part)) for part in value}
        if isinstance(value.get("type"), dict | list):
            raise ValueError(f"{inside['type']}: a type is a name, not {type(value['type']).__name__}")
        return {part: _values(there, inside[part], depth + 1) for part, there in value.items()}
    if isinstance(value, list):
        return [_values(part, f"{key}.{i}", depth + 1) for i, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: {value} is no number that a recipe can have; what is off is 'none'")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"{key}: a whole number has 64 bits at most, this one has {value.bit_length()}")
    return None if value == "none" else value


def put(table: dict[str, Any], key: str, value: str) -> None:
    """Set ``a.b.c`` in nested tables. The value is read as TOML where it is TOML, else as a string."""
    *parents, last = key.split(".")
    for parent in parents:
        if table.get(parent) is None:  # absent, or null in a resolved recipe
            table[parent] = {}
        table = table[parent]
        if not isinstance(table, dict):
            raise ValueError(f"--{_name(key)}: {_name(parent)} is a value, not a table")
    try:
        found = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        found = {}
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets without end
        raise ValueError(f"--{_name(key)}: not a value: {error}") from None
    table[last] = found["value"] if len(found) == 1 else value  # more than one: lines that only look like TOML


def complete(spec: Spec, table: Mapping[str, Callable[..., Any]], where: str) -> Spec:
    """Check ``{"type": name, option: value}`` against the keyword-only parameters of ``table[name]`` and fill in
    their defaults.

    Raises:
        ValueError: an unknown type or option, or a value of the wrong type.
    """
    name = spec.get("type")
    if not isinstance(name, str) or name not in table:
        raise ValueError(
            f"{where}.type = {_short(name)} is unknown{nearest(str(name), table)}; known: {', '.join(table)}"
        )
    options = {
        key: (parameter.annotation, ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for key, parameter in inspect.signature(table[name], eval_str=True).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    model = create_model(name, __base__=Section, **options)  # type: ignore[call-overload]
    given = {key: value for key, value in spec.items() if key != "type"}
    try:
        return {"type": name, **model.model_validate(given).model_dump()}
    except ValidationError as error:
        raise ValueError("\n".join(f"{where}: {line}" for line in explain(error, model))) from None


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line a mistake, the first twenty; an unknown key comes with the nearest valid one."""
    lines = []
    mistakes = error.errors()
    for item in mistakes[:_LINES]:
        kind = item["type"]
        if kind == "extra_forbidden":
            path, keys = _walk(model, item["loc"][:-1])
            last = str(item["loc"][-1])
            lines.append(
                f"unknown key {'.'.join([*path, _name(last)])}{nearest(last, keys)}; valid: {', '.join(sorted(keys))}"
            )
            continue
        key = ".".join(_walk(model, item["loc"])[0])
        message, given = _cut(item["msg"].removeprefix("Value error, "), 600), f" (given: {_short(item['input'])})"
        if kind == "union_tag_invalid":
            key += ".type"
            message = f"unknown type {_name(item['ctx']['tag'])}; known: {item['ctx']['expected_tags']}"
        if kind in ("missing", "value_error", "union_tag_invalid"):
            given = ""
        lines.append(f"{key or 'recipe'}: {message}{given}")
    if len(mistakes) > _LINES:
        lines.append(f"and {len(mistakes) - _LINES} more mistakes")
    return lines


def _name(key: str) -> str:
    """A key as a message shows it: in quotes where it would not do without them in TOML."""
    return key if re.fullmatch(r"[\w.-]{1,80}", key) else _short(key)


def _short(value: Any) -> str:
    try:
        return _cut(repr(value))
    except (ValueError, RecursionError):  # a number of 5,000 digits; lists in lists without end
        return type(value).__name__


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def nearest(word: str, words: Iterable[str]) -> str:
    """ ", did you mean X?" or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _walk(model: type[BaseModel], location: Iterable[str | int]) -> tuple[list[str], set[str]]:
    """The dotted path of an error's location as the recipe writes it, and the valid keys of the table there."""
    path, found = [], [model]
    for step in map(str, location):
        if len(found) > 1:  # a union: pydantic names its chosen member next, the recipe does not
            found = [candidate for candidate in found if _tag_of(candidate) == step]
            continue
        path.append(_name(step))
        fields = found[0].model_fields if found else {}
        found = _models(fields[step].annotation) if step in fields else []
    return path, {key for candidate in found for key in candidate.model_fields}


def _tag_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return get_args(field.annotation)[0] if field else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
