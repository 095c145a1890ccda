"""How a model's attention shares an answer out among its tokens (ABC: Chan et al. 2024)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rto.batch import Completions
from rto.models.kernels import attending
from rto.models.role import Backbone, Role
from rto.rollouts.score import in_micro_batches

Reading = Literal["last", "mean"]


def attention_weights(role: Role, completions: Completions, reading: Reading, budget: int) -> Float[Tensor, "B T"]:
    """Each token's share of the last layer's attention, mean over heads: non-negative, sum 1 a row, 0 on padding.

    ``last`` (ABC): what the last response token pays to each. ``mean`` (ABC-D): what the steps that wrote the later
    tokens paid to it, mean over those that can see it; the step that writes a token is the position before it. So the
    last token has no share, nothing came after it. (The published code puts these shares a token later.) Attention
    to the prompt is dropped. Where nothing is paid to the response, the last token has the whole: no dense credit.

    The model runs with eager attention, as no other kind tells its weights: rows x heads x S x S numbers, of one layer
    at a time. ``budget`` is in padded tokens as everywhere; here fewer rows go together, so that these weights take no
    more room than the hidden states of so many tokens. A row longer than that still goes, alone.

    Raises:
        ValueError: the model's family does not give its attention weights.
    """
    settings = role.backbone.network.config.get_text_config()
    longest = int((completions.prompt.mask.sum(-1) + completions.lengths).max())
    rows = budget * settings.hidden_size // (getattr(settings, "num_attention_heads", 1) * longest**2)
    spread = _last if reading == "last" else _mean

    def read(part: Completions) -> Tensor:
        with _recorded(role.backbone) as kept:
            role.padded(part)  # whose places these are
        if len(kept) != 1:
            family = type(role.backbone.network).__name__
            raise ValueError(f"{role.backbone.source}: {family} gives no attention weights: choose another model")
        return _normalised(spread(*_positions(part), kept[0]), part.mask)

    return in_micro_batches(completions, read, min(budget, max(1, rows) * longest), role.backbone.device)


def _positions(c: Completions) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Where response tokens stand in a row whose padding is on the right (clamped on padding), and the mask."""
    places = c.prompt.mask.sum(-1, keepdim=True) + torch.arange(c.ids.shape[1], device=c.ids.device)
    return places.clamp(max=int((c.prompt.mask.sum(-1) + c.lengths).max()) - 1), c.mask


def _last(
    places: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], weights: Float[Tensor, "B S S"]
) -> Float[Tensor, "B T"]:
    end = places.gather(1, (mask.sum(-1, keepdim=True) - 1).clamp(min=0))
    return weights.gather(1, end[..., None].expand(-1, -1, weights.shape[-1])).squeeze(1).gather(1, places)


def _mean(
    places: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], weights: Float[Tensor, "B S S"]
) -> Float[Tensor, "B T"]:
    paid = weights.gather(1, places[..., None].expand(-1, -1, weights.shape[-1]))
    paid = paid.gather(2, places[:, None].expand(-1, places.shape[1], -1))  # [B, step, token]
    steps = mask & mask.roll(-1, 1)  # positions that write a further token
    steps[:, -1] = False
    paid = torch.where(steps[..., None], paid, 0.0)
    return paid.sum(1) / (paid > 0).sum(1).clamp(min=1)  # causal masks and sliding windows leave exact zeros


def _normalised(shares: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    shares = torch.where(mask, shares, 0.0)
    total = shares.sum(-1, keepdim=True)
    last = torch.zeros_like(shares).scatter_(1, (mask.sum(-1, keepdim=True) - 1).clamp(min=0), 1.0)
    return torch.where(mask, torch.where(total == 0, last, shares / total), 0.0)


@contextlib.contextmanager
def _recorded(backbone: Backbone) -> Iterator[list[Float[Tensor, "B S S"]]]:
    """The last layer's attention, mean over heads, of each pass inside, which runs eagerly.

    Asking transformers for ``output_attentions`` would keep every layer's; a hook on the last one keeps its alone.
    """
    network, body = backbone.network, backbone.body
    recorder = (getattr(body, "_can_record_outputs", None) or {}).get("attentions")
    kind = getattr(recorder, "target_class", recorder)  # what transformers itself would put hooks on
    layers = [m for m in body.modules() if isinstance(kind, type) and isinstance(m, kind)]
    kept: list[Tensor] = []

    def keep(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            kept.append(output[1].mean(1, dtype=torch.float32))

    hooks = [layer.register_forward_hook(keep) for layer in layers[-1:]]
    try:
        with attending(network, "eager"):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()
