"""Questions to a model behind an OpenAI-compatible endpoint: many at a time, each reply on disk at once, resumable.

One row of the JSONL file is one finished question. What is there is not asked again, whatever ended the last run.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from rto.evaluation.caller import Caller

OPENAI = "https://api.openai.com/v1"
RESERVED = ("key", "reply", "top", "finish", "error", "judge", "served", "endpoint", "settings", "asked", "time")
Row = dict[str, Any]

_GRACE = 1.0  # seconds that questions under way have to end when the others are given up


@dataclass(frozen=True)
class Endpoint:
    """Who is asked, and how.

    ``base_url``: default ``$OPENAI_BASE_URL``, else OpenAI. ``key_env`` names the environment variable with the key; a
    server elsewhere may do without. ``top_logprobs``: how many of the first token's likeliest words come back with
    their log-probs; 0 asks for none. ``timeout``: seconds of silence that end one try. ``retries``: further tries.
    ``per_minute``: at most so many requests are sent a minute, retries included. ``seed`` None is not sent.
    """

    model: str
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 2048
    top_logprobs: int = 0
    timeout: float = 60.0
    retries: int = 6
    concurrency: int = 8
    per_minute: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty: name the model that the endpoint serves")
        if min(self.max_tokens, self.concurrency, self.per_minute or 1) < 1 or self.timeout <= 0:
            raise ValueError("max_tokens, concurrency, per_minute and timeout must be above 0")
        if min(self.retries, self.top_logprobs, self.temperature) < 0 or self.per_minute == 0:
            raise ValueError("retries, top_logprobs and temperature may not be below 0, per_minute not 0")
        try:
            parts = urlsplit(self.url)
            _ = parts.port  # read only now, and no number raises
        except ValueError as error:
            raise ValueError(f"base_url is no address, write http://HOST:PORT/v1: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url is not an http:// or https:// address")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"base_url of {parts.hostname} holds more than an address: give a key in ${self.key_env}")

    @property
    def url(self) -> str:
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")

    @property
    def settings(self) -> dict[str, float | int | None]:
        """What can change a reply, beside judge and messages."""
        return {
            "temperature": float(self.temperature),
            "max_tokens": self.max_tokens,
            "top_logprobs": self.top_logprobs,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Task:
    """One question: ``messages`` as the endpoint gets them. ``about`` goes into its row as it is."""

    key: str
    messages: list[dict[str, str]]
    about: dict[str, Any]


def ask_all(
    tasks: Sequence[Task], endpoint: Endpoint, path: Path, progress: Callable[[int, int], None] | None = None
) -> list[Row]:
    """The reply to every task, in the order of the tasks; only those that ``path`` lacks are asked for.

    A row is ``about`` and: ``key``; ``reply`` (text, None when it failed); ``top`` (token -> log-prob, nats, of the
    first token; None where none came); ``finish`` (why the reply ended, "length" is a cut one); ``error`` (None, or why
    it failed after all tries: asked again by the next call); ``judge``, ``endpoint``, ``settings``, ``served`` (the
    model's name as the server has it), ``asked`` (hash of the messages) and ``time`` (UTC). Each row is appended to
    ``path`` and synced as soon as it is there. A line cut off by a crash is removed. ``progress(finished, all)`` is
    called after each row. Tries after failures wait 0.5 s, doubled each time, or as long as the server asks for.

    Raises:
        ValueError: two tasks share a key; ``about`` has a reserved key; ``path`` holds replies of another judge,
            endpoint or setting, or to other messages under a key; another process writes it; no key in the environment
            for OpenAI itself; the endpoint refuses (401, 402, 403, 404, 405); openai is not installed.
    """
    asked = _checked(tasks)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _lock(file, path)
        found: dict[str, Row] = {}
        for row in _mended(file, path):
            _check_same(row, endpoint, asked, path)
            if row["key"] in asked:
                found[row["key"]] = row
        missing = [task for task in tasks if task.key not in found or found[task.key]["error"] is not None]
        finished = len(tasks) - len(missing)
        with closing(_replies(missing, endpoint)) as replies:
            for task, fields in replies:
                row = {**task.about, "key": task.key, **fields, "judge": endpoint.model, "endpoint": endpoint.url}
                row |= {"settings": endpoint.settings, "asked": asked[task.key], "time": utc()}
                _append(file, row)
                found[task.key] = row
                finished += 1
                if progress is not None:
                    progress(finished, len(tasks))
    return [found[task.key] for task in tasks]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of :func:`ask_all`, each key's last one; none where there is no file. The file stays as it is.

    Raises:
        ValueError: a line other than the last is no such row.
    """
    rows, _ = _parsed(path.read_bytes() if path.exists() else b"", path)
    return list({row["key"]: row for row in rows}.values())


def asked_of(rows: Sequence[Row]) -> Row:
    """What a report says of these rows: ``endpoint`` and ``served`` (lists), ``settings``, and ``judged``: the first
    and the last time (UTC)."""
    known = {key: sorted({row[key] for row in rows if row.get(key)}) for key in ("endpoint", "served", "time")}
    settings = next((row["settings"] for row in rows if row.get("settings")), None)
    times = known.pop("time")
    return {**known, "settings": settings, "judged": [times[0], times[-1]] if times else [None, None]}


def digest(value: Any) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# --- asking -------------------------------------------------------------------------------------------


def _replies(tasks: Sequence[Task], endpoint: Endpoint) -> Generator[tuple[Task, Row], None, None]:
    """Tasks with what came back, as they finish. Threads ask; whoever iterates is the one writer."""
    if not tasks:
        return
    caller = Caller(endpoint)
    todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Task, Row | Exception]] = queue.SimpleQueue()
    for task in tasks:
        todo.put(task)

    def work() -> None:
        while not caller.stopped.is_set():
            try:
                task = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((task, caller.ask(task.messages)))
            except Exception as error:  # raised again below, where it is seen
                done.put((task, error))

    # Daemons: whoever interrupts must not wait for a slow judge.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(endpoint.concurrency, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for _ in tasks:
            task, result = done.get()
            if isinstance(result, Exception):
                raise result
            yield task, result
    finally:
        caller.stopped.set()
        end = time.monotonic() + _GRACE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
        caller.close()


# --- the file -----------------------------------------------------------------------------------------


def _checked(tasks: Sequence[Task]) -> dict[str, str]:
    """Key -> hash of the messages."""
    asked: dict[str, str] = {}
    for task in tasks:
        if task.key in asked:
            raise ValueError(f"two tasks have the key {task.key!r}: each needs its own")
        if taken := [name for name in RESERVED if name in task.about]:
            raise ValueError(f"task {task.key!r}: {taken[0]!r} in about is a name of the row itself: rename it")
        asked[task.key] = digest(task.messages)
    return asked


def _check_same(row: Row, endpoint: Endpoint, asked: dict[str, str], path: Path) -> None:
    now: dict[str, Any] = {"judge": endpoint.model, "endpoint": endpoint.url, "settings": endpoint.settings}
    now["asked"] = asked.get(row["key"], row.get("asked"))
    for name, value in now.items():
        if row.get(name) != value:
            what = "other messages (template, answers or prompt)" if name == "asked" else f"{name} {row.get(name)!r}"
            raise ValueError(
                f"{path} holds replies of {what}, {row['key']!r} for one; now it is {value!r}. They are never mixed: "
                "use another folder, or move the file away"
            )


def _lock(file: IO[bytes], path: Path) -> None:
    """Two processes on one file would ask everything twice. Let go when the file is closed, or the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is writing {path}: wait for it, or use another folder") from error


def _mended(file: IO[bytes], path: Path) -> list[Row]:
    """All rows; a last line that was cut off is removed from the file."""
    file.seek(0)
    data = file.read()
    rows, whole = _parsed(data, path)
    if whole < len(data):
        file.truncate(whole)
    elif data and not data.endswith(b"\n"):
        file.write(b"\n")
    file.flush()
    return rows


def _parsed(data: bytes, path: Path) -> tuple[list[Row], int]:
    """The rows, and how many bytes they take: all but those of a last line that is no row."""
    rows: list[Row] = []
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:  # bad JSON or bad UTF-8
            row = None
        if isinstance(row, dict) and {"key", "reply", "error"} <= row.keys():
            rows.append(row)
        elif number == len(lines) and not line.endswith(b"\n"):
            return rows, len(data) - len(line)
        else:
            raise ValueError(f"{path}, line {number}: not a row with key, reply and error. Delete the line")
    return rows, len(data)


def _append(file: IO[bytes], row: Row) -> None:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8 form: its backslash escape is what JSON writes for it.
    file.write(text.encode("utf-8", "backslashreplace") + b"\n")
    file.flush()
    os.fsync(file.fileno())


def utc(seconds: float | None = None) -> str:
    """A Unix time as rows and reports have it; default: now."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
