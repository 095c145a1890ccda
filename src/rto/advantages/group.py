"""Several answers to one prompt as each other's baseline: RLOO and GRPO on token rewards.

The published estimators subtract one number from an answer's score. Here the score is the reward-to-go, and the
others are read at the same position, or at their last token where they have ended. A reward on the last token
alone (gamma 1) gives the published numbers; a dense reward keeps its places.

Statistics are float64: answers with equal rewards must differ by exactly nothing before the spread divides.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rto.advantages.returns import held, to_go
from rto.config import Share


def rloo(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    *,
    gamma: Share = 1.0,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """A_t = G_t - mean over the other answers of their G at min(t, their last token). Returns are G.

    After Ahmadian et al. 2024 (arXiv 2402.14740; from memory of the paper, not checked against its text). The
    baseline does not depend on the answer's own tokens, so the gradient stays unbiased. An answer without others
    has advantage 0: without a baseline its whole return would count, on another scale than everyone else's.
    """
    returns = to_go(rewards.double(), mask, gamma)
    everywhere = held(returns, mask, mask.shape[1])
    number, size = _groups(mask, group)
    others = (_sums(everywhere, number)[number] - everywhere) / (size - 1).clamp(min=1)
    advantages = torch.where(mask & (size > 1), returns - others, 0.0)
    return advantages.to(rewards.dtype), returns.to(rewards.dtype)


def grpo(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    *,
    gamma: Share = 1.0,
    scale: bool = True,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """A_t = (G_t - mean_t) / (spread + 1e-9), with the mean over all answers of the group. Returns are G.

    mean_t and the unbiased variance var_t are over the group's G at min(t, last token); spread is the root of
    var_t's mean over the positions of the group's longest answer. A reward on the last token alone gives var_t =
    the variance of the scores, which is GRPO (Shao et al. 2024, arXiv 2402.03300; from memory of the paper, not
    checked against its text). The spread of the totals alone would not do for dense rewards: answers whose totals
    agree and whose tokens differ would get advantages without bound.

    ``scale=False`` is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783; likewise from memory); whitened over the batch
    it is OpenRLHF's ``reinforce_baseline``.
    """
    returns = to_go(rewards.double(), mask, gamma)
    everywhere = held(returns, mask, mask.shape[1])
    number, size = _groups(mask, group)
    mean = _sums(everywhere, number)[number] / size.clamp(min=1)
    advantages = torch.where(mask.any(-1, keepdim=True), everywhere - mean, 0.0)
    if scale:
        variance = _sums(advantages**2, number)[number] / (size - 1).clamp(min=1)
        live = _sums(mask.double(), number)[number] > 0  # positions that an answer of the group reaches
        spread = ((variance * live).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)).sqrt()
        advantages = advantages / (spread + 1e-9)
    return torch.where(mask, advantages, 0.0).to(rewards.dtype), returns.to(rewards.dtype)


def _groups(mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]) -> tuple[Int[Tensor, " B"], Float[Tensor, "B 1"]]:
    """Each row's group, counted from 0, and how many answers are in it; a row without tokens is no answer."""
    number = group.unique(return_inverse=True)[1]
    return number, _sums(mask.any(-1, keepdim=True).double(), number)[number]


def _sums(x: Float[Tensor, "B N"], number: Int[Tensor, " B"]) -> Float[Tensor, "G N"]:
    """Sum over the rows of each group."""
    count = int(number.max()) + 1 if len(number) else 0
    return x.new_zeros(count, x.shape[1]).index_add(0, number, x)
