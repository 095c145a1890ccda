"""Supervised fine-tuning."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def sft(logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-log pi(y_t) a response token; reduced by the token mean of the whole batch."""
    return -logprobs
