"""What an iteration's rewards look like, term by term."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rto import rewards
from rto.batch import Signals
from rto.config import Spec
from rto.numerics import masked_sum


def reward_metrics(
    terms: list[Spec], signals: Signals, total: Float[Tensor, "N T"], parts: dict[str, Float[Tensor, "N T"]]
) -> dict[str, float]:
    """Per answer: the reward and each term's sum, share of the absolute reward, clip rate, correlation with length;
    the KL to the reference (k1, nats) and the length."""
    mask, lengths = signals.mask, signals.mask.sum(-1).float()
    gap = torch.where(mask, signals.logprobs - signals.reference, 0.0)
    metrics = {
        "reward/total": masked_sum(total, mask).mean().item(),
        "kl": gap.sum(-1).mean().item(),
        "kl_per_token": (gap.sum() / mask.sum()).item(),
        "length": lengths.mean().item(),
        "finished": signals.finished.float().mean().item(),
    }
    mass = sum(part.abs().sum().item() for part in parts.values())
    named = rewards.named(terms)
    for name, part in parts.items():
        sums = masked_sum(part, mask)
        metrics[f"reward/{name}"] = sums.mean().item()
        metrics[f"reward_share/{name}"] = part.abs().sum().item() / mass if mass else 0.0
        metrics[f"reward_length_correlation/{name}"] = _correlation(sums, lengths)
        if named.get(name, {}).get("clip") is not None:
            # By token, before a term moves its rewards to the end of a sentence or of the answer.
            term = named[name]
            if term["type"] in ("implicit", "shaped"):
                term = {"type": "implicit", "scale": term["scale"], "clip": term["clip"]}
            held, free = rewards.evaluate(term, signals), rewards.evaluate(term, signals, clip=None)
            metrics[f"reward_clip_share/{name}"] = (free != held).sum().item() / max(1, int((free != 0).sum()))
    return metrics


def _correlation(a: Float[Tensor, " N"], b: Float[Tensor, " N"]) -> float:
    """Pearson; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale > 1e-4 else 0.0  # less is rounding: the KL of an untrained policy
