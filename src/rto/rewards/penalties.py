"""Penalties for answers that do not end, and for long ones.

After the flags ``end_penalty`` and ``len_thres`` of the published code of arXiv 2501.02790, with two differences: the
value is added to the other terms (there it replaces the whole row), and a length is the answer's own.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.batch import Signals
from rto.config import Count
from rto.segments import last_token

Placement = Literal["every", "end"]


def missing_eos(signals: Signals, *, value: float = -0.05, placement: Placement = "every") -> Float[Tensor, "B T"]:
    """``value`` on every token (or on the last one) of an answer without an end-of-sequence token."""
    return _placed(~signals.finished, signals.mask, value, placement)


def length(
    signals: Signals, *, limit: Count = 800, value: float = -0.05, placement: Placement = "every"
) -> Float[Tensor, "B T"]:
    """``value`` on every token (or on the last one) of an answer of more than ``limit`` tokens, end-of-sequence
    included."""
    return _placed(signals.mask.sum(-1) > limit, signals.mask, value, placement)


def _placed(
    rows: Bool[Tensor, " B"], mask: Bool[Tensor, "B T"], value: float, placement: Placement
) -> Float[Tensor, "B T"]:
    where = mask if placement == "every" else last_token(mask)
    return torch.where(where & rows[:, None], value, 0.0)
