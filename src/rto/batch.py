"""The containers that travel between the stages: frozen, tensors only, one convention.

Shapes: B rows, P prompt tokens, T response tokens, S = P + T.
Response coordinates: index t is the t-th response token, end-of-sequence included. Every token-wise
quantity lives there; prompts never leak in. Prompts are padded on the left and responses on the right, so
that ``cat(prompt, response)`` is one sequence with the response in its last T columns.

A worked example with ``P = 3``, ``T = 4``, padding 0 and end-of-sequence 2::

    prompt      "a b c" and "a b"       [[5, 6, 7], [0, 5, 6]]       prompt_mask [[1, 1, 1], [0, 1, 1]]
    response    "x y z ." and "x ."     [[8, 9, 8, 2], [8, 2, 0, 0]] mask        [[1, 1, 1, 1], [1, 1, 0, 0]]
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Batch = TypeVar("Batch", bound="_Rows")


@dataclass(frozen=True)
class _Rows:
    """Tensors that share their first dimension B."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def rows(self: Batch, index: Tensor | slice) -> Batch:
        """The rows ``index`` of every field (fields that are None stay None)."""
        return self._map(lambda part: part[index])

    def to(self: Batch, device: torch.device | str) -> Batch:
        return self._map(lambda part: part.to(device))

    def _map(self: Batch, change) -> Batch:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {}
        for name, part in parts.items():
            if isinstance(part, _Rows):
                changed[name] = part._map(change)
            elif part is not None:
                changed[name] = change(part)
        return replace(self, **changed)


@dataclass(frozen=True)
class Prompts(_Rows):
    """Prompts, padded on the left."""

    ids: Int[Tensor, "B P"]
    mask: Bool[Tensor, "B P"]


@dataclass(frozen=True)
class Completions(_Rows):
    """A prompt and one response a row. ``mask`` is true on response tokens, end-of-sequence included.

    ``finished`` tells whether the response ended by itself; a response cut at the limit has no
    end-of-sequence and is never given one.
    """

    prompt: Prompts
    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    finished: Bool[Tensor, " B"]

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Response tokens a row, end-of-sequence included."""
        return self.mask.sum(-1)

    def sequence(self) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
        """Ids and attention mask of prompt and response side by side."""
        return torch.cat([self.prompt.ids, self.ids], -1), torch.cat([self.prompt.mask, self.mask], -1)


@dataclass(frozen=True)
class Siblings(Completions):
    """2B completions, of which rows i and B + i have the same prompt: a model may read it once for both."""

    def rows(self, index: Tensor | slice) -> Completions:  # type: ignore[override]
        """Plain completions: a choice of rows need not hold pairs."""
        return Completions(self.prompt, self.ids, self.mask, self.finished).rows(index)


@dataclass(frozen=True)
class Pairs(_Rows):
    """Two answers to one prompt, the first preferred. ``margin`` is how much better it is (0: unknown)."""

    chosen: Completions
    rejected: Completions
    margin: Float[Tensor, " B"]


@dataclass(frozen=True)
class Rollouts(_Rows):
    """What the policy wrote, with the log-probs (nats) that it was sampled with."""

    completions: Completions
    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None = None  # a head on the state that predicts each token, 0 outside the mask


@dataclass(frozen=True)
class Signals(_Rows):
    """Everything that a reward term may read about a batch of rollouts, in response coordinates.

    A field is None when no term of the recipe needs it: what nobody reads is not computed.
    """

    mask: Bool[Tensor, "B T"]
    finished: Bool[Tensor, " B"]
    logprobs: Float[Tensor, "B T"]  # under the policy that wrote the answer, nats
    reference: Float[Tensor, "B T"]  # under the frozen SFT model
    moving: Float[Tensor, "B T"] | None = None  # under the moving reference of KL, where there is one
    guide: Float[Tensor, "B T"] | None = None
    scores: Float[Tensor, " B"] | None = None  # the scorer's sentence reward, normalised where the recipe asks for it
    segments: Float[Tensor, "B T"] | None = None  # normalised value of each segment on its last token, 0 elsewhere
    segment_ends: Bool[Tensor, "B T"] | None = None
    sentence_ends: Bool[Tensor, "B T"] | None = None  # tokens that end a sentence; each answer's last token is one
    attention: Float[Tensor, "B T"] | None = None  # share of each token in the reader's attention, sum 1 a row
    function: Float[Tensor, "B T"] | None = None  # what a Python function says; NaN on a whole row: missing
    http: Float[Tensor, "B T"] | None = None  # what a server says; NaN on a whole row: missing
