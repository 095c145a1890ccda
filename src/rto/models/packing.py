"""The sequences of a micro-batch behind one another in one row, without padding. Exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rto.batch import Completions, Prompts

if TYPE_CHECKING:
    from rto.models.role import Role


@dataclass(frozen=True)
class Packed:
    """One row of the N real tokens of B sequences. ``positions`` start again at 0 with each sequence: by that a model
    knows where one ends, and keeps its tokens to themselves.

    ``ends`` are the C places between sequences, the first 0 and the last N; ``longest`` is the most tokens of one.
    ``places`` says for each row of :meth:`~rto.batch.Completions.sequence` where its tokens stand; on padding a
    neighbour's place.
    """

    ids: Int[Tensor, "1 N"]
    positions: Int[Tensor, "1 N"]
    ends: Int[Tensor, " C"]
    longest: int
    places: Int[Tensor, "B S"]


def pack(completions: Completions) -> Packed:
    """A row without a token is left out."""
    ids, mask = completions.sequence()
    count, lengths = (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1)
    ends = lengths.cumsum(0)
    places = ((ends - lengths)[:, None] + count).clamp(max=mask.sum() - 1)
    ends = torch.nn.functional.pad(ends[lengths > 0], (1, 0)).int()
    return Packed(ids[mask][None], count[mask][None], ends, int(lengths.max()), places)


@torch.no_grad()
def keeps_apart(role: Role) -> bool:
    """Whether this model reads packed sequences as it reads padded rows: tried on three of them."""
    backbone = role.backbone
    words = backbone.network.config.get_text_config().vocab_size
    ids = (words // 2 + torch.arange(18, device=backbone.device)).reshape(3, 6) % words  # ordinary ones
    real = torch.ones(3, 6, dtype=torch.bool, device=backbone.device)
    real[1, :2] = real[2, 4:] = False
    rows = Completions(Prompts(ids[:, :3], real[:, :3]), ids[:, 3:], real[:, 3:], real[:, 5])
    found = tried(lambda: role.packed(rows))
    return found is not None and same_states(found, role.padded(rows), real, backbone.compute)


def tried(read: Callable[[], Float[Tensor, "B S H"]]) -> Float[Tensor, "B S H"] | None:
    """What a trial reads; None where it is given masks or positions of a shape that the family does not take."""
    try:
        return read()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, IndexError, TypeError):
        return None


def same_states(
    found: Float[Tensor, "B S H"], plain: Float[Tensor, "B S H"], real: Bool[Tensor, "B S"], compute: torch.dtype
) -> bool:
    """Whether two ways to read the same ``real`` tokens differ by no more than the rounding of ``compute``.

    In bfloat16 that is told by means over dimensions, of which one may be a hundred times as large as the others, and
    one token of a row may differ altogether: rounding decides whether it draws the attention of the others. Of
    SmolLM2-135M all other tokens differed by at most 0.10, where answers saw each other two by at least 0.20.
    """
    gap, size = (found - plain).float().abs(), plain.float().abs()
    if compute == torch.float32:
        return bool(gap[real].max() < 1e-4 * size[real].max())
    differs = ~(gap.mean(-1) < 0.15 * size.mean(-1)) & real
    return bool((differs.sum(-1) <= 1).all())
