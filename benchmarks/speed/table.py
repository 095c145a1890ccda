"""What was measured, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.speed.drive import Measured

HEAD = (
    "work",
    "side",
    "malloc",
    "seconds (range)",
    "by phase",
    "tokens/s",
    "peak memory",
    "TFLOP done (least)",
    "share of GEMM peak",
    "floor",
    "times faster (range)",
    "memory",
)


def head() -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD)))


def lines(name: str, measured: Sequence[Measured], peak: float, least: float, differ: Sequence[str]) -> list[str]:
    """One line a side. ``peak`` is in operations a second; ``least`` are the operations of a turn that rto's way of
    doing the work cannot do without. ``differ`` says why there is no ratio."""
    peer = next((side for side in measured if side.side == "peer"), None)
    return [_line(name, side, peer, peak, least, differ) for side in measured]


def _line(name: str, side: Measured, peer: Measured | None, peak: float, least: float, differ: Sequence[str]) -> str:
    seconds = statistics.median(side.seconds)
    speed = statistics.median(turn["tokens"] / turn["seconds"] for turn in side.turns)
    cells = [name, side.side, side.variant, spread(side.seconds, " s")]
    cells += [", ".join(f"{phase} {taken:.3g}" for phase, taken in side.phases().items())]
    cells += [f"{speed:,.0f}", f"{side.memory_mb:,.0f} MB"]
    if side.flops:
        cells += [f"{side.flops / 1e12:.3g} ({least / 1e12:.3g})", f"{side.flops / seconds / peak:.0%}"]
    else:
        cells += [f"- ({least / 1e12:.3g})", "-"]
    cells += [f"{least / peak:.3g} s"]
    if side is peer or peer is None:
        cells += ["", ""]
    elif differ:
        cells += ["not the same work", ""]
    else:
        cells += [spread(ratios(peer, side), " x"), f"{side.memory_mb / peer.memory_mb:.2f} of the peer's"]
    return f"| {' | '.join(cells)} |"


def ratios(peer: Measured, side: Measured) -> list[float]:
    """How many times faster than the peer, turn by turn: the two turns of a pair were taken one after the other."""
    return [a / b for a, b in zip(peer.seconds, side.seconds, strict=True)]


def spread(values: Sequence[float], unit: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"


def settings(name: str, measured: Sequence[Measured]) -> list[str]:
    """A line a side, the same for every variant."""
    found = {side.side: ", ".join(f"{key} {value}" for key, value in side.settings.items()) for side in measured}
    return [f"- {name}, {side}: {said}" for side, said in found.items()]


def agreement(name: str, measured: Sequence[Measured]) -> list[str]:
    """What showed that the sides did the same, in the first turn and in the last."""
    if len(measured) < 2:
        return []
    last = len(measured[0].checks)
    found = [
        f"{check} {' and '.join(f'{side.checks[turn - 1][check]:.6g}' for side in measured)}"
        + (f" in turn {turn}" if last > 1 else "")
        for turn in sorted({1, last})
        for check in measured[0].checks[turn - 1]
    ]
    return [f"- {name}, {measured[0].variant}, {' and '.join(side.side for side in measured)}: {', '.join(found)}"]
