"""Writing beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """One piece of work at a time in a thread of its own. Python waits for it before it ends."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        self.wait()

        def run() -> None:
            try:
                work()
            except Exception as error:  # raised where the loop asks next
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises what the last work raised, if it has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def settle(self) -> None:
        """Until the work is done, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until the work is done. Raises what it raised."""
        self.settle()
        error, self._error = self._error, None
        if error is not None:
            raise error
