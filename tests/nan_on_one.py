"""Run by ``test_two_processes``: ``rto`` with a NaN in one token of the policy, on the second process alone."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import torch

from rto.cli import end, main
from rto.models.role import Role

plain, calls = Role.logprobs, []


def wrong(role: Role, completions: Any, *rest: Any, **more: Any) -> Any:
    values, entropy = plain(role, completions, *rest, **more)
    if os.environ["RANK"] == "1" and values.requires_grad:
        calls.append(1)
        if len(calls) == 2:
            values = values.clone()
            values[0, 0] = math.nan
    return values, entropy


Role.logprobs = wrong  # type: ignore[method-assign]
code = main(sys.argv[1:])
if torch.distributed.is_initialized():
    sys.exit("main left the process group open: at exit gloo's threads can abort the process")
end(code)
