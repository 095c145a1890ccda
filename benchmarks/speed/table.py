"""What was measured, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.speed.drive import Measured, differences

HEAD = (
    "work",
    "side",
    "setup",
    "seconds (range)",
    "by phase (share of GEMM peak)",
    "tokens/s",
    "peak memory",
    "TFLOP done (least)",
    "share of GEMM peak",
    "floor",
    "times faster (range)",
    "memory of the peer's",
)


def head() -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD)))


def lines(run: Sequence[Measured], peak: float, least: Mapping[str, float]) -> list[str]:
    """One line a side; an rto side has a ratio to every peer of its run.

    ``peak`` is in operations a second. ``least``, by work, are the operations of a turn that rto's way of doing it
    cannot do without.
    """
    peers = [side for side in run if side.entry.side == "peer" and not side.failed]
    return [_failed(side) if side.failed else _line(side, peers, peak, least[side.entry.work]) for side in run]


def _failed(side: Measured) -> str:
    cells = [side.entry.work, side.entry.side, side.entry.told, "failed"]
    return f"| {' | '.join(cells)} |{'  |' * (len(HEAD) - len(cells))}"


def _line(side: Measured, peers: Sequence[Measured], peak: float, least: float) -> str:
    seconds = statistics.median(side.seconds)
    speed = statistics.median(turn["tokens"] / turn["seconds"] for turn in side.turns)
    cells = [side.entry.work, side.entry.side, side.entry.told, spread(side.seconds, " s")]
    cells += [", ".join(_phase(side, phase, taken, peak) for phase, taken in side.phases().items())]
    cells += [f"{speed:,.0f}", f"{side.memory_mb:,.0f} MB"]
    if side.flops:
        cells += [f"{side.flops / 1e12:.3g} ({least / 1e12:.3g})", f"{side.flops / seconds / peak:.0%}"]
    else:
        cells += [f"- ({least / 1e12:.3g})", "-"]
    cells += [f"{least / peak:.3g} s"]
    compared = peers if side.entry.side == "rto" else []
    faster, smaller = [], []
    for peer in compared:
        if differences(peer, side):
            faster.append(f"{peer.entry.told}: not the same work")
        else:
            faster.append(f"{peer.entry.told}: {spread(ratios(peer, side), ' x')}")
            smaller.append(f"{peer.entry.told}: {side.memory_mb / peer.memory_mb:.2f}")
    return f"| {' | '.join([*cells, '; '.join(faster), '; '.join(smaller)])} |"


def _phase(side: Measured, phase: str, taken: float, peak: float) -> str:
    """Its seconds, and its share of the peak where it multiplies matrices."""
    done = side.phase_flops.get(phase, 0)
    return f"{phase} {taken:.3g}" + (f" ({done / taken / peak:.0%})" if done else "")


def ratios(peer: Measured, side: Measured) -> list[float]:
    """How many times faster than the peer, turn by turn: those of a pair were taken soon after each other."""
    return [a / b for a, b in zip(peer.seconds, side.seconds, strict=True)]


def spread(values: Sequence[float], unit: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"


def settings(run: Sequence[Measured]) -> dict[str, str]:
    """By work, side and setup."""
    return {
        _name(side): ", ".join(f"{key} {value}" for key, value in side.settings.items())
        for side in run
        if side.settings
    }


def agreement(run: Sequence[Measured]) -> list[str]:
    """What showed that the sides did the same, in the first turn and in the last."""
    whole = [side for side in run if not side.failed]
    if len(whole) < 2:
        return []
    last = len(whole[0].checks)
    found = [
        f"{check} {' and '.join(f'{side.checks[turn - 1][check]:.6g}' for side in whole)}"
        + (f" in turn {turn}" if last > 1 else "")
        for turn in sorted({1, last})
        for check in whole[0].checks[turn - 1]
        if all(check in side.checks[turn - 1] for side in whole)
    ]
    return [f"- {' and '.join(_name(side) for side in whole)}: {', '.join(found)}"]


def disagreement(run: Sequence[Measured]) -> list[str]:
    """Where a side did not do what the run's first one did, and which side ended early."""
    whole = [side for side in run if not side.failed]
    found = [
        f"- {_name(whole[0])} and {_name(other)}: NOT THE SAME WORK: {line}"
        for other in whole[1:]
        for line in differences(whole[0], other)
    ]
    return found + [f"- {_name(side)}: {side.failed}" for side in run if side.failed]


def _name(side: Measured) -> str:
    e = side.entry
    return f"{e.work} {e.side}" + (f" ({e.told})" if e.side == "peer" else "")
