"""Weights that lie in a file: the system reads them when they are needed and can take their memory back.

A frozen model of its own acts once an iteration of RL, or once a step of a preference loss. Between its turns its pages
need not count among the process's memory; the file's copy in the system's cache stays, so that they come back without a
disk.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn

from rto.models.role import Role

LARGE = 2**26  # bytes of a mapping; looking it up takes some milliseconds, which smaller ones are not worth
_MADV_DONTNEED = 4  # of Linux's mman.h
GHOSTS: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()  # of a rehearsal, which is told instead
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s")


def leave(role: Role, policy: Role) -> None:
    """The pages of a frozen role leave memory until its next turn, unless it shares them with the policy."""
    if role.backbone is not policy.backbone:
        let_go(role.backbone.network)


def let_go(network: nn.Module) -> int:
    """Give back the pages of the files in which this network's weights lie. Returns the bytes of the mappings.

    Nothing is lost: a mapping of which any page was changed stays as it is, by the word of the system. Networks whose
    weights are trained, on a GPU or not in a file, and systems other than Linux, are left alone.
    """
    weights = list(network.parameters())
    here = not any(p.requires_grad for p in weights) and all(p.device.type == "cpu" for p in weights)
    if not here or sum(p.nbytes for p in weights) < LARGE or not Path("/proc/self/smaps").exists():
        return 0
    if network in GHOSTS:
        GHOSTS[network]()
        return 0
    places = [p.data_ptr() for p in weights]
    gone = 0
    for start, size in _unchanged_files():
        if size >= LARGE and any(start <= place < start + size for place in places):
            gone += size if _libc().madvise(start, size, _MADV_DONTNEED) == 0 else 0
    return gone


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _unchanged_files() -> list[tuple[int, int]]:
    """Place and size of the mappings of files to which this process wrote nothing: a page it wrote to is anonymous."""
    found: list[tuple[int, int]] = []
    at: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := _HEAD.match(line):
            start, stop = (int(number, 16) for number in head.groups()[:2])
            at = (start, stop - start) if head[3] != "0" else None  # a file has a number
        elif at is not None and line.startswith(("Anonymous:", "Swap:")):
            if line.split()[1] != "0":
                at = None
        elif at is not None and line.startswith("VmFlags:"):
            found.append(at)
            at = None
    return found
