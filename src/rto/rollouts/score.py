"""What the roles say of finished answers: log-probs, scores and values, each only where somebody reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Completions
from rto.data.collate import micro_batches, trim
from rto.models.role import Role


@torch.no_grad()
def in_micro_batches(
    completions: Completions, read: Callable[[Completions], Tensor], budget: int, device: torch.device
) -> Tensor:
    """``read`` over all rows, cut by length so that no pass holds more than ``budget`` padded tokens.

    ``read`` returns [b, t, ...] or [b]; the result is [B, T, ...] (zero on padding) or [B], float32 on the CPU.
    """
    lengths = (completions.prompt.mask.sum(-1) + completions.lengths).tolist()
    result: Tensor | None = None
    for rows in micro_batches(lengths, budget):
        where = torch.tensor(rows)
        part = read(trim(completions.rows(where)).to(device)).float().cpu()
        if result is None:
            result = torch.zeros(*completions.ids.shape[: min(part.dim(), 2)], *part.shape[2:])
        if part.dim() == 1:
            result[where] = part
        else:
            result[where, : part.shape[1]] = part
    assert result is not None, "no rows to score"
    return result


def token_logprobs(role: Role, completions: Completions, budget: int, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """Log-prob of each response token under ``role``."""
    return in_micro_batches(
        completions, lambda c: role.logprobs(c, temperature, entropy=False)[0], budget, role.backbone.device
    )


def logprobs_and_entropy(
    role: Role, completions: Completions, budget: int
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Log-prob of each response token, and entropy of the distribution that predicts it (nats)."""
    both = in_micro_batches(completions, lambda c: torch.stack(role.logprobs(c), -1), budget, role.backbone.device)
    return both[..., 0], both[..., 1]


def token_values(role: Role, completions: Completions, budget: int) -> Float[Tensor, "B T"]:
    """The scorer at each response token."""
    return in_micro_batches(completions, role.token_scores, budget, role.backbone.device)


def sentence_scores(role: Role, completions: Completions, budget: int) -> Float[Tensor, " B"]:
    """The scorer at each answer's last token."""
    return in_micro_batches(completions, role.scores, budget, role.backbone.device)


def state_values(role: Role, completions: Completions, budget: int) -> Float[Tensor, "B T"]:
    """The critic before each response token."""
    return in_micro_batches(completions, role.values, budget, role.backbone.device)
