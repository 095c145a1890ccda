"""Run by ``test_two_processes``: ``rto``, with room for one row of sampling and of log-probs on the second process."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

import rto.rollouts.generate as sampling
from rto.cli import end, main
from rto.models.role import Role

plain_decode, plain_logprobs = sampling._decode, Role.logprobs


def decode(role: Role, prepacked: Any, asked: Any, *more: Any) -> Any:
    _check(asked)
    return plain_decode(role, prepacked, asked, *more)


def logprobs(role: Role, completions: Any, *rest: Any, **more: Any) -> Any:
    _check(completions)
    return plain_logprobs(role, completions, *rest, **more)


def _check(rows: Any) -> None:
    if os.environ["RANK"] == "1" and len(rows) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")


sampling._decode, Role.logprobs = decode, logprobs  # type: ignore[method-assign]
end(main(sys.argv[1:]))
