"""One token a row from its logits, by inverting the distribution function at a given number."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 256  # words that are added up before one of them is looked for


def pick(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"], temperature: float, top_p: float
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token a row by inverting the distribution function at ``uniform``, and its log-prob (nats).

    ``temperature`` 0 is greedy. The log-prob is that of the tempered distribution before ``top_p`` cuts it.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, _at(logits.log_softmax(-1), tokens)
    if temperature != 1:
        logits = logits / temperature
    probs = logits.softmax(-1)
    tokens = _invert(_nucleus(probs, top_p) if top_p < 1 else probs, uniform)
    return tokens, _at(probs, tokens).log()


def _invert(weights: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The first word at which the running sum of ``weights`` exceeds ``uniform`` times their sum.

    First the block of words in which that happens, then the word: a running sum of the whole vocabulary would cost
    as much as its softmax.
    """
    words = weights.shape[-1]
    blocks = words // BLOCK
    even, rest = weights.split([blocks * BLOCK, words - blocks * BLOCK], -1)
    ends = torch.cat([even.unflatten(-1, (blocks, BLOCK)).sum(-1), rest.sum(-1, keepdim=True)], -1).cumsum(-1)
    target = uniform * ends[:, -1]
    block = _first_above(ends, target)
    start = torch.where(block > 0, _at(ends, (block - 1).clamp(min=0)), 0.0)
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(-1, columns.clamp(max=words - 1)).masked_fill(columns >= words, 0.0)
    return (block * BLOCK + _first_above(inside.cumsum(-1), target - start)).clamp(max=words - 1)


def _first_above(cdf: Float[Tensor, "B N"], target: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Where ``cdf`` exceeds ``target`` first."""
    whole = cdf[:, -1]
    # Rounding could reach the whole, behind the last possible place: stay below it.
    target = torch.minimum(target, torch.nextafter(whole, torch.zeros_like(whole)))
    places = torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)
    return places.clamp(max=cdf.shape[-1] - 1)  # NaN has no place


def _nucleus(probs: Float[Tensor, "B V"], top_p: float) -> Float[Tensor, "B V"]:
    """The likeliest words that together reach ``top_p``; 0 for all others."""
    ordered, order = probs.sort(-1, descending=True)
    ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)  # the first always stays
    return torch.zeros_like(probs).scatter(-1, order, ordered)


def _at(table: Float[Tensor, "B N"], where: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    return table.gather(-1, where[:, None]).squeeze(-1)
