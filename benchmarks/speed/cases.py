"""The pieces of work that are compared, and the models that they are done on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.case import Case, Row

NAMES = (
    "dpo",
    "dpo-lora",
    "dpo-natural",
    "sft",
    "reward",
    "ppo",
    "ppo-adapters",
    "generate",
    "generate-varied",
)  # fmt: skip


# Of rto's passes: small enough for little memory, large enough for matrices that keep the machine busy. Sampling and
# scoring take four times as many in RL; `generate` alone takes all of its rows at once, as its peer does.
MICRO_TOKENS = {
    "cpu": {"dpo": 768, "dpo-lora": 576, "sft": 512, "reward": 512, "ppo": 768, "generate": 2**16},
    "cuda": {"dpo": 2**14, "sft": 2**14, "reward": 2**14, "ppo": 2**14, "generate": 2**19},
}


@dataclass(frozen=True)
class Sizes:
    """Rows and tokens."""

    pairs: int
    side: int  # tokens of a prompt, and of each answer
    rollouts: int
    turn: int  # tokens of a prompt, and of an answer, in RL and sampling
    varied: int  # answers whose lengths differ
    shortest: int
    longest: int
    rank: int
    lr: float  # a step is to move the losses by more than what they may differ


CPU = Sizes(pairs=8, side=64, rollouts=32, turn=48, varied=128, shortest=8, longest=128, rank=16, lr=1e-6)
GPU = Sizes(pairs=32, side=256, rollouts=128, turn=256, varied=256, shortest=32, longest=512, rank=16, lr=1e-6)
QUICK = Sizes(pairs=4, side=6, rollouts=16, turn=6, varied=8, shortest=3, longest=12, rank=2, lr=1e-3)


@dataclass(frozen=True)
class Base:
    """A causal LM and a classifier on the same weights, in folders, and how to write ids of it."""

    model: str
    classifier: str
    pad: int
    words: tuple[int, int]  # ordinary token ids: from, below


TINY = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 64}  # for --quick


def make_base(folder: Path, quick: bool, name: str | None = None, attention: str = "sdpa") -> Base:
    """The model of a folder or of the hub; no name: SmolLM2-135M out of its package, dequantised. ``quick``: two layers
    with random weights."""
    import torch
    from transformers import AutoTokenizer

    from rto import config as recipe
    from rto.models.load import load_network, locate

    if quick:
        return scratch_base(folder, **TINY)
    if name is None:
        model = locate(recipe.Packaged(type="package"))
        return _base(folder, model, AutoTokenizer.from_pretrained(model), (1000, 40000))
    tokenizer, model = AutoTokenizer.from_pretrained(name), str(folder / "model")
    load_network(name, "causal", torch.float32, 0, attention).save_pretrained(model)  # sides reach no hub
    tokenizer.save_pretrained(model)
    return _base(folder, model, tokenizer, (len(tokenizer) // 50, 4 * len(tokenizer) // 5), attention)


def scratch_base(folder: Path, **sizes: int) -> Base:
    """Random weights and the words of the tiny world; ``sizes`` are those of a [model] of type scratch."""
    from rto import config as recipe
    from rto.data.worlds import world_tokenizer
    from rto.models.load import scratch_network

    tokenizer, model = world_tokenizer(), str(folder / "model")
    scratch = recipe.Scratch.model_validate({"type": "scratch", **sizes})
    scratch_network(scratch, tokenizer, tokenizer.eos_token_id, 0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return _base(folder, model, tokenizer, (8, len(tokenizer)))


def _base(folder: Path, model: str, tokenizer: Any, words: tuple[int, int], attention: str = "sdpa") -> Base:
    import torch

    from rto.models.load import load_network

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    classifier = load_network(model, "classifier", torch.float32, 0, attention)
    classifier.config.pad_token_id = pad  # the peer finds the last token by it
    classifier.save_pretrained(folder / "classifier")
    return Base(model, str(folder / "classifier"), pad, words)


def make_case(
    name: str,
    base: Base,
    folder: Path,
    *,
    turns: int,
    quick: bool = False,
    pairs: str | None = None,
    micro_tokens: int | None = None,
    peer_rows: int = 8,
    device: str = "cpu",
    **more: Any,
) -> Case:
    """``more``: other fields of the case. Raises ValueError for a name that is none, and for natural pairs without a
    file."""
    if name not in NAMES:
        raise ValueError(f"there is no work named {name!r}: choose among {', '.join(NAMES)}")
    sizes, kind = QUICK if quick else GPU if device == "cuda" else CPU, name.partition("-")[0]
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(*base.words) for _ in range(count)]

    def some(rows: int, length: int, *names: str) -> list[Row]:
        return [{name: ids(length) for name in names} for _ in range(rows)]

    rows = sizes.rollouts if kind in ("ppo", "generate") else sizes.pairs
    more |= {"micro_rows": min(peer_rows, rows), "device": device}
    if name == "dpo-natural":
        batches = _natural(base, sizes, turns, quick, pairs, ids, draw)
    elif kind in ("dpo", "reward"):
        batches = [some(sizes.pairs, sizes.side, "prompt", "chosen", "rejected")]
    elif kind == "sft":
        batches = [some(sizes.pairs, sizes.side, "prompt", "answer")]
    else:
        varied = name == "generate-varied"
        batches = [some(sizes.varied if varied else sizes.rollouts, sizes.turn, "prompt")]
        more["limit"] = sizes.longest if varied else sizes.turn
        if varied:
            more["lengths"] = tuple(draw.randint(sizes.shortest, sizes.longest) for _ in range(sizes.varied))
    return Case(
        name,
        {"dpo": "dpo", "reward": "reward", "sft": "sft", "ppo": "ppo", "generate": "sampling"}[kind],
        base.model,
        base.classifier,
        str(folder),
        base.pad,
        batches,
        turns,
        micro_tokens or MICRO_TOKENS[device].get(name) or MICRO_TOKENS[device][kind],
        lr=sizes.lr,
        lora=sizes.rank if name in ("dpo-lora", "ppo-adapters") else None,
        **more,
    )


def _natural(
    base: Base, sizes: Sizes, turns: int, quick: bool, file: str | None, ids: Any, draw: random.Random
) -> list[list[Row]]:
    """The next pairs of a file for every turn, in its order; ``quick``: ids of random lengths."""
    wanted = turns * sizes.pairs
    if quick:
        rows: Sequence[Row] = [
            {name: ids(draw.randint(2, 12)) for name in ("prompt", "chosen", "rejected")} for _ in range(wanted)
        ]
    else:
        rows = _read(base, file, wanted)
    return [list(rows[i : i + sizes.pairs]) for i in range(0, wanted, sizes.pairs)]


def _read(base: Base, file: str | None, wanted: int) -> list[Row]:
    from rto.config import Files
    from rto.data.chat import Encoder, encode_pairs, load_template
    from rto.data.sources import read_pairs
    from rto.models.load import load_tokenizer

    if file is None:
        raise ValueError("dpo-natural reads pairs of natural length: name a file with --pairs")
    files, tokenizer = Files(pairs=file, limit=2 * wanted), load_tokenizer(base.model)
    load_template(tokenizer, files)
    found = encode_pairs(Encoder(tokenizer, files.max_prompt, files.max_response), read_pairs(files)).rows[:wanted]
    if len(found) < wanted:
        raise ValueError(f"--pairs {file}: {len(found)} pairs, and {wanted} are needed")
    return [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in found]
