"""What a checkpoint costs: how long the loop waits (a copy in memory), how long the write takes beside it, how large.

    python benchmarks/checkpoints.py --output runs/checkpoints

SmolLM2-135M, policy with AdamW moments, with LoRA r 16 and in full. Needs ``make smollm``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rto.config import Lora, Packaged, Training
from rto.models.incidents import Incidents
from rto.models.load import load_tokenizer, locate
from rto.models.runtime import Runtime
from rto.models.saver import Moving, Saver
from rto.models.store import Store
from rto.models.workshop import Workshop
from rto.optim import Optimizer
from rto.report.log import RunLog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="a folder on the disk to be measured; default: a temporary one")
    parser.add_argument("--repeats", type=int, default=5)
    known = parser.parse_args()
    print("| run | weights and moments | on disk | the loop waits (copy) | write, fsync, read back, beside the loop |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=known.output) as folder:
        for name, lora in (("LoRA r 16", Lora(r=16)), ("full", None)):
            print(row(name, lora, Path(folder) / name.replace(" ", "-"), known.repeats), flush=True)


def row(name: str, lora: Lora | None, folder: Path, repeats: int) -> str:
    """One line of the table: medians."""
    runtime, model = Runtime("cpu"), Packaged(type="package", lora=lora)
    shop = Workshop(model, locate(model), load_tokenizer(locate(model)), runtime, 0)
    role = shop.new_policy("policy")
    optimizer = Optimizer(role.parameters(), Training(), 1e-6, 10)
    for p in role.parameters():
        p.grad = torch.full_like(p, 1e-6)
    optimizer.step()  # makes the moments
    moving = Moving({"policy": role.parameters()}, {"policy": optimizer})
    incidents = Incidents(folder / "incidents", str)
    saver = Saver("rl", Store(folder), 1, runtime, RunLog(folder), print, incidents)
    saver.begin(0, repeats + 2, moving)
    waits, writes = [], []
    for step in range(1, repeats + 2):
        begun = time.perf_counter()
        saver.after(step, repeats + 2, moving)
        waits.append(time.perf_counter() - begun)
        saver.writer.wait()
        writes.append(time.perf_counter() - begun)
    tensors = [*role.parameters(), *optimizer.tensors().values()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    disk = sum(path.stat().st_size for path in (folder / f"step-{repeats + 1:08d}").iterdir())
    cells: list[Any] = [name, size(held), size(disk), seconds(waits[1:]), seconds(writes[1:])]  # the first: a warm-up
    return f"| {' | '.join(cells)} |"


def size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def seconds(found: list[float]) -> str:
    return f"{statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})"


if __name__ == "__main__":
    main()
