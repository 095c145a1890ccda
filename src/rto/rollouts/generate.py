"""Sampling with transformers: exact log-probs, finished rows leave the batch, every row has its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rto.batch import Completions, Rollouts
from rto.data.collate import collate_prompts, micro_batches
from rto.models.kernels import attending_to_cache
from rto.models.prepacked import Prepacked
from rto.models.role import Backbone, Role, read_head
from rto.models.workshop import check_positions
from rto.rollouts.pick import pick
from rto.seeds import uniforms

if TYPE_CHECKING:
    from transformers import Cache

SeedName = tuple[str | int, ...]
LEAVE = 7 / 8  # of the rows still write: the others leave the batch. Each new number of rows costs a little


@torch.no_grad()
def generate(
    role: Role,
    prompts: Sequence[Sequence[int]],
    names: Sequence[SeedName],
    *,
    seed: int,
    limit: int,
    end: int,
    pad: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    budget: int = 16384,
    head: nn.Linear | None = None,
) -> Rollouts:
    """One answer a prompt, at most ``limit`` tokens: T = ``limit``, on the CPU.

    Row i depends on ``seed``, ``names[i]`` and its prompt, not on the rows beside it. An answer that reaches
    the limit has no end-of-sequence and ``finished`` is false. ``budget`` bounds rows x (prompt + answer).
    With ``head`` the result has ``values``: those of a critic that is this head on the role's own backbone.

    Raises:
        ValueError: the longest prompt and an answer of ``limit`` tokens are more than the model reads.
    """
    ids = torch.full((len(prompts), limit), pad)
    logprobs, values = torch.zeros(2, len(prompts), limit)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    groups = micro_batches([len(prompt) + limit for prompt in prompts], budget)
    prepacked = Prepacked(role, limit * len(groups))
    for rows in groups:
        noise = torch.stack([uniforms(limit, seed, *names[i]) for i in rows])
        where = torch.tensor(rows)
        ids[where], logprobs[where], values[where], lengths[where] = _decode(
            role, prepacked, [prompts[i] for i in rows], noise, limit, end, pad, temperature, top_p, head
        )
    mask = torch.arange(limit) < lengths[:, None]
    finished = (ids == end).logical_and(mask).any(-1)
    completions = Completions(collate_prompts(prompts, pad), ids, mask, finished)
    return Rollouts(completions, logprobs, None if head is None else values)


def _decode(
    role: Role,
    prepacked: Prepacked,
    asked: Sequence[Sequence[int]],
    noise: Float[Tensor, "B L"],
    limit: int,
    end: int,
    pad: int,
    temperature: float,
    top_p: float,
    head: nn.Linear | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, log-probs and values [B, limit], and lengths [B], on the CPU."""
    from rto.rollouts.kv_cache import keep_rows

    backbone = role.activate()
    rows, device = len(asked), backbone.device
    ids = torch.full((rows, limit), pad, device=device)
    logprobs, values = torch.zeros(2, rows, limit, device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    noise = noise.to(device)
    alive = torch.arange(rows, device=device)  # the rows that are still in the batch
    writing = torch.ones(rows, dtype=torch.bool, device=device)  # those of them that have not ended
    states, mask, cache = read_prompts(backbone, asked, limit, pad)
    steps = attending_to_cache(backbone.network)
    with torch.inference_mode(), prepacked.acting(), steps:  # operations cost less in it than without gradients only
        for t in range(limit):
            logits = backbone.project(states)
            if head is not None:
                values[alive, t] = torch.where(writing, read_head(head, states), 0.0)
            tokens, scored = pick(logits, noise[alive, t], temperature, top_p)
            ids[alive, t] = torch.where(writing, tokens, pad)
            logprobs[alive, t] = torch.where(writing, scored, 0.0)
            lengths[alive] += writing
            writing &= tokens != end
            left = int(writing.sum())
            if left == 0 or t == limit - 1:
                break
            if left <= LEAVE * len(alive):
                kept = _closed_up(writing, left)
                keep_rows(cache, kept)
                alive, mask, tokens, writing = alive[kept], mask[kept], tokens[kept], writing[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            states = backbone.states(tokens[:, None], mask, cache)[:, -1]
    return ids.cpu(), logprobs.cpu(), values.cpu(), lengths.cpu()


def read_prompts(
    backbone: Backbone, asked: Sequence[Sequence[int]], limit: int, pad: int
) -> tuple[Float[Tensor, "B H"], Bool[Tensor, "B P"], Cache]:
    """The last state of each prompt, their mask, and a cache with room for the answers. Equal prompts are read once.

    Raises:
        ValueError: the longest prompt and an answer of ``limit`` tokens are more than the model reads.
    """
    from rto.rollouts.kv_cache import roomy_cache

    check_positions(backbone, max(map(len, asked)) + limit)
    known: dict[tuple[int, ...], int] = {}
    which = [known.setdefault(tuple(prompt), len(known)) for prompt in asked]
    prompts = collate_prompts(list(known), pad).to(backbone.device)
    cache = roomy_cache(backbone.network.config, prompts.ids.shape[1] + limit - 1, backbone.compute)
    states, mask = backbone.states(prompts.ids, prompts.mask, cache)[:, -1], prompts.mask
    if len(known) < len(asked):
        rows = torch.tensor(which, device=backbone.device)
        cache.reorder_cache(rows)  # type: ignore[arg-type]
        states, mask = states[rows], mask[rows]
    return states, mask, cache


def _closed_up(writing: Bool[Tensor, " B"], left: int) -> Int[Tensor, " N"]:
    """The ``left`` rows that write, such that few of them change their place: the last ones fill the gaps."""
    kept = torch.arange(left, device=writing.device)
    kept[~writing[:left]] = left + writing[left:].nonzero().squeeze(-1)
    return kept
