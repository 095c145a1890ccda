"""The arithmetic that everything shares: masked statistics, the one reduction, and token log-probs.

Only this file turns hidden states into log-probs, and only :func:`predicting` shifts states against labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rto.output_layer import selected_logprobs

Reduction = Literal["token", "sequence"]


def masked_sum(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Sum over the response of each row. Cells outside the mask may hold anything, NaN included."""
    return torch.where(mask, x, 0.0).sum(-1)


def masked_mean(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Mean over all unmasked cells; 0 where there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], shift_mean: bool = True) -> Float[Tensor, "B T"]:
    """(x - mean) / sqrt(max(var, 1e-8)) over all unmasked cells, population variance; zero outside the mask.

    The convention of RTO's code, over the whole rollout buffer. ``shift_mean=False`` only rescales.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    centred = x - mean if shift_mean else x
    return torch.where(mask, centred * torch.rsqrt(variance.clamp(min=1e-8)), 0.0)


def reduce(
    loss: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], reduction: Reduction, total: float
) -> Float[Tensor, ""]:
    """This micro-batch's share of the loss of a whole batch.

    ``token``: sum over tokens divided by ``total`` = unmasked tokens of the whole batch. ``sequence``: sum of
    each row's token mean divided by ``total`` = rows of the whole batch. Because ``total`` is global, the
    shares of all micro-batches and processes add up to the same loss and gradient however they are cut.
    """
    if reduction == "token":
        return torch.where(mask, loss, 0.0).sum() / total
    return (masked_sum(loss, mask) / mask.sum(-1).clamp(min=1)).sum() / total


def predicting(hidden: Float[Tensor, "B S H"], responses: int) -> Float[Tensor, "B T H"]:
    """The states that predict the last ``responses`` tokens: each one position before its token."""
    return hidden[:, -responses - 1 : -1]


def token_logprobs(
    hidden: Float[Tensor, "B T H"],
    labels: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    project: Callable[[Float[Tensor, "N H"]], Float[Tensor, "N V"]] | Float[Tensor, "V H"],
    temperature: float = 1.0,
    chunk: int = 128,
    entropy: bool = True,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Log-prob of each label and entropy of its distribution, in nats and float32; zero outside the mask.

    ``project`` maps states to logits: the weights of an output layer that is only these
    (:mod:`rto.output_layer`), or a function. A function runs on ``chunk`` unmasked positions at a time and, in
    training, again in the backward pass, so that at most [chunk, V] logits exist at once. The entropy is detached;
    ``entropy`` False: nobody reads it, and it may be zero.
    """
    where = mask.nonzero(as_tuple=True)
    states, targets = hidden[where], labels[where]
    if isinstance(project, Tensor):
        found = selected_logprobs(states, project, targets, temperature, entropy)
        blank = found[0].new_zeros(mask.shape)
        return blank.index_put(where, found[0]), blank.index_put(where, found[1])
    to_logits = project

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = to_logits(states)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        if temperature != 1.0:
            logits = logits / temperature
        logprobs = logits - logits.logsumexp(-1, keepdim=True)
        with torch.no_grad():
            disorder = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), disorder

    again = torch.is_grad_enabled()  # no gradient, nothing to recompute
    parts = [
        checkpoint(score, s, t, use_reentrant=False) if again else score(s, t)
        for s, t in zip(states.split(chunk), targets.split(chunk), strict=True)
    ]
    # An empty mask gives one empty part, so that a batch of padding still has a gradient (zero).
    logprobs, disorder = (torch.cat(values) for values in zip(*parts, strict=True))
    blank = logprobs.new_zeros(mask.shape)
    return blank.index_put(where, logprobs), blank.index_put(where, disorder)


def token_kl(
    hidden: Float[Tensor, "B T H"],
    hidden_reference: Float[Tensor, "B T K"],
    mask: Bool[Tensor, "B T"],
    project: Callable[[Float[Tensor, "N H"]], Float[Tensor, "N V"]],
    project_reference: Callable[[Float[Tensor, "N K"]], Float[Tensor, "N V"]],
    chunk: int = 128,
) -> Float[Tensor, "B T"]:
    """KL(reference || policy) of the next token over the whole vocabulary, nats and float32; zero outside the mask.

    Gradients reach the policy only. As in :func:`token_logprobs` at most ``chunk`` positions have logits at once, of
    both models, and in training they are computed again in the backward pass.
    """
    where = mask.nonzero(as_tuple=True)

    def compare(states: Tensor, frozen: Tensor) -> Tensor:
        with torch.no_grad():
            expected = _log_softmax(project_reference(frozen))
        # A word of probability 0 under the reference adds 0, also where its log is -inf.
        gap = torch.where(expected.isneginf(), 0.0, expected - _log_softmax(project(states)))
        return (expected.exp() * gap).sum(-1)

    again = torch.is_grad_enabled()
    parts = [
        checkpoint(compare, s, f, use_reentrant=False) if again else compare(s, f)
        for s, f in zip(hidden[where].split(chunk), hidden_reference[where].split(chunk), strict=True)
    ]
    kl = torch.cat(parts)
    return kl.new_zeros(mask.shape).index_put(where, kl)


def _log_softmax(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
