"""From files and hub data sets to rows of text. Every row that cannot be used is counted with its number."""

from __future__ import annotations

import gzip
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rto.config import Files
from rto.data import layouts
from rto.data.layouts import BadRow, Prompt, Reason, Record, plain

EXTENSIONS = (".jsonl", ".json", ".parquet")
PARTS = ("train", "test", "oracle")
_CUT = (EOFError, gzip.BadGzipFile, zlib.error)  # what a damaged gzip file raises
_PAIRS = "trl and hh (chosen, rejected), sharegpt (conversations, chosen, rejected)"
_KNOWN = {  # what a file of each kind may look like, for the message when it does not
    "pairs": _PAIRS,
    "prompts": f"prompts (prompt or messages), or a layout of pairs: {_PAIRS}",
    "scored": "scored (prompt with completion and label, or prompt with answers and scores)",
    "sft": f"messages (messages, or prompt with completion or response), or a layout of pairs: {_PAIRS}",
}


@dataclass(frozen=True)
class TextPair:
    """Two answers to one prompt, the first preferred. ``margin`` is how much better it is (0: unknown)."""

    row: int
    prompt: Prompt
    chosen: str
    rejected: str
    margin: float


@dataclass(frozen=True)
class TextPrompt:
    row: int
    prompt: Prompt


@dataclass(frozen=True)
class TextAnswer:
    row: int
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class TextScored:
    """Answers to one prompt and as many scores, the higher the better; of a labelled answer 1 or 0."""

    row: int
    prompt: Prompt
    answers: list[str]
    scores: list[float]


@dataclass(frozen=True)
class RejectedRow:
    """A row that is not used. ``row`` counts from 1: the line of a JSONL file, the position anywhere else."""

    file: str
    row: int
    reason: Reason
    detail: str


Row = TypeVar("Row")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Loaded(Generic[Row]):
    """The good rows of a file, in its order, and the bad ones."""

    file: str
    rows: list[Row]
    rejected: list[RejectedRow] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Bad rows by reason, the commonest first."""
        return dict(Counter(bad.reason for bad in self.rejected).most_common())


def read_pairs(config: Files) -> Loaded[TextPair]:
    """The preference pairs of ``config.pairs``.

    Raises ValueError for a source that cannot be read, an unknown layout, bad rows under
    ``on_bad_row = "error"``, and a file without a good row.
    """
    if config.pairs is None:
        raise ValueError("data.pairs is missing: name a file or a data set, for example --data.pairs prefs.jsonl")
    layout = config.layout if config.layout in ("trl", "hh", "sharegpt") else None
    recognised = layouts.has_pair if layout is None else None
    return _read(
        config, "pairs", config.pairs, lambda row, record: TextPair(row, *layouts.pair(record, layout)), recognised
    )


def read_prompts(config: Files) -> Loaded[TextPrompt]:
    """The prompts of ``config.prompts``, else those of the pairs, row for row. Raises as :func:`read_pairs`."""
    if config.prompts is None:
        pairs = read_pairs(config)
        return Loaded(pairs.file, [TextPrompt(pair.row, pair.prompt) for pair in pairs.rows], pairs.rejected)
    recognised = None if config.layout == "prompts" else layouts.has_prompt
    return _read(
        config, "prompts", config.prompts, lambda row, record: TextPrompt(row, layouts.prompt_of(record)), recognised
    )


def read_answers(config: Files) -> Loaded[TextAnswer]:
    """The demonstrations of ``config.sft``, else the chosen answers, row for row. Raises as :func:`read_pairs`."""
    if config.sft is None:
        pairs = read_pairs(config)
        return Loaded(pairs.file, [TextAnswer(p.row, p.prompt, p.chosen) for p in pairs.rows], pairs.rejected)
    recognised = None if config.layout == "messages" else layouts.has_answer
    return _read(config, "sft", config.sft, lambda row, record: TextAnswer(row, *layouts.answer_of(record)), recognised)


def read_scored(config: Files) -> Loaded[TextScored]:
    """The scored answers of ``config.scored``. Raises as :func:`read_pairs`."""
    if config.scored is None:
        raise ValueError("data.scored is missing: name a file or a data set, for example --data.scored scored.jsonl")
    return _read(
        config,
        "scored",
        config.scored,
        lambda row, record: TextScored(row, *layouts.scored_of(record)),
        layouts.has_scored,
    )


def write_rejected(path: str | Path, rejected: Iterable[RejectedRow]) -> None:
    """One JSON object a line: file, row, reason, detail."""
    Path(path).write_text("".join(json.dumps(asdict(bad)) + "\n" for bad in rejected), encoding="utf-8")


def split_rows(prompts: list[Prompt], test: float, oracle: float, seed: int) -> dict[str, list[int]]:
    """Indices for train, test and oracle: disjoint, ascending, the same for the same seed.

    Rows with the same prompt stay together, so that no part has seen another's prompts. ``test`` and
    ``oracle`` are shares of the rows; each part gets at least one prompt (oracle only if its share is above 0).
    Raises ValueError when there are fewer different prompts than parts.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(json.dumps(prompt), []).append(index)
    targets = {"test": max(1, round(len(prompts) * test))}
    if oracle > 0:
        targets["oracle"] = max(1, round(len(prompts) * oracle))
    wanted = ("train", *targets)
    if len(groups) < len(wanted):
        raise ValueError(
            f"{len(groups)} different prompts cannot be split into {', '.join(wanted)}: give more rows"
            + (", or set data.oracle = 0" if len(wanted) == 3 and len(groups) == 2 else "")
        )
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    parts: dict[str, list[list[int]]] = {part: [] for part in PARTS}
    for group in shuffled:
        fits = (part for part in targets if sum(map(len, parts[part])) + len(group) <= targets[part])
        parts[next(fits, "train")].append(group)
    for part in wanted:
        if not parts[part]:  # every group was too large for it, or nothing was left
            donor = max(parts.values(), key=len)
            smallest = min(donor, key=len)
            donor.remove(smallest)
            parts[part].append(smallest)
    return {part: sorted(index for group in chosen for index in group) for part, chosen in parts.items()}


def _read(
    config: Files,
    key: str,
    name: str,
    make: Callable[[int, Record], Made],
    recognised: Callable[[Record], bool] | None,
) -> Loaded[Made]:
    loaded: Loaded[Made] = Loaded(name, [])
    known, first = recognised is None, None
    for row, record in records(name, config.split, key, config.config, config.data_dir):
        try:
            if isinstance(record, BadRow):
                raise record
            if not isinstance(record, dict):
                raise BadRow("not_an_object", f"the row is {type(record).__name__}, not an object")
            known = known or recognised is None or recognised(record)
            first = first or record
            loaded.rows.append(make(row, record))
        except BadRow as bad:
            loaded.rejected.append(RejectedRow(name, row, bad.reason, bad.detail))
        if len(loaded.rows) == config.limit:
            break
    if first and not known:
        raise ValueError(
            f"data.{key} = {name!r}: no layout is recognised from the keys {plain(', '.join(map(str, first)))}. "
            f"Known layouts: {_KNOWN[key]}"
        )
    if loaded.rejected and (config.on_bad_row == "error" or not loaded.rows):
        raise ValueError(_complaint(key, loaded))
    if not loaded.rows:
        raise ValueError(f"data.{key} = {name!r} has no rows")
    return loaded


def _complaint(key: str, loaded: Loaded[Any]) -> str:
    total = len(loaded.rows) + len(loaded.rejected)
    lines = [f"data.{key} = {loaded.file!r}: {len(loaded.rejected)} bad rows among the {total} read"]
    for reason, count in loaded.counts().items():
        bad = [row for row in loaded.rejected if row.reason == reason]
        rows = ", ".join(str(row.row) for row in bad[:5]) + (", ..." if count > 5 else "")
        lines.append(f"  {reason}: {count} (rows {rows}; row {bad[0].row}: {bad[0].detail})")
    if loaded.rows:
        lines.append("Mend them, or leave them out with --data.on_bad_row skip")
    else:
        lines.append("No row is good: mend the file, or name its layout with --data.layout")
    return "\n".join(lines)


# --- reading -------------------------------------------------------------------------------------------


def records(
    name: str, split: str, key: str, config: str | None = None, data_dir: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Numbered records of a file or a hub data set; a line that cannot be parsed comes as a :class:`BadRow`.

    ``config`` and ``data_dir`` choose a part of a hub data set. Raises ValueError with ``key`` and ``name`` for a file
    that is missing, damaged or of no known kind, and for one beside the choice of a part.
    """
    path = Path(os.path.expanduser(name))
    extension = next((known for known in EXTENSIONS if name.lower().endswith((known, known + ".gz"))), None)
    if os.path.isfile(path):  # Path.is_file raises for a name that is too long to be one
        for option, part in (("config", config), ("data_dir", data_dir)):
            if part is not None:
                raise ValueError(
                    f"data.{option} = {part!r} is a part of a hub data set, and data.{key} = {name!r} is a file: leave "
                    f"data.{option} out (--data.{option} none), or name a data set of the hub"
                )
        if extension is None:
            raise ValueError(
                f"data.{key}: {name!r} is none of {', '.join(EXTENSIONS)} (each may be .gz): rename or convert it"
            )
        read = {".jsonl": _lines, ".json": _array, ".parquet": _parquet}[extension]
        return _named(f"data.{key} = {name!r}", read(path))
    # One slash is a hub name (owner/name); anything else with a separator is meant as a path.
    pathlike = extension or name.count("/") > 1 or "\\" in name or name.startswith(("/", "./", "../", "~"))
    if pathlike and not os.path.isdir(path):
        raise ValueError(f"data.{key}: file not found: {plain(repr(name))} (looked for {plain(str(path.absolute()))})")
    return _hub(name, split, key, config, data_dir)


def _named(where: str, read: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    try:
        yield from read
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Blank lines are no rows, but they count as lines."""
    number = 0
    with _open(path) as handle:
        try:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, _parse(line)
        except _CUT as error:
            raise ValueError(f"the gzip file is damaged after line {number} ({error}): fetch it again") from error


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("undecodable", f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON, or an integer of thousands of digits
        return BadRow("undecodable", f"not JSON: {error}")


def _array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with _open(path) as handle:
            records = json.loads(handle.read().decode("utf-8-sig"))
    except _CUT as error:
        raise ValueError(f"the gzip file is damaged ({error}): fetch it again") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}). If each line is one object, name the file .jsonl") from error
    if not isinstance(records, list):
        raise ValueError(f"holds {type(records).__name__}, not an array of objects: make it an array, or JSONL")
    yield from enumerate(records, 1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with _open(path) as handle:
            for batch in pyarrow.parquet.ParquetFile(handle).iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (OSError, ValueError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot be read as Parquet after row {number} ({plain(str(error))})") from error


def _hub(name: str, split: str, key: str, config: str | None, data_dir: str | None) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, data_dir=data_dir, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        known, part = ", ".join(EXTENSIONS), {"split": split, "config": config, "data_dir": data_dir}
        told = ", ".join(f"{option} {plain(repr(value))}" for option, value in part.items() if value is not None)
        raise ValueError(
            f"data.{key}: there is no file {plain(repr(name))}, and no data set of that name with {told} could be "
            f"loaded ({plain(str(error))}). Give a local file ({known}), or check data.split, data.config, "
            "data.data_dir and the connection"
        ) from error
    return enumerate(rows, 1)
