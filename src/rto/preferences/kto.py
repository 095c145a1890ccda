"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.config import Positive
from rto.numerics import masked_sum


def kto(
    logprobs: Float[Tensor, "B N"],
    reference: Float[Tensor, "B N"],
    scores: Float[Tensor, "B N"],
    there: Bool[Tensor, "B N"],
    baseline: Float[Tensor, " B"],
    *,
    beta: Positive = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    desirable_above: float = 0.5,
) -> Float[Tensor, " B"]:
    """Mean over the row's answers of lambda * sigma(-s beta (r - z0)); s = 1 for a desirable answer, else -1.

    r = log pi - log pi_ref of the whole answer. z0 = max(0, ``baseline``), without gradient; the baseline is the batch
    mean of r over mismatched prompts and answers. An answer is desirable when its score is above ``desirable_above``
    (0.5 suits labels of 0 and 1). lambda = ``desirable`` or ``undesirable``: keep the ratio of their weights times
    their counts in [1, 4/3]. Cells that are not there may hold anything; a row without answers gives 0.
    """
    ratio = torch.where(there, logprobs - reference, 0.0)
    z = beta * (ratio - baseline.clamp(min=0).detach()[:, None])
    loss = torch.where(scores > desirable_above, desirable * (-z).sigmoid(), undesirable * z.sigmoid())
    return masked_sum(loss, there) / there.sum(-1).clamp(min=1)
