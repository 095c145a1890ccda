"""The reference's log-probs of several processes: all know the same."""

from __future__ import annotations

from typing import Any

import torch

from rto.models.runtime import Runtime
from rto.preferences.cache import ReferenceCache


class Both(Runtime):
    """What two processes give at the same place."""

    def __init__(self, said: list[Any]) -> None:
        super().__init__("cpu")
        self.said = said

    def gather_all(self, item: Any) -> list[Any]:
        return self.said


def never() -> torch.Tensor:
    raise AssertionError("the reference is run")


def test_what_one_process_has_read_all_know(tmp_path):
    """An answer that both have read, padded differently, has one value from there on."""
    path = tmp_path / "c.safetensors"
    one, two = ReferenceCache(path, "f"), ReferenceCache(path, "f")
    a, b, c = ([1], [2]), ([1], [3]), ([1], [4])
    one.sums([a, b], lambda: torch.tensor([-1.0, -2.0]))
    two.sums([b, c], lambda: torch.tensor([-2.5, -3.0]))
    both = Both([one.added, two.added])
    one.share(both)
    two.share(both)
    assert one.sums([a, b, c], never).tolist() == two.sums([a, b, c], never).tolist() == [-1.0, -2.5, -3.0]
    assert one.known == two.known


def test_sharing_sends_what_is_new(tmp_path):
    cache, alone = ReferenceCache(tmp_path / "c.safetensors", "f"), Runtime("cpu")
    cache.sums([([1], [2])], lambda: torch.tensor([-1.0]))
    assert len(cache.added) == 1
    cache.share(alone)
    assert not cache.added and len(cache.known) == 1
    cache.sums([([1], [2])], never)
    assert not cache.added


def test_a_file_has_what_was_read_since_the_last_sharing(tmp_path):
    cache = ReferenceCache(tmp_path / "c.safetensors", "f")
    cache.sums([([1], [2])], lambda: torch.tensor([-1.0]))
    cache.save(Runtime("cpu"))
    again = ReferenceCache(cache.path, "f")
    assert again.sums([([1], [2])], never).tolist() == [-1.0]
    assert again.knows([([1], [2])]) and not again.knows([([1], [2]), ([1, 2], [])])
