"""One fixed piece of work: both sides read it from the same file, so that ids, lengths and settings cannot differ."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, list[int]]  # ids of "prompt", and of "chosen" and "rejected" or of "answer" where there are any


@dataclass(frozen=True)
class Case:
    """What is done in one turn, and with what."""

    name: str
    workload: str  # the module of this package that does it
    model: str  # folder of a causal LM
    classifier: str  # folder of a one-label classifier on the same body
    folder: str  # where a side may write
    pad: int
    batches: list[list[Row]]  # turn i takes batch i, from the first again where there are no more
    turns: int  # warm-up included
    micro_tokens: int  # padded tokens of one training pass of rto
    micro_rows: int  # rows of one training pass of the peer
    lr: float
    limit: int = 0  # tokens of an answer that is sampled
    lengths: tuple[int, ...] = ()  # the answers' lengths where they are to differ
    lora: int | None = None  # rank; none: full fine-tuning
    seed: int = 0
    setup: str = "default"  # of the peer: see `machine.SETUPS`
    device: str = "cpu"  # or "cuda"
    dtype: str = "float32"  # of passes; what is trained is float32
    attention: str = "sdpa"
    keys: dict[str, Any] = field(default_factory=dict)  # of [model], for rto alone

    def batch(self, turn: int) -> list[Row]:
        return self.batches[turn % len(self.batches)]

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path | str) -> Case:
        found = json.loads(Path(file).read_text())
        return cls(**found | {"lengths": tuple(found["lengths"])})


def tokens(row: Row) -> int:
    """Tokens that the text of a row has, a prompt of two answers counted twice."""
    answers = [row[name] for name in ("chosen", "rejected", "answer") if name in row]
    return max(1, len(answers)) * len(row["prompt"]) + sum(map(len, answers))
