"""Two answers to one prompt in one row: the prompt is read once, and neither answer sees the other. Exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rto.batch import Completions, Prompts, Siblings
from rto.models.packing import same_states, tried

if TYPE_CHECKING:
    from rto.models.role import Role


@dataclass(frozen=True)
class Forked:
    """B rows of N tokens: a prompt, the one answer, the other answer, padding.

    ``positions`` count on from the prompt in both answers. ``attends`` is true where a token (row) sees another
    (column). ``places`` says for each of the 2B rows of the siblings, prompt and response side by side as
    :meth:`~rto.batch.Completions.sequence` has them, where its tokens stand in a forked row; 0 on padding.
    """

    ids: Int[Tensor, "B N"]
    positions: Int[Tensor, "B N"]
    attends: Bool[Tensor, "B 1 N N"]
    places: Int[Tensor, "C S"]


def fork(siblings: Siblings) -> Forked:
    """Rows i and B + i answer the same prompt."""
    count = len(siblings) // 2
    prompt, mask = siblings.prompt.ids[:count], siblings.prompt.mask[:count]
    asked, lengths = mask.sum(-1), siblings.lengths
    one, other = lengths[:count], lengths[count:]
    whole = int((asked + one + other).max())

    columns = torch.arange(whole, device=prompt.device).expand(count, whole)
    # 0: prompt, 1 and 2: the answers, 3: padding
    part = sum((columns >= edge[:, None]).long() for edge in (asked, asked + one, asked + one + other))
    part = torch.as_tensor(part)
    skipped = torch.where(part == 2, one[:, None], 0)
    positions = torch.where(part == 3, 0, columns - skipped)
    attends = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    attends = (attends & (columns[:, None, :] <= columns[:, :, None])).unsqueeze(1)

    width = prompt.shape[1]
    shift = (width - asked).repeat(2)[:, None]  # of a left-padded prompt
    before = torch.arange(width, device=prompt.device) - shift
    starts = torch.cat([asked, asked + one])[:, None]
    behind = starts + torch.arange(siblings.ids.shape[1], device=prompt.device)
    _, real = siblings.sequence()
    places = torch.where(real, torch.cat([before, behind], -1), 0)

    ids = prompt.new_zeros(count, whole)
    sequence, _ = siblings.sequence()
    for half in (slice(0, count), slice(count, None)):  # the prompt is written twice, the same
        row, column = real[half].nonzero(as_tuple=True)
        ids[row, places[half][row, column]] = sequence[half][row, column]
    return Forked(ids, positions, attends, places)


@torch.no_grad()
def reads_forked(role: Role) -> bool:
    """Whether this model reads forked rows as it reads padded rows: tried on two pairs of answers."""
    backbone = role.backbone
    words = backbone.network.config.get_text_config().vocab_size
    ids = (words // 2 + torch.arange(24, device=backbone.device)).reshape(4, 6) % words  # ordinary ones
    ids[2:, :3] = ids[:2, :3]  # the same prompts
    mask = torch.ones(4, 3, dtype=torch.bool, device=backbone.device)
    asked = mask.clone()
    asked[[1, 3], 0] = False
    mask[0, 2] = False
    siblings = Siblings(Prompts(ids[:, :3], asked), ids[:, 3:], mask, mask[:, 0])
    _, real = siblings.sequence()
    plain = role.padded(Completions(siblings.prompt, siblings.ids, siblings.mask, siblings.finished))
    found = tried(lambda: role.fork(siblings))
    return found is not None and same_states(found, plain, real, backbone.compute)
