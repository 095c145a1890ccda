"""The values of a segment scorer, laid out over the tokens: segment, token and bandit PPO."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Signals
from rto.config import NonNegative
from rto.segments import segment_lengths, segment_sums


def segment(
    signals: Signals,
    *,
    scale: float = 1.0,
    layout: Literal["even", "last", "same"] = "even",
    length_norm: bool = False,
    clip: NonNegative | None = 10.0,
) -> Float[Tensor, "B T"]:
    """clamp(scale * x, +-clip) on every token, x the layout of the normalised values u_k of segments of n_k tokens
    (Segmenting Text and Learning Their Rewards, arXiv 2501.02790; names and order of its published code).

    ``even``: u_k / n_k on each token of segment k. ``last``: u_k on its last token. ``same``: u_k on each token,
    so that long segments count n_k times. Tokens in no segment, the end of sequence among them, get 0.
    ``length_norm`` divides by the tokens of the answer, end-of-sequence included. The scorer's cutoff decides
    what a segment is: with 0 (tokens) all layouts agree, with none (answers) ``last`` is bandit PPO's reward.
    """
    assert signals.segments is not None and signals.segment_ends is not None
    mask, ends = signals.mask, signals.segment_ends
    reward = torch.where(ends & mask, signals.segments, 0.0)
    if layout != "last":
        reward = segment_sums(reward, ends, mask)
    if layout == "even":
        reward = reward / segment_lengths(ends, mask).clamp(min=1)
    if length_norm:
        reward = reward / mask.sum(-1, keepdim=True).clamp(min=1)
    reward = scale * reward
    return reward if clip is None else reward.clamp(-clip, clip)
