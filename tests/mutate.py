"""A seeded mutator, and the rule that every mutant must meet: it loads, or it is refused in clear words and in time."""

from __future__ import annotations

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")
LIMIT = 5.0  # seconds that one mutant may take
DEEP = 5000  # levels: more than any parser goes down


class Raw(str):
    """Text that stands for itself in :func:`to_json`: what ``json.dumps`` would not write."""


class Hang(BaseException):
    """Not an ``Exception``, so that nothing under test can take it for its own."""


# Values that stand where another was expected.
ODD: list[Any] = [None, True, 0, -1, 2.5, "", " \n", "\x00", "\ud83d", "\x1b[31m\r\nrto: done", "a" * 20_000]
ODD += [[], {}, [[]], ["a"], {"": None}, {"role": "tool", "content": "a"}, {"from": "gpt", "value": "\n\nHuman: a"}]
ODD += [Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("1" + "0" * 400), Raw("9" * 5000)]
ODD += [Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * 200 + "1" + "}" * 200)]


def to_json(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value)


def spoil_value(tree: Any, chance: random.Random, odd: list[Any]) -> Any:
    """A copy of nested dicts and lists with one place changed, gone, doubled, renamed, shuffled or swapped."""
    tree = copy.deepcopy(tree)
    holder, key = chance.choice(list(_places(tree)))
    kind = chance.choice(("odd", "odd", "odd", "gone", "twice", "renamed", "shuffled", "swapped"))
    if kind == "gone":
        del holder[key]
    elif kind == "twice" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "renamed" and isinstance(holder, dict):
        holder[chance.choice([f"{key}_", str(key).upper(), "", "\x1b[0m\n", "\ud83d", "k" * 9000])] = holder.pop(key)
    elif kind == "shuffled" and isinstance(holder[key], list):
        chance.shuffle(holder[key])
    elif kind == "swapped":
        other, name = chance.choice(list(_places(tree)))
        holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(holder[key])
    else:
        holder[key] = chance.choice(odd)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each container with each of its keys or positions."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in items:
        yield tree, key
        yield from _places(part)


def spoil_bytes(data: bytes, chance: random.Random) -> bytes:
    """One fault of a disk, a download or an editor."""
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + chance.choice((1, 2, 7, 60)))
    part = data[start:end]
    text = data.decode("utf-8", "replace")
    faults: list[Callable[[], bytes]] = [
        lambda: data[:start] + bytes(byte ^ (1 << chance.randrange(8)) for byte in part) + data[end:],  # flipped
        lambda: data[:start] + chance.randbytes(len(part)) + data[end:],
        lambda: data[:start] + data[end:],  # removed
        lambda: data[:end] + part + data[end:],  # doubled
        lambda: data[:start],  # cut
        lambda: data[start:],
        lambda: data[:start] + bytes(len(part)) + data[end:],  # null bytes
        lambda: data[:start] + b"\x00\xff\xfe" + data[start:],
        lambda: data + bytes(512),  # what a power cut leaves at the end of a file
        lambda: b"\xef\xbb\xbf" + data,  # byte order marks, other encodings
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-32-le"),
        lambda: text.encode("latin-1", "replace"),
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: data.replace(b"\n", b"\r"),
        lambda: data[:start] + b"\\ud83d" + data[start:],
        lambda: data[:start] + b"{[\"'" + data[start:],
        lambda: data[:start] + b"\n\n" + data[start:],
        lambda: data[:start] + b"a" * 50_000 + data[start:],
        lambda: b"",
        lambda: chance.randbytes(300),
        lambda: data + data,
    ]
    return chance.choice(faults)()


@contextmanager
def watchdog(seconds: float = LIMIT) -> Iterator[None]:
    """Raises :class:`Hang` in what takes longer. Main thread only."""

    def bark(*_: object) -> None:
        raise Hang(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(action: Callable[[], Result]) -> Result | ValueError:
    """What ``action`` returns, or the ValueError that it refuses with: exactly that, no JSONDecodeError and the like,
    whose messages know no file. Everything else comes out: it is a bug."""
    with watchdog():
        try:
            return action()
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            return error


def faults_of(message: str, width: int = 1500) -> list[str]:
    """What is wrong with a message to a person: it must be short, and what it quotes must not steer the terminal."""
    lines = message.split("\n")
    faults = [f"line {number} is not printable" for number, line in enumerate(lines, 1) if not line.isprintable()]
    faults += [f"line {number} has {len(line)} characters" for number, line in enumerate(lines, 1) if len(line) > width]
    return faults + [f"{len(lines)} lines"] * (len(lines) > 25)
