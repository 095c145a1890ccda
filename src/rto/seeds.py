"""All randomness of a run: numbers derived from its seed and a name.

A generator is made where it is used, from the run's seed and what it is for ("rollouts", iteration, row).
So nothing depends on how work is cut into batches or processes, and a resumed run has no generator to restore.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit integer that depends on ``seed`` and every name."""
    text = "/".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def shuffled(n: int, seed: int, *names: str | int) -> list[int]:
    """A permutation of 0..n-1."""
    order = list(range(n))
    random.Random(derive(seed, *names)).shuffle(order)
    return order


def uniforms(n: int, seed: int, *names: str | int) -> torch.Tensor:
    """n numbers in [0, 1), float32."""
    return torch.rand(n, generator=torch.Generator().manual_seed(derive(seed, *names)))


@contextlib.contextmanager
def global_torch(seed: int, *names: str | int) -> Iterator[None]:
    """Seed torch's global generator of the CPU for code that draws from nothing else (initialisers), then put it back.

    Those of GPUs are left alone: models and adapters are made on the CPU and then moved.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, *names))
        yield
