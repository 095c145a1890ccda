"""Floating-point operations that a piece of work cannot do without: what the floor in the table is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama-type model; a multiplication and its addition are two operations."""

    body: int  # weights of all linear layers but the output layer
    head: int  # weights of the output layer
    attention: int  # layers x width of all heads
    edges: int  # inputs and outputs of all linear layers but the output layer: a LoRA adapter has rank times as many

    @classmethod
    def read(cls, folder: str) -> Model:
        """Of the model in a folder, by its config.json."""
        c = json.loads((Path(folder) / "config.json").read_text())
        hidden, heads = c["hidden_size"], c["num_attention_heads"]
        width = c.get("head_dim") or hidden // heads
        keys = width * c.get("num_key_value_heads", heads)
        query, inner, layers = heads * width, c["intermediate_size"], c["num_hidden_layers"]
        layer = 2 * hidden * query + 2 * hidden * keys + 3 * hidden * inner
        edges = 2 * (hidden + query) + 2 * (hidden + keys) + 3 * (hidden + inner)
        return cls(layers * layer, c["vocab_size"] * hidden, layers * query, layers * edges)

    def forward(self, tokens: int, predicted: int, after: int = 0) -> float:
        """Operations of one forward pass over ``tokens`` that come ``after`` others, with logits at ``predicted`` of
        them. A backward pass costs twice as many, or once where the weights are frozen."""
        seen = tokens * after + tokens * (tokens + 1) / 2  # tokens each attends to, summed
        return 2 * self.body * tokens + 2 * self.head * predicted + 4 * self.attention * seen

    def adapting(self, tokens: int, rank: int | None) -> float:
        """What an adapter that is trained adds for ``tokens``: forward, and backward to its input and its weights."""
        return 3 * 2 * (rank or 0) * self.edges * tokens
