"""`rto` and its peers on one fixed piece of work after the other, in one call and turn by turn.

    python -m benchmarks.speed --quick                                # a tiny model: seconds
    python -m benchmarks.speed --only rto --quick                     # without the peers
    python -m benchmarks.speed dpo dpo-lora --peers .venv/bench       # SmolLM2-135M; `make bench` does this
    python -m benchmarks.speed --device cuda --packing --attention flash_attention_2 --model Qwen/Qwen2.5-0.5B

Prints a Markdown table. docs/performance.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from benchmarks.speed import table
from benchmarks.speed.case import Case
from benchmarks.speed.cases import MICRO_TOKENS, NAMES, make_base, make_case
from benchmarks.speed.drive import ROOT, measure
from benchmarks.speed.machine import SETUPS, described, gemm_peak
from benchmarks.speed.runs import WARMUP, Entry, kind_of, runs
from benchmarks.speed.work import Model

# Where `make bench` puts the peers of a workload, below --peers. Sampling needs none: its peer is transformers.
ENVIRONMENTS = {"dpo": "trl", "sft": "trl", "reward": "trl", "ppo": "trl-ppo"}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # unless --dtype says otherwise
KEYS = ("packing", "kernels", "gradient_checkpointing")  # of rto's [model]


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where two sides did not do the same work, or one of them failed."""
    parser = _parser()
    known = parser.parse_args(arguments)
    if unknown := [name for name in known.work if name not in NAMES]:
        parser.error(f"there is no work named {', '.join(unknown)}: choose among {', '.join(NAMES)}")
    work = known.work or [name for name in NAMES if name != "dpo-natural" or known.pairs or known.quick]
    planned = runs(work, known.setup, known.only, known.device)
    python = _interpreter(Path(known.peers))
    if lacking := {python(entry) for run in planned for entry in run if not Path(python(entry)).exists()}:
        parser.error(f"no peers in {', '.join(sorted(lacking))}: run `make bench`, or give --peers or --only rto")
    if known.repeats < 1 or (known.warmup or 0) < 0:
        parser.error("--repeats is 1 or more, --warmup 0 or more")
    if known.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable GPU")
    known.dtype = known.dtype or DTYPES[known.device]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out = stack.enter_context(open(known.out, "w")) if known.out else None
        return _measure_all(planned, known, folder, python, _teller(out))


def _measure_all(
    planned: list[list[Entry]],
    known: argparse.Namespace,
    folder: Path,
    python: Callable[[Entry], str],
    tell: Callable[[Entry | None, dict[str, Any]], None],
) -> int:
    base = make_base(folder, known.quick, known.model, known.attention)
    cases = {name: _case(name, base, folder, known) for name in {entry.work for run in planned for entry in run}}
    least = {name: _least(case, base.model, _warmup(name, known)) for name, case in cases.items()}
    said: list[str] = []
    failed = False
    told: dict[str, str] = {}
    machine = described(known.threads, known.device)
    tell(None, {"machine": machine, "repeats": known.repeats, "quick": known.quick, "least": least})
    print(f"{machine}; {known.repeats} timed turns a side", end="\n\n")
    peaks: list[float] = []

    def take_peak() -> None:
        peaks.append(gemm_peak(known.threads, 0.1 if known.quick else 2.0, known.device, known.dtype))
        tell(None, {"gemm_peak": peaks[-1]})

    take_peak()
    print(table.head(), flush=True)
    for run in planned:
        measured = measure(run, cases, python, known.threads, _warmup(run[0].work, known), tell)
        print("\n".join(table.lines(measured, max(peaks), least)), flush=True)
        wrong = table.disagreement(measured)  # the other work is still worth its hours
        said += [*table.agreement(measured), *wrong]
        told |= table.settings(measured)
        failed |= bool(wrong)
        take_peak()
    best, worst = max(peaks) / 1e9, min(peaks) / 1e9
    print(f"\nGEMM peak, {known.dtype}: {best:.0f} GFLOP/s, of {len(peaks)} takes from {worst:.0f} on")
    print("\n".join([*said, *(f"- {name}: {found}" for name, found in told.items())]), flush=True)
    return int(failed)


def _teller(out: TextIO | None) -> Callable[[Entry | None, dict[str, Any]], None]:
    """Writes what it hears of, one JSON object a line, and shows turns on stderr: a run that is killed keeps both."""

    def tell(entry: Entry | None, news: dict[str, Any]) -> None:
        named = {"work": entry.work, "side": entry.side, "setup": entry.told} if entry else {}
        if out is not None:
            print(json.dumps(named | news), file=out, flush=True)
        if entry and "turn" in news:
            found = f"turn {news['turn']}: {news['seconds']:.3g} s, {news['memory_mb']:,.0f} MB"
            print(f"{entry.work}, {entry.side} ({entry.told}), {found}", file=sys.stderr, flush=True)

    return tell


def _case(name: str, base: Any, folder: Path, known: argparse.Namespace) -> Case:
    return make_case(
        name,
        base,
        folder,
        turns=_warmup(name, known) + known.repeats + 1,  # the last one is counted, not timed
        quick=known.quick,
        pairs=known.pairs,
        micro_tokens=known.micro_tokens,
        peer_rows=known.peer_rows,
        device=known.device,
        dtype=known.dtype,
        attention=known.attention,
        keys={name: getattr(known, name) for name in KEYS if getattr(known, name)},
    )


def _warmup(name: str, known: argparse.Namespace) -> int:
    return WARMUP[kind_of(name)] if known.warmup is None else known.warmup


def _least(case: Case, model: str, warmup: int) -> float:
    """Operations that a timed turn cannot do without: the median where turns differ."""
    count, sizes = importlib.import_module(f"benchmarks.speed.{case.workload}").least, Model.read(model)
    return statistics.median(count(case, case.batch(turn), sizes) for turn in range(warmup, case.turns - 1))


def _interpreter(peers: Path) -> Callable[[Entry], str]:
    """The Python that runs a side."""

    def python(entry: Entry) -> str:
        own = ENVIRONMENTS.get(entry.kind) if entry.side == "peer" else None
        return str(ROOT / peers / own / "bin" / "python") if own else sys.executable

    return python


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="*", help=f"default: {', '.join(NAMES)}; dpo-natural with --pairs")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few tokens")
    parser.add_argument("--only", choices=("rto", "peer"), help="one side alone")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns a side")
    parser.add_argument("--warmup", type=int, help=f"turns before them; {WARMUP}")
    parser.add_argument(
        "--setup",
        nargs="+",
        choices=SETUPS,
        help="of the peers. On a CPU tuned is large thresholds of malloc, on a GPU no gradient checkpointing; "
        "default: both, of generate the first",
    )
    parser.add_argument("--device", choices=tuple(DTYPES), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=f"of passes; default: {DTYPES}")
    parser.add_argument("--model", metavar="NAME", help="a folder or a name of the hub, in the place of SmolLM2-135M")
    parser.add_argument("--attention", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    parser.add_argument("--packing", action="store_true", help="rto: micro-batches without padding")
    parser.add_argument("--kernels", choices=("liger",), help="rto: kernels of another library")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="rto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", help="preference pairs for dpo-natural")
    parser.add_argument("--micro-tokens", type=int, help=f"rto: padded tokens of a training pass; {MICRO_TOKENS}")
    parser.add_argument("--peer-rows", type=int, default=8, help="the peers': rows of one training pass")
    parser.add_argument("--peers", default=".venv/bench", help="folder of the peers' environments")
    parser.add_argument("--out", metavar="FILE", help="every turn as it ends, as JSON lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
