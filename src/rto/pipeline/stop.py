"""A polite end: SIGTERM (preemption) and SIGINT (Ctrl-C) let a step finish and be saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

# Exit codes of a run that stopped, is saved and can be continued: EX_TEMPFAIL of sysexits.h, and the shell's 128 + 2.
EXIT = {"SIGTERM": 75, "SIGINT": 130}


class Stopped(Exception):
    """A signal came, and everything is saved. ``signal`` is its name, ``code`` the exit code."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}; the same command continues")
        self.signal = name
        self.code = EXIT[name]


class Stop:
    """``with Stop() as stop:`` sets ``stop.wanted`` when a signal comes, and nothing else.

    A second signal of either kind ends the process at once: from the first on both have their default action, which
    the kernel takes even while Python is busy in a library. The handlers of before come back on exit. Python
    lets only the main thread do this; in another thread nothing is installed and the signals act as before.

    A signal may come between any two lines, so read ``wanted`` once where two things depend on it. Several processes
    must agree on it before they act: one that stops alone leaves the others waiting.
    """

    def __init__(self) -> None:
        self.wanted: str | None = None  # "SIGTERM" or "SIGINT"
        self._before: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._owner = os.getpid()
            for name in EXIT:
                self._before[signal.Signals[name]] = signal.signal(signal.Signals[name], self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def check(self) -> None:
        """Raises :class:`Stopped` if a signal came. Call it where everything is saved."""
        if self.wanted is not None:
            raise Stopped(self.wanted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        for other in EXIT:
            signal.signal(signal.Signals[other], signal.SIG_DFL)
        if os.getpid() != self._owner:  # a forked worker has nothing to save
            os.kill(os.getpid(), number)
            return
        self.wanted = signal.Signals(number).name
        text = f"{self.wanted}: stops after this step, once it is saved. Once more: ends at once\n"
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, text.encode())  # print could meet itself here: this runs in the middle of anything
