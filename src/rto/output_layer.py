"""Log-probs of given tokens from the output layer's weights, a block of the vocabulary at a time.

No [N, V] logits ever exist: memory does not grow with the vocabulary, blocks stay in the processor's caches, and each
weight is read, and its gradient written, once a pass.

PyTorch 2.13 has ``F.linear_cross_entropy``, in blocks of rows: no entropy, no temperature, logits computed again for
the gradient of per-token losses even where weights are frozen, and the weights' gradient as a second tensor. For 512
states of 576 float32 and 49,152 words on one CPU thread it takes 5 to 10 times our CPU time with its own blocks, 1.1 to
2 times with good ones (128 rows), which need 1.6 (trained weights) to 6 times (frozen weights) our memory.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rto.late import Late, own_gradient
from rto.products import add_product, product

# Logits that exist at once: on a CPU as many as its caches hold, on a GPU enough to keep it busy.
LOGITS = {"cpu": 2**20, "cuda": 2**26}
FEWEST = 1024  # words of a block: narrower matrix products are slow


def selected_logprobs(
    states: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    labels: Int[Tensor, " N"],
    temperature: float = 1.0,
    entropy: bool = True,
    block: int | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-softmax of ``states @ weight.T / temperature`` at ``labels``, and its entropy (nats, detached; zero where it
    is not asked for). Matrix products are in the precision of ``states``, all else in float32 or better.

    ``block`` words at a time; None: a good number for the device. The gradient of a log-prob p_y for its state,
    (w_y - sum_v p_v w_v) / temperature, is summed up in the forward pass, so that logits are computed once. Weights
    that are trained need every p_v for their own gradient: there they are computed again.

    The gradient of a ``weight`` that is a Parameter is added to its ``grad`` where it stands, inside of
    :func:`rto.late.late_gradients` at its end. That is what ``backward`` does, without a second tensor of that size;
    ``torch.autograd.grad`` does not see it.
    """
    return _Selected.apply(states, weight, labels, temperature, entropy, block or _width(states))


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, temperature: float, entropy: bool, block: int
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(states.dtype, torch.float32)
        x = states if temperature == 1.0 else states / temperature
        ahead = ctx.needs_input_grad[0]
        rows = x.new_zeros(len(x), dtype=precise)
        # Sums of exp(logit - top), of (logit - top) times that, and of that times the word's weights
        top, mass, spread = torch.full_like(rows, torch.finfo(precise).min), rows, rows
        mean = x.new_zeros(x.shape, dtype=precise) if ahead else None
        picked = rows
        for start, words in _blocks(weight, block):
            words = words.to(x.dtype)
            logits = product(x, words).to(precise)
            at = (labels - start).clamp(0, len(words) - 1)
            here = (labels >= start) & (labels < start + len(words))
            picked = torch.where(here, logits.gather(1, at[:, None]).squeeze(1), picked)
            higher = torch.maximum(top, logits.amax(-1))
            shrink = (top - higher).exp()
            shifted = logits.sub_(higher[:, None])
            if entropy:
                shifted.clamp_(min=-1e4)  # 0 times -inf is no number
                e = shifted.exp()
                spread = shrink * (spread - (higher - top) * mass) + torch.linalg.vecdot(e, shifted)
            else:
                e = shifted.exp_()
            mass = shrink * mass + e.sum(-1)
            if mean is not None:
                mean.mul_(shrink[:, None]).add_(product(e.to(x.dtype), words.T))
            top = higher
        total = top + mass.log()
        direction = None
        if mean is not None:
            direction = (weight[labels].to(precise) - mean / mass[:, None]) / temperature
        trained = (x, weight, labels, total) if ctx.needs_input_grad[1] else (None, None, None, None)
        ctx.save_for_backward(direction, *trained)
        ctx.own = weight if isinstance(weight, nn.Parameter) else None  # what is saved comes back as another tensor
        ctx.late, ctx.block, ctx.kind = Late.now, block, states.dtype
        disorder = mass.log() - spread / mass if entropy else torch.zeros_like(total)
        ctx.mark_non_differentiable(disorder)
        return picked - total, disorder

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        direction, x, weight, labels, total = ctx.saved_tensors
        states = None if direction is None else (gradient[:, None] * direction).to(ctx.kind)
        weights = None
        if ctx.own is None and weight is not None:
            weights = torch.empty_like(weight)
            _sum_products(weights, True, weight, ctx.block, x, labels, total, gradient)
        elif weight is not None and ctx.late is not None:
            ctx.late.add(ctx.own, _add_products, x, labels, total, gradient)
        elif weight is not None:
            _add_products(ctx.own, x, labels, total, gradient, ctx.block)
        return states, weights, None, None, None, None


def _add_products(
    table: nn.Parameter, x: Tensor, labels: Tensor, total: Tensor, gradient: Tensor, block: int | None = None
) -> None:
    whole, fresh = own_gradient(table)
    _sum_products(whole, fresh, table.detach(), block or _width(x), x, labels, total, gradient)
    table.grad = whole


def _sum_products(
    whole: Tensor, fresh: bool, weight: Tensor, block: int, x: Tensor, labels: Tensor, total: Tensor, gradient: Tensor
) -> None:
    """Each position's outer gradient times (1 at its label, less p_v) times its state."""
    for start, words in _blocks(weight, block):
        stop, words = start + len(words), words.to(x.dtype)
        share = product(x, words).to(total.dtype).sub_(total[:, None]).exp_().mul_(-gradient[:, None])
        row = ((labels >= start) & (labels < stop)).nonzero().squeeze(-1)
        share[row, labels[row] - start] += gradient[row]
        add_product(whole[start:stop], share.to(x.dtype).T, x.T, fresh)


def _width(states: Tensor) -> int:
    """Words of a block: a good number for the device."""
    return max(FEWEST, LOGITS.get(states.device.type, LOGITS["cuda"]) // max(1, len(states)))


def _blocks(weight: Tensor, block: int) -> list[tuple[int, Tensor]]:
    return [(start, weight[start : start + block]) for start in range(0, len(weight), block)]
