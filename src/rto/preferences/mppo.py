"""Multi pair-wise preference optimisation: several scored answers a prompt (Xie et al. 2024, arXiv 2412.15244)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from rto.numerics import masked_sum
from rto.preferences.parts import log_complement, per_token


def mppo(
    logprobs: Float[Tensor, "B N"],
    lengths: Float[Tensor, "B N"],
    scores: Float[Tensor, "B N"],
    there: Bool[Tensor, "B N"],
    *,
    variant: Literal["single", "mns", "mnm", "mcs", "mcm", "list_mle", "point_ce", "point_mse"] = "mnm",
    full_score: float = 10.0,
) -> Float[Tensor, " B"]:
    """Fit p = exp(log-prob a token), a number in (0, 1], to the scores. No reference, no beta.

    w is the best answer (the first of several), l each answer with a lower score, i > j each pair by score:

    ``single``: -log sigma(p_w - p_worst). ``mns``: sum over l of -log sigma(p_w - p_l).
    ``mnm`` (the paper's choice): -log sigma(sum over l of (p_w - p_l)).
    ``mcs``, ``mcm``: the same two sums over all pairs i > j.
    ``list_mle``: sum over i of -log(exp p_i / (exp p_i + sum over j < i of exp p_j)), Plackett-Luce.
    ``point_ce``: mean of -[s log p + (1 - s) log(1 - p)]. ``point_mse``: mean of (s - p)^2. s = score / full_score.

    Answers of equal score make no pair, and a row without a pair gives 0. Cells that are not there may hold anything.
    Which answer is the l of ``single`` beyond two, the exp in ``list_mle`` and the means are our reading of the paper.

    Raises:
        ValueError: a point-wise variant meets a score outside [0, full_score].
    """
    logp = per_token(torch.where(there, logprobs, 0.0), torch.where(there, lengths, 1.0))
    logp = logp.clamp(max=0)  # above 0 by rounding only
    p = logp.exp()
    if variant in ("point_ce", "point_mse"):
        return _pointwise(logp, torch.where(there, scores, 0.0) / full_score, there, variant == "point_ce", full_score)
    pairs = (scores[:, :, None] > scores[:, None, :]) & there[:, :, None] & there[:, None, :]  # [B, better, worse]
    if variant == "list_mle":
        rivals = pairs | torch.eye(p.shape[1], dtype=torch.bool, device=p.device)
        total = torch.where(rivals, p[:, None, :], -torch.inf).logsumexp(-1)
        return masked_sum(total - p, there)
    if variant in ("single", "mns", "mnm"):
        pairs = pairs & _at(torch.where(there, scores, -torch.inf).argmax(-1), there)[:, :, None]
    if variant == "single":
        pairs = pairs & _at(torch.where(there, scores, torch.inf).argmin(-1), there)[:, None, :]
    gaps = torch.where(pairs, p[:, :, None] - p[:, None, :], 0.0)
    if variant in ("mnm", "mcm"):
        return torch.where(pairs.any((1, 2)), -logsigmoid(gaps.sum((1, 2))), 0.0)
    return torch.where(pairs, -logsigmoid(gaps), 0.0).sum((1, 2))


def _at(index: Tensor, there: Bool[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
    return one_hot(index, there.shape[1]).bool()


def _pointwise(
    logp: Float[Tensor, "B N"], wanted: Float[Tensor, "B N"], there: Bool[Tensor, "B N"], entropy: bool, full: float
) -> Float[Tensor, " B"]:
    if ((wanted < 0) | (wanted > 1)).any():
        raise ValueError(f"a score is outside [0, {full}]: set full_score to the best score that the data can give")
    loss = -(wanted * logp + (1 - wanted) * log_complement(logp)) if entropy else (wanted - logp.exp()) ** 2
    return masked_sum(loss, there) / there.sum(-1).clamp(min=1)
