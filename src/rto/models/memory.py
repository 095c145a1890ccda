"""One pass over a batch on every process: again in smaller pieces where memory is short, and one mind about faults.

A loss is a sum over rows, so that smaller pieces give the same result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from rto.finite import NotFinite
from rto.room import Room

Result = TypeVar("Result")


def alone(item: Any) -> list[Any]:
    """What one process gathers."""
    return [item]


class Budget:
    """Padded tokens of one pass, halved for good whenever they were too many for any process.

    ``gather`` gives one item of every process (:meth:`rto.models.runtime.Runtime.gather_all`).
    """

    def __init__(
        self, tokens: int, say: Callable[[str], None], gather: Callable[[Any], list[Any]] = alone, what: str = "micro"
    ) -> None:
        self.tokens, self.say, self.gather, self.what = tokens, say, gather, what

    def within(self, work: Callable[[int], Result], undo: Callable[[], None] = lambda: None) -> Result:
        """``work(tokens)``, again with half of them after each lack of memory; ``undo`` forgets what was done.

        ``work`` is this process's own part and sends nothing to the others: they would wait for one that failed.

        Raises:
            NotFinite: any process met it; all raise the same.
            RuntimeError: as it came, where one row alone does not fit.
        """
        while True:
            lacking, found, results = False, None, []
            try:
                results.append(work(self.tokens))
            except NotFinite as error:
                found = (error.culprit, error.rows)
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error) or self.tokens == 1:
                    raise
                lacking = True
            said = self.gather((lacking, found))
            faults = [fault for _, fault in said if fault is not None]
            if faults:
                undo()
                raise NotFinite(*faults[0])
            if not any(short for short, _ in said):
                return results[0]
            self.say(f"out of memory: {self.what}_tokens {self.tokens} -> {self.tokens // 2}, and the step again")
            undo()  # outside of the handler: there the error would keep every activation alive
            self.tokens //= 2
            gc.collect()
            Room.idle.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def lacks_memory(error: BaseException) -> bool:
    """CUDA's and the CPU allocator's ways of saying it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory"))
