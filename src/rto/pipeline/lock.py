"""One run folder, one run: a lock that the kernel releases when its holder dies, however it dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from datetime import datetime
from pathlib import Path

LOCK = ".lock"
_WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # file systems that have no flock
_held: set[int] = set()


def _let_go() -> None:
    """In a forked child: a lock lives as long as any copy of its descriptor, and a child may outlive the holder."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class RunLock:
    """``with RunLock(folder):`` holds ``folder/.lock`` by flock(2). Of several processes only the main one does.

    The file stays when the lock is released, because removing it would let two processes lock two files of that
    name. What it says (JSON: ``pid``, ``host``, ``since``) is for people; the kernel alone knows whether it is held.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / LOCK
        self._number: int | None = None

    def __enter__(self) -> RunLock:
        """Makes the folder if needed.

        Raises:
            ValueError: another process holds it, the file system has no locks, or this is Windows.
        """
        if sys.platform == "win32":
            raise ValueError("a run folder cannot be locked on Windows, which has no flock: use WSL or Linux")
        import fcntl

        self.path.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().astimezone().isoformat()}
            os.ftruncate(number, 0)
            os.pwrite(number, json.dumps(me).encode() + b"\n", 0)
        except BlockingIOError as error:
            holder = _holder(os.pread(number, 4096, 0))
            os.close(number)
            raise ValueError(
                f"{self.path.parent} is in use by {holder}. Wait until it ends, stop it, or choose another --output"
            ) from error
        except OSError as error:
            os.close(number)
            if error.errno not in _WITHOUT:
                raise
            raise ValueError(
                f"{self.path.parent} is on a file system without locks ({error.strerror}), so two runs could write "
                "there at once: choose an --output on a local disk"
            ) from error
        _held.add(number)
        self._number = number
        return self

    def __exit__(self, *_: object) -> None:
        number, self._number = self._number, None
        if number in _held:  # not in a forked child, which has let go already
            _held.remove(number)
            os.ftruncate(number, 0)
            os.close(number)


def _holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it is just writing, or just leaving
        return "another process"
