"""Out of memory: the same work again in smaller pieces. A loss is a sum over rows, so that the result is the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Budget:
    """Padded tokens of one training pass, halved for good whenever they were too many."""

    def __init__(self, tokens: int, say: Callable[[str], None], alone: bool = True) -> None:
        """``alone``: of several processes none may change its mind, the others would wait; there an error stays one."""
        self.tokens, self.say, self.alone = tokens, say, alone

    def within(self, work: Callable[[int], Result], undo: Callable[[], None]) -> Result:
        """``work(tokens)``, again with half of them after each lack of memory; ``undo`` forgets what was done.

        Raises:
            RuntimeError: as it came, where one row alone does not fit, or several processes run.
        """
        while True:
            try:
                return work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not (self.alone and lacks_memory(error) and self.tokens > 1):
                    raise
                self.say(f"out of memory: micro_tokens {self.tokens} -> {self.tokens // 2}, and the step again")
            undo()  # outside of the handler: there the error would keep every activation alive
            self.tokens //= 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def lacks_memory(error: BaseException) -> bool:
    """CUDA's and the CPU allocator's ways of saying it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory"))
