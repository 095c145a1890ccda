"""Rows of token ids to padded tensors. Prompts are padded on the left, responses on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rto.batch import Completions, Pairs, Prompts
from rto.data.chat import PairRow


def collate_prompts(prompts: Sequence[Sequence[int]], pad: int) -> Prompts:
    """``ids`` and ``mask`` are [B, P], P the longest prompt."""
    return Prompts(*_padded(prompts, pad, left=True))


def collate_completions(
    prompts: list[list[int]], answers: list[list[int]], finished: list[bool], pad: int, width: int | None = None
) -> Completions:
    """Prompt [B, P] and response [B, T] side by side; T is the longest answer, or ``width`` where given."""
    if not len(prompts) == len(answers) == len(finished):
        raise ValueError(f"{len(prompts)} prompts, {len(answers)} answers and {len(finished)} finished marks")
    ids, mask = _padded(answers, pad, width)
    return Completions(collate_prompts(prompts, pad), ids, mask, torch.tensor(finished, dtype=torch.bool))


def collate_pairs(rows: Sequence[PairRow], pad: int) -> Pairs:
    """Chosen and rejected get the same T, so that their tensors can be concatenated."""
    width = max((len(answer) for row in rows for answer in (row.chosen, row.rejected)), default=0)
    prompts = [row.prompt for row in rows]
    chosen = [row.chosen for row in rows], [row.chosen_finished for row in rows]
    rejected = [row.rejected for row in rows], [row.rejected_finished for row in rows]
    return Pairs(
        collate_completions(prompts, *chosen, pad, width),
        collate_completions(prompts, *rejected, pad, width),
        torch.tensor([row.margin for row in rows], dtype=torch.float32),
    )


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row <= ``budget`` tokens; a longer row goes alone.

    The longest rows come first: what does not fit into memory fails at once, not after an hour.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def trim(completions: Completions) -> Completions:
    """Without the columns of prompt and response that are padding in every row."""
    prompt = completions.prompt
    start = prompt.ids.shape[-1] - _longest(prompt.mask)
    stop = _longest(completions.mask)
    return Completions(
        Prompts(prompt.ids[:, start:], prompt.mask[:, start:]),
        completions.ids[:, :stop],
        completions.mask[:, :stop],
        completions.finished,
    )


def _longest(mask: torch.Tensor) -> int:
    return int(mask.sum(-1).max()) if mask.numel() else 0


def _padded(
    rows: Sequence[Sequence[int]], pad: int, width: int | None = None, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    if width is None:
        width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        here = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, here] = torch.tensor(list(row), dtype=torch.long)
        mask[index, here] = True
    return ids, mask
