"""Style of an Arena-Hard answer: length and markdown, and how two answers differ in it (style control).

A feature row is (tokens, headers, list items, bold spans), counts of one answer. The rules of counting are those
of the released scoring, so that counts stored in answer files and counts made here agree.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Scoring = Literal["current", "classic"]
Floats = NDArray[np.float64]

FEATURES = ("tokens", "headers", "lists", "bold")
STORED = ("token_len", "header_count", "list_count", "bold_count")  # in this order in every answer file
ENCODINGS = {"current": "o200k_base", "classic": "cl100k_base"}
APPROXIMATE = "approximate"  # the counter that needs no tables

_FENCED = re.compile(r"```([^`]*)```")
_HEADERS = {f"h{level}": re.compile(rf"^#{{{level}}}\s", re.MULTILINE) for level in range(1, 7)}
_LISTS = {
    "ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE),
    "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE),
}
_BOLD = {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")}
_PIECES = re.compile(r"[^\W\d_]{1,7}|\d{1,3}|[^\w\s]{1,2}|_|\n+")  # about a token each in English and in code
_TABLES = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"  # tiktoken's name of a file in its cache


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Headers by level, list items by kind and bold spans by mark, fenced code left out.

    The text inside a fence (without a backtick in it) is taken away wherever it occurs, as the released code does.
    """
    for code in _FENCED.findall(text):
        text = text.replace(code, "") if code else text
    groups = {"header_count": _HEADERS, "list_count": _LISTS, "bold_count": _BOLD}
    return {
        group: {name: len(pattern.findall(text)) for name, pattern in patterns.items()}
        for group, patterns in groups.items()
    }


def style_metadata(text: str, count_tokens: Callable[[str], int]) -> dict[str, Any]:
    """What answer files store as ``metadata`` (classic: ``conv_metadata``), keys in the order that scorers rely on."""
    return {"token_len": count_tokens(text), **markdown_counts(text)}


def features(metadata: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Stored or counted metadata -> (tokens, headers, lists, bold). Raises ValueError naming the key that is wrong."""
    found = []
    for key in STORED:
        value = metadata.get(key)
        parts = list(value.values()) if isinstance(value, Mapping) else [value]
        counts = [part for part in parts if isinstance(part, int) and not isinstance(part, bool) and part >= 0]
        if len(counts) < len(parts):
            raise ValueError(f"{key} = {value!r} is no count: recount it, or leave the metadata out")
        found.append(float(sum(counts)))
    return found[0], found[1], found[2], found[3]


def style_difference(model: Floats, baseline: Floats, scoring: Scoring) -> Floats:
    """z [n, 4] of answers against the baseline's, from feature rows [n, 4]; positive: the model has more of it.

    current: (T_m - T_b) / (T_m + T_b), and of the densities rho = count / (tokens + 1) of headers, lists and bold
    (rho_m - rho_b) / (rho_m + rho_b + 1). classic: (c_m - c_b) / (c_m + c_b + 1) of all four counts. Two answers
    without a token do not differ (the released code divides by zero).
    """
    if model.shape != baseline.shape or model.ndim != 2 or model.shape[1] != len(FEATURES):
        raise ValueError(f"feature rows {model.shape} and {baseline.shape}: give two arrays [n, {len(FEATURES)}]")
    if scoring == "classic":
        return (model - baseline) / (model + baseline + 1)
    tokens = model[:, :1] + baseline[:, :1]
    length = (model[:, :1] - baseline[:, :1]) / np.where(tokens > 0, tokens, 1.0)
    first, second = (rows[:, 1:] / (rows[:, :1] + 1) for rows in (model, baseline))
    return np.concatenate([length, (first - second) / (first + second + 1)], axis=1)


def approximate_tokens(text: str) -> int:
    """About the number of BPE tokens, without a table: pieces of words, numbers, signs and runs of line ends.

    Near enough for the ratio of two lengths; not a token count of any model.
    """
    return len(_PIECES.findall(text))


def token_counter(scoring: Scoring) -> tuple[str, Callable[[str], int]]:
    """Name and function: tiktoken's encoding where it and its tables are here, else the approximate counter.

    Nothing is downloaded: the tables must lie in tiktoken's cache folder (``TIKTOKEN_CACHE_DIR``).
    """
    name = ENCODINGS[scoring]
    try:
        import tiktoken
    except ImportError:
        return APPROXIMATE, approximate_tokens
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default
    if not (Path(folder) / hashlib.sha1(_TABLES.format(name).encode()).hexdigest()).exists():
        return APPROXIMATE, approximate_tokens
    encoding = tiktoken.get_encoding(name)
    return name, lambda text: len(encoding.encode(text, disallowed_special=()))
