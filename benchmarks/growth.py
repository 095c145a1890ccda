"""How cost grows with the answers' length, the batch and the vocabulary: tokens/s and peak memory.

    python -m benchmarks.growth --out runs/growth --threads 2

One optimiser step of DPO and one pass of scoring (log-probs of the same answers) of a small Llama with random weights:
4 layers, hidden size 256. Every point is a process of its own, because the peak of a process never falls. Writes
growth.json, growth.md and growth.png; points that are done are told on stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.speed.drive import ROOT
from benchmarks.speed.machine import described, environment
from benchmarks.speed.turns import peak_memory_mb

WORK = {"dpo": "DPO step", "scoring": "scoring pass"}
COPIES = {"dpo": 5, "scoring": 1}  # of the weights: policy, gradient, two moments of Adam, reference
MB = 2**20


@dataclass(frozen=True)
class Point:
    """One workload. Tokens of a prompt and of each answer; words of the vocabulary."""

    work: str
    answer: int = 64
    pairs: int = 8
    vocabulary: int = 32_000
    prompt: int = 64
    hidden: int = 256
    layers: int = 4
    micro_tokens: int = 512  # of a pass, in training and in scoring
    seconds: float = 2.0  # of measuring, at least


# What is varied, the others as above.
AXES: dict[str, tuple[int, ...]] = {
    "answer": (64, 128, 256, 512, 1024),
    "pairs": (8, 16, 32, 64, 128),
    "vocabulary": (32_000, 64_000, 128_000),
}
QUICK: dict[str, tuple[int, ...]] = {"answer": (8, 16), "pairs": (2, 4), "vocabulary": (500, 1000)}
QUICK_POINT = Point("dpo", 8, 2, 500, prompt=8, hidden=32, layers=2, micro_tokens=64, seconds=0.0)


def measure(point: Point) -> dict[str, Any]:
    """Seconds and tokens of one step or pass (the median after one of warm-up), the peak of this process in MB, tokens
    of its heaviest micro-batch, and parameters of the model."""
    import statistics

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rto.config import Supervised
    from rto.data.chat import PairRow
    from rto.data.collate import collate_completions, micro_batches
    from rto.models.memory import Budget
    from rto.models.role import Backbone, Role
    from rto.models.runtime import Runtime
    from rto.optim import Optimizer
    from rto.preferences.dpo import dpo
    from rto.preferences.objectives import PairObjective
    from rto.preferences.train import gradients
    from rto.rollouts.score import token_logprobs

    runtime, draw = Runtime("cpu"), random.Random(0)
    settings = LlamaConfig(
        vocab_size=point.vocabulary,
        hidden_size=point.hidden,
        num_hidden_layers=point.layers,
        num_attention_heads=4,
        intermediate_size=3 * point.hidden,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )

    def role() -> Role:
        torch.manual_seed(0)
        return Role(Backbone(LlamaForCausalLM(settings).eval(), "random", None, torch.float32))

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, point.vocabulary) for _ in range(count)]

    policy = role()
    rows = [
        PairRow(i, "", ids(point.prompt), ids(point.answer), True, ids(point.answer), True, 0.0)
        for i in range(1, point.pairs + 1)
    ]
    if point.work == "dpo":
        reference = role()
        reference.backbone.network.requires_grad_(False)
        objective = PairObjective(policy, dpo, {"beta": 0.1}, 0, reference)
        training = Supervised(lr=1e-6, micro_tokens=point.micro_tokens)
        optimizer = Optimizer(policy.parameters(), training, training.lr, 1000)
        budget = Budget(point.micro_tokens, print, runtime.gather_all)
        sizes = [objective.size(row) for row in rows]

        def work() -> None:
            gradients(objective, rows, budget, runtime, optimizer.forget)
            optimizer.step()
    else:
        prompts, answers = [row.prompt for row in rows] * 2, [row.chosen for row in rows] + [r.rejected for r in rows]
        completions = collate_completions(prompts, answers, [True] * len(answers), 0)
        sizes = [point.prompt + point.answer] * len(answers)

        def work() -> None:
            token_logprobs(policy, completions, point.micro_tokens)

    forget_peak()
    work()
    taken: list[float] = []
    while not taken or (sum(taken) < point.seconds and len(taken) < 5):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return {
        "seconds": statistics.median(taken),
        "tokens": 2 * point.pairs * (point.prompt + point.answer),
        "peak_mb": peak_memory_mb(),
        "micro_batch": max(len(group) * sizes[group[0]] for group in micro_batches(sizes, point.micro_tokens)),
        "parameters": sum(p.numel() for p in policy.backbone.network.parameters()),
        "threads": torch.get_num_threads(),
    }


def forget_peak() -> None:
    """Making a model with random weights takes more than holding it: the peak is to be that of the work. Linux only."""
    if sys.platform == "linux":
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held


def in_a_process(point: Point, threads: int) -> dict[str, Any]:
    """Raises RuntimeError with the last words of a process that failed."""
    call = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(asdict(point))]
    done = subprocess.run(call, cwd=ROOT, env=environment(threads, "default"), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{point} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return asdict(point) | json.loads(done.stdout.splitlines()[-1])


def derived(found: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second; MB of weights, gradients and moments, from the number of parameters; MB of all else."""
    weights = COPIES[found["work"]] * 4 * found["parameters"] / MB
    rest = found["peak_mb"] - weights
    return found | {"speed": found["tokens"] / found["seconds"], "weights_mb": weights, "rest_mb": rest}


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares y = a + b x: a, b, and the largest distance of a point from the line."""
    import numpy as np

    b, a = np.polyfit(x, y, 1)
    return float(a), float(b), float(max(abs(a + b * p - q) for p, q in zip(x, y, strict=True)))


def along(found: Sequence[dict[str, Any]], axis: str, work: str) -> list[dict[str, Any]]:
    """The points of one axis, the others at their first values."""
    first = {name: min(row[name] for row in found) for name in AXES}
    rows = [row for row in found if row["work"] == work and all(row[n] == first[n] for n in AXES if n != axis)]
    return sorted(rows, key=lambda row: row[axis])


def said(found: Sequence[dict[str, Any]]) -> list[str]:
    """How memory grows, in numbers."""
    lines = []
    for work, name in WORK.items():
        rows = along(found, "answer", work)
        a, b, off = fit([row["micro_batch"] for row in rows], [row["rest_mb"] for row in rows])
        lines.append(
            f"- {name}, tokens of a micro-batch: without weights, gradients and moments {a:.0f} MB + {1024 * b:.1f} MB "
            f"per 1,024 tokens; no point is more than {off:.0f} MB off this line."
        )
        rows = along(found, "pairs", work)
        more = round(rows[-1]["rest_mb"] - rows[0]["rest_mb"])
        lines.append(
            f"- {name}, batch: {more:+} MB from {rows[0]['pairs']} to {rows[-1]['pairs']} pairs at the same "
            "micro_tokens."
        )
        rows = along(found, "vocabulary", work)
        weights, rest = (rows[-1][key] - rows[0][key] for key in ("weights_mb", "rest_mb"))
        layer = 4 * rows[0]["hidden"] * (rows[-1]["vocabulary"] - rows[0]["vocabulary"]) / MB
        lines.append(
            f"- {name}, vocabulary: {rows[0]['vocabulary']:,} to {rows[-1]['vocabulary']:,} words add {weights:.0f} MB "
            f"of weights, gradients and moments ({COPIES[work]} x {layer:.0f} MB) and {rest:+.0f} MB of all else, "
            f"{rest / layer:.2f} output layers."
        )
    return lines


def table(found: Sequence[dict[str, Any]]) -> str:
    from rto.report.export import markdown

    heads = ["work", "answer", "pairs", "vocabulary", "seconds", "tokens/s", "tokens of a micro-batch"]
    heads += ["peak, MB", "of it weights, gradients, moments, MB", "all else, MB"]
    rows = [
        [
            WORK[row["work"]],
            *(f"{row[name]:,}" for name in AXES),
            f"{row['seconds']:.3g}",
            f"{row['speed']:,.0f}",
            f"{row['micro_batch']:,}",
            *(f"{row[name]:,.0f}" for name in ("peak_mb", "weights_mb", "rest_mb")),
        ]
        for row in found
    ]
    return markdown(heads, rows)


def points(quick: bool) -> list[Point]:
    """Every point once, though the axes meet."""
    base = QUICK_POINT if quick else Point("dpo")
    axes = QUICK if quick else AXES
    return list(
        dict.fromkeys(
            replace(base, work=work, **{axis: value})  # type: ignore[arg-type]
            for work in WORK
            for axis, values in axes.items()
            for value in values
        )
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/growth", help="folder for table, numbers and plots")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a tiny model, few points: its times say nothing")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # how it calls itself
    known = parser.parse_args(arguments)
    if known.point:
        print(json.dumps(measure(Point(**json.loads(known.point)))))
        return
    from benchmarks.growth_plot import draw

    from rto.report.plots import save_png

    out = Path(known.out)
    out.mkdir(parents=True, exist_ok=True)
    machine, found = described(known.threads), []
    for point in points(known.quick):
        found.append(derived(in_a_process(point, known.threads)))
        (out / "growth.json").write_text(json.dumps({"machine": machine, "points": found}, indent=1))
        row = found[-1]
        where = ", ".join(f"{name} {row[name]:,}" for name in AXES)
        print(f"{WORK[row['work']]}, {where}: {row['seconds']:.3g} s, {row['peak_mb']:,.0f} MB", file=sys.stderr)
    text = "\n".join([f"{machine}", "", table(found), "", *said(found)])
    (out / "growth.md").write_text(text + "\n")
    save_png(draw(found), out / "growth.png")
    print(text)


if __name__ == "__main__":
    main()
