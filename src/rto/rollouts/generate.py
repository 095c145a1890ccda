"""Sampling with transformers: exact log-probs, finished rows leave the batch, every row has its own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rto.batch import Completions, Prompts, Rollouts
from rto.data.collate import collate_prompts, micro_batches
from rto.models.role import Role
from rto.seeds import uniforms

SeedName = tuple[str | int, ...]


def pick(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"], temperature: float, top_p: float
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token a row by inverting the distribution function at ``uniform``, and its log-prob (nats).

    ``temperature`` 0 is greedy. The log-prob is that of the tempered distribution before ``top_p`` cuts it.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    logprobs = (logits / temperature).log_softmax(-1)
    probs = logprobs.exp()
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)  # the first always stays
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    cdf = probs.cumsum(-1)
    whole = cdf[:, -1:]
    # Rounding could reach the whole, behind the last possible token: stay below it.
    target = torch.minimum(uniform[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    tokens = torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)  # NaN has no place
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


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
) -> Rollouts:
    """One answer a prompt, at most ``limit`` tokens: T = ``limit``, on the CPU.

    Row i depends on ``seed``, ``names[i]`` and its prompt, not on the rows beside it. An answer that reaches
    the limit has no end-of-sequence and ``finished`` is false. ``budget`` bounds rows x (prompt + answer).
    """
    ids = torch.full((len(prompts), limit), pad)
    logprobs = torch.zeros(len(prompts), limit)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    for rows in micro_batches([len(prompt) + limit for prompt in prompts], budget):
        noise = torch.stack([uniforms(limit, seed, *names[i]) for i in rows])
        part = collate_prompts([prompts[i] for i in rows], pad).to(role.backbone.device)
        out, out_logprobs, out_lengths = _decode(role, part, noise, limit, end, pad, temperature, top_p)
        where = torch.tensor(rows)
        ids[where], logprobs[where], lengths[where] = out, out_logprobs, out_lengths
    mask = torch.arange(limit) < lengths[:, None]
    finished = (ids == end).logical_and(mask).any(-1)
    return Rollouts(Completions(collate_prompts(prompts, pad), ids, mask, finished), logprobs)


def _decode(
    role: Role,
    prompts: Prompts,
    noise: Float[Tensor, "B L"],
    limit: int,
    end: int,
    pad: int,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, limit], log-probs [B, limit] and lengths [B], on the CPU."""
    from transformers import DynamicCache

    rows, device = len(prompts), prompts.ids.device
    ids = torch.full((rows, limit), pad, device=device)
    logprobs = torch.zeros(rows, limit, device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    noise = noise.to(device)
    alive = torch.arange(rows, device=device)  # the rows that are still in the batch
    writing = torch.ones(rows, dtype=torch.bool, device=device)  # those of them that have not ended
    step, mask = prompts.ids, prompts.mask
    backbone = role.activate()
    cache = DynamicCache(config=backbone.network.config)
    for t in range(limit):
        logits = backbone.project(backbone.states(step, mask, cache)[:, -1])
        tokens, scored = pick(logits, noise[alive, t], temperature, top_p)
        ids[alive, t] = torch.where(writing, tokens, pad)
        logprobs[alive, t] = torch.where(writing, scored, 0.0)
        lengths[alive] += writing
        writing &= tokens != end
        left = int(writing.sum())
        if left == 0:
            break
        step, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        if left <= 0.875 * len(alive):  # copying the cache costs about as much as an eighth of a step
            cache.batch_select_indices(writing.nonzero().squeeze(-1))
            alive, mask, step = alive[writing], mask[writing], step[writing]
            writing = writing[writing]
    return ids.cpu(), logprobs.cpu(), lengths.cpu()
