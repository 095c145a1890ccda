"""Files of AlpacaEval 2: annotations and difficulties in, ``leaderboard.csv`` out.

The official convention everywhere: ``output_1`` and ``generator_1`` are the baseline, ``output_2`` and ``generator_2``
the evaluated model, preference 1 means that the baseline wins, 2 that the model does; an old 0 means 1.5.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rto.evaluation.alpaca import GAMED_WEIGHT, Annotations, Difficulty, IndexedBy, LengthControlled, WinRates

NUMBERS = ("index", "preference", "len_model", "len_baseline")
GAMED = ("model", "preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
RAW = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate")
LEADERBOARD = (*RAW, "mode", "avg_length", "length_controlled_winrate", "lc_standard_error")


# --- in -----------------------------------------------------------------------------------------------


def read_annotations(path: str | Path, name: str | None = None, reference: str | Path | None = None) -> Annotations:
    """The official ``annotations.json``, or numbers alone as CSV.

    ``name``: the evaluated model; a file whose ``generator_2`` is another one is refused. ``reference``: the file of
    the baseline's outputs, which numbers the instructions; without it a row's place in the JSON is its number.

    Raises:
        ValueError: with file and row, for whatever cannot be used.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _official(path, name, reference)
    if path.suffix == ".csv":
        if reference is not None:
            raise ValueError(f"{path}: numbers alone hold their own index: leave the reference out")
        return _numbers(path, name)
    raise ValueError(f"{path}: annotations are a .json file (official) or a .csv file ({', '.join(NUMBERS)})")


def read_difficulty(path: str | Path) -> Difficulty:
    """``df_gamed.csv``: a row a gamed answer of the baseline. Rows without a preference keep their difficulty only.

    Raises:
        ValueError: with file and row, for missing columns, for what is no number, and for rows of a model.
    """
    path = Path(path)
    of: dict[int, float] = {}
    rows, models = [], set()
    for where, row in _table(path, GAMED):
        if row["not_gamed_baseline"] not in ("False", "false", "0"):
            raise ValueError(
                f"{where}: not_gamed_baseline = {row['not_gamed_baseline']!r}: only gamed rows belong here"
            )
        index = _whole(row, "index", where)
        gap, difficulty = (_number(row, key, where) for key in ("std_delta_len", "instruction_difficulty"))
        of.setdefault(index, difficulty)
        models.add(row["model"])
        share = _number(row, "preference", where, empty=True)
        if not (math.isnan(share) or 0 <= share <= 1):
            raise ValueError(f"{where}: preference = {share}: gamed rows have a share between 0 and 1")
        if not math.isnan(share):
            rows.append((share, gap, difficulty))
    if len(rows) < 10:
        raise ValueError(f"{path}: {len(rows)} rows with a preference: df_gamed.csv has 1,610")
    share, gap, difficulty = np.array(rows).T
    return Difficulty(of, share, gap, difficulty, GAMED_WEIGHT / len(models))


def read_reference(path: str | Path) -> list[dict[str, str]]:
    """The baseline's outputs, ``alpaca_eval_gpt4_baseline.json``: ``instruction``, ``output`` and ``dataset`` of each.

    Raises:
        ValueError: with file and row, for missing texts and for an instruction that comes twice.
    """
    path = Path(path)
    found = []
    for where, row in _objects(path):
        found.append({key: _text(row, key, where) for key in ("instruction", "output", "dataset")})
    _once([row["instruction"] for row in found], path)
    return found


def _official(path: Path, name: str | None, reference: str | Path | None) -> Annotations:
    models: dict[str, str | None] = {"generator_1": None, "generator_2": name, "annotator": None}
    instructions, numbers = [], []
    for where, row in _objects(path):
        instructions.append(_text(row, "instruction", where))
        for key, known in models.items():
            found = row.get(key)
            if name is not None and key == "generator_2" and row.get("generator_1") == name != found:
                raise ValueError(
                    f"{where}: {name} is generator_1, the baseline's place: the two systems are swapped. "
                    f"Judge again with the outputs of {name} as --model_outputs, or name the model that is evaluated"
                )
            if known is not None and found is not None and found != known:
                raise ValueError(
                    f"{where}: {key} is {found!r}, not {known!r}: one file holds one model, one baseline and one judge"
                )
            if isinstance(found, str):
                models[key] = found
        baseline, model = (_text(row, key, where) for key in ("output_1", "output_2"))
        if "preference" not in row:
            raise ValueError(f"{where}: no key 'preference'; null says that the judge gave none")
        numbers.append((_preference(row["preference"], where), len(model), len(baseline)))
    _once(instructions, path)
    index, indexed_by = _index(instructions, path, reference)
    preference, len_model, len_baseline = np.array(numbers, dtype=np.float64).T
    names = models["generator_2"], models["generator_1"]
    return Annotations(np.array(index), preference, len_model, len_baseline, *names, indexed_by, models["annotator"])


def _index(instructions: list[str], path: Path, reference: str | Path | None) -> tuple[list[int], IndexedBy]:
    if reference is None:
        return list(range(len(instructions))), "position"
    places = {row["instruction"]: place for place, row in enumerate(read_reference(reference))}
    unknown = [row for row, instruction in enumerate(instructions, 1) if instruction not in places]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} instructions are not in {reference}, the first in row {unknown[0]}")
    return [places[instruction] for instruction in instructions], "reference"


def _numbers(path: Path, name: str | None) -> Annotations:
    index, numbers = [], []
    for where, row in _table(path, NUMBERS):
        index.append(_whole(row, "index", where))
        preference = _preference(_number(row, "preference", where, empty=True), where)
        numbers.append((preference, _whole(row, "len_model", where), _whole(row, "len_baseline", where)))
    _once(index, path)
    preference, len_model, len_baseline = np.array(numbers, dtype=np.float64).T
    return Annotations(np.array(index), preference, len_model, len_baseline, name)


# --- out ----------------------------------------------------------------------------------------------


def write_json(path: str | Path, value: Any) -> None:
    """Strict JSON: one array or one object."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # a lone surrogate's JSON escape


def write_leaderboard(path: str | Path, rows: Mapping[str, tuple[WinRates, LengthControlled | None]]) -> None:
    """``leaderboard.csv`` with the official columns, a row a model; without LC its two cells stay empty."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", *LEADERBOARD])
        for name, (raw, lc) in rows.items():
            cells = [getattr(raw, column) for column in RAW]
            cells += ["community", raw.avg_length]  # the package's word for models that it has not verified itself
            cells += [lc.win_rate, lc.standard_error] if lc else ["", ""]
            writer.writerow([name, *cells])


# --- rows and cells -----------------------------------------------------------------------------------


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row stands (FILE: row N) and the row, N from 1, of one JSON array of objects."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error}); one array of objects is needed, not JSON lines") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: one JSON array with a row an instruction is needed")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number}: an object is needed, not {type(row).__name__}")
        yield f"{path}: row {number}", row


def _table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Where a row stands (FILE: row N) and the row, N from 1 after the header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; needed: {', '.join(columns)}")
        number = 0
        for number, row in enumerate(reader, 1):
            if any(row[column] is None for column in columns):
                raise ValueError(f"{path}: row {number}: fewer cells than columns")
            yield f"{path}: row {number}", row
        if number == 0:
            raise ValueError(f"{path}: no row below the header")


def _number(row: Mapping[str, str], key: str, where: str, empty: bool = False) -> float:
    """A finite number, or, where that is allowed, NaN for an empty cell."""
    text = row[key].strip()
    if empty and text.lower() in ("", "nan"):
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {key} = {row[key]!r} is no number")
    return value


def _whole(row: Mapping[str, str], key: str, where: str) -> int:
    value = _number(row, key, where)
    if value < 0 or value != int(value):
        raise ValueError(f"{where}: {key} = {row[key]!r} is no whole number from 0 on")
    return int(value)


def _preference(value: Any, where: str) -> float:
    """In [1, 2]; None and NaN are missing, and an old 0 is a draw."""
    number = math.nan if value is None else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{where}: preference = {value!r} is no number; null says that the judge gave none")
    if not (math.isnan(number) or number == 0 or 1 <= number <= 2):
        raise ValueError(f"{where}: preference = {value!r}: 1 (the baseline wins) to 2 (the model wins) are possible")
    return 1.5 if number == 0 else float(number)


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(f"{where}: {key} = {row.get(key)!r}: a text is needed")
    return row[key]


def _once(values: Sequence[str | int], path: Path) -> None:
    seen: dict[str | int, int] = {}
    for number, value in enumerate(values, 1):
        if value in seen:
            raise ValueError(f"{path}: rows {seen[value]} and {number} hold one instruction: keep one of them")
        seen[value] = number
