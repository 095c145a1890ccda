"""`rto` and its peers on one fixed piece of work after the other, in one call and turn by turn.

    python -m benchmarks.speed --quick                                # a tiny model: seconds
    python -m benchmarks.speed --only rto --quick                     # without the peers
    python -m benchmarks.speed dpo dpo-lora --peers .venv/bench       # SmolLM2-135M; `make bench` does this

Prints a Markdown table. docs/performance.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.speed import table
from benchmarks.speed.case import Case
from benchmarks.speed.cases import MICRO_TOKENS, NAMES, make_base, make_case
from benchmarks.speed.drive import ROOT, Failed, differences, measure
from benchmarks.speed.machine import VARIANTS, described, gemm_peak
from benchmarks.speed.work import Model

# Where `make bench` puts the peers of a workload, below --peers. Sampling needs none: its peer is transformers.
ENVIRONMENTS = {"dpo": "trl", "sft": "trl", "reward": "trl", "ppo": "trl-ppo"}


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where two sides did not do the same work, or one of them failed."""
    parser = _parser()
    known = parser.parse_args(arguments)
    work = known.work or [name for name in NAMES if name != "dpo-natural" or known.pairs or known.quick]
    pythons = {name: _pythons(name.partition("-")[0], Path(known.peers), known.only) for name in work}
    if lacking := {python for both in pythons.values() for python in both.values() if not Path(python).exists()}:
        parser.error(f"no peers in {', '.join(sorted(lacking))}: run `make bench`, or give --peers or --only rto")
    if known.repeats < 1 or known.warmup < 0:
        parser.error("--repeats is 1 or more, --warmup 0 or more")
    failed = False
    said: list[str] = []
    told: dict[str, list[str]] = {}
    print(f"{described(known.threads)}; {known.repeats} turns a side after {known.warmup} of warm-up", end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), known.quick)
        peaks = [_peak(known)]
        print(table.head(), flush=True)
        for name in work:
            case = make_case(
                name,
                base,
                Path(folder),
                turns=known.warmup + known.repeats,
                quick=known.quick,
                pairs=known.pairs,
                micro_tokens=known.micro_tokens,
                rl_rows=known.peer_rows,
            )
            for variant in known.malloc:
                try:
                    measured = measure(case, variant, pythons[name], known.threads, known.warmup)
                except Failed as error:  # the other work is still worth its hours
                    print(f"| {name} | failed | {variant} |{' |' * (len(table.HEAD) - 3)}", flush=True)
                    said, failed = [*said, f"- {name}, {variant}: {error}"], True
                    continue
                differ = differences(measured)
                lines = table.lines(name, measured, max(peaks), _least(case, base.model, known.warmup), differ)
                print("\n".join(lines), flush=True)
                said += table.agreement(name, measured)
                told[name] = table.settings(name, measured)
                said += [f"- {name}, {variant}: NOT THE SAME WORK: {line}" for line in differ]
                failed |= bool(differ)
            peaks.append(_peak(known))
    print(f"\nGEMM peak, float32: {max(peaks) / 1e9:.0f} GFLOP/s, of {len(peaks)} takes from {min(peaks) / 1e9:.0f} on")
    print("\n".join([*said, *(line for lines in told.values() for line in lines)]))
    return int(failed)


def _peak(known: argparse.Namespace) -> float:
    return gemm_peak(known.threads, 0.1 if known.quick else 2.0)


def _least(case: Case, model: str, warmup: int) -> float:
    """Operations that a timed turn cannot do without: the median where turns differ."""
    count, sizes = importlib.import_module(f"benchmarks.speed.{case.workload}").least, Model.read(model)
    return statistics.median(count(case, case.batch(turn), sizes) for turn in range(warmup, case.turns))


def _pythons(kind: str, peers: Path, only: str | None) -> dict[str, str]:
    """The interpreter of each side."""
    own = ENVIRONMENTS.get(kind)
    found = {"peer": str(ROOT / peers / own / "bin" / "python") if own else sys.executable, "rto": sys.executable}
    return {side: python for side, python in found.items() if only in (None, side)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="*", help=f"default: {', '.join(NAMES)}; dpo-natural with --pairs")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few tokens")
    parser.add_argument("--only", choices=("rto", "peer"), help="one side alone")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns a side")
    parser.add_argument("--warmup", type=int, default=2, help="turns before them; operations are counted in the last")
    parser.add_argument("--malloc", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", help="preference pairs for dpo-natural")
    parser.add_argument("--micro-tokens", type=int, help=f"rto: padded tokens of a training pass; {MICRO_TOKENS}")
    parser.add_argument("--peer-rows", type=int, default=8, help="PPO of the peer: rows of one training pass")
    parser.add_argument("--peers", default=".venv/bench", help="folder of the peers' environments")
    return parser


if __name__ == "__main__":
    sys.exit(main())
