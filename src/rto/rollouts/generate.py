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
    target = uniform[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    # Rounding may point behind the last possible token: step back to it.
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    tokens = torch.minimum(tokens, last)
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

    device = prompts.ids.device
    rows = len(prompts)
    ids = torch.full((rows, limit), pad)
    logprobs = torch.zeros(rows, limit)
    lengths = torch.full((rows,), limit)
    noise = noise.to(device)
    alive = torch.arange(rows, device=device)  # the rows that are still in the batch
    open_ = torch.ones(rows, dtype=torch.bool, device=device)  # those of them that have not ended
    mask = prompts.mask
    step_ids, positions = prompts.ids, (mask.long().cumsum(-1) - 1).clamp(min=0)
    with role.active() as backbone:
        cache = DynamicCache(config=backbone.network.config)
        for t in range(limit):
            out = backbone.body(
                input_ids=step_ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = backbone.project(out.last_hidden_state[:, -1])
            tokens, scored = pick(logits, noise[alive, t], temperature, top_p)
            where = alive[open_].cpu()
            ids[where, t], logprobs[where, t] = tokens[open_].cpu(), scored[open_].cpu()
            ended = open_ & (tokens == end)
            lengths[alive[ended].cpu()] = t + 1
            open_ = open_ & ~ended
            left = int(open_.sum())
            if left == 0 or t + 1 == limit:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            positions = positions[:, -1:] + 1
            step_ids = tokens[:, None]
            if left <= 0.875 * len(alive):  # copying the cache costs about as much as an eighth of a step
                cache.batch_select_indices(open_.nonzero().squeeze(-1))
                alive, mask, positions, step_ids = alive[open_], mask[open_], positions[open_], step_ids[open_]
                open_ = open_[open_]
    return ids, logprobs, lengths
