"""A reference that follows the policy slowly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(target: Sequence[Tensor], source: Sequence[Tensor], decay: float) -> None:
    """target <- decay * target + (1 - decay) * source, in place, tensor by tensor.

    Keep ``target`` in float32: in bfloat16 the steps of a decay near 1 round to nothing.
    """
    for slow, fast in zip(target, source, strict=True):
        slow.lerp_(fast.to(slow), 1 - decay)
