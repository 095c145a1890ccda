"""Where the time goes: shares of DPO steps, a scoring pass, RL iterations and sampling, by kind of operation.

    python -m benchmarks.profiling --threads 2                  # SmolLM2-135M (make smollm)
    python -m benchmarks.profiling scoring --ops 20             # one of them, with its largest operations

torch's profiler sees one turn of each piece of work of benchmarks/speed, after one in which operations were counted and
some that were timed. A machine's speed moves within minutes: a timed turn is compared with the best matrix products
just before and after it. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed import dpo, ours, ppo, sampling
from benchmarks.speed.case import Case, tokens
from benchmarks.speed.cases import make_base, make_case
from benchmarks.speed.machine import described, gemm_peak, use_threads
from benchmarks.speed.turns import Turns

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "addmv", "mv", "dot", "_linear_pointwise", "_mkl_linear")
COPIES = (
    "copy_",
    "cat",
    "stack",
    "clone",
    "contiguous",
    "to",
    "_to_copy",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "zeros",
    "zeros_like",
    "zero_",
    "fill_",
    "new_zeros",
    "resize_",
    "constant_pad_nd",
    "index_select",
    "_reorder_linear_weight",
)
NORM, HEAD = "scope: norm", "scope: log-probs"  # marks in the profile
GROUPS = (
    "matrix products",
    "attention",
    "normalisation",
    "log-probs and drawing",
    "elementwise, rotary, embedding",
    "optimiser and clipping",
    "summing gradients",
    "copies and allocation",
    "Python and launching",
)


def scoring(case: Case, turns: Turns) -> None:
    """Log-probs of the answers of DPO's batch under the reference."""
    from rto.data.collate import collate_completions
    from rto.rollouts.score import token_logprobs

    role = ours.workshop(case)[0].reference()
    rows = [(row["prompt"], row[side]) for row in case.batch(0) for side in ("chosen", "rejected")]
    completions = collate_completions([p for p, _ in rows], [a for _, a in rows], [True] * len(rows), case.pad)
    turns.ready({})
    while True:
        turns.begin()
        token_logprobs(role, completions, 4 * case.micro_tokens)
        turns.stop()
        turns.end(sum(map(tokens, case.batch(0))), "scoring", {})


# Case of benchmarks/speed, and who does it.
WORK: dict[str, tuple[str, Callable[[Case, Turns], None]]] = {
    "dpo": ("dpo", dpo.rto),
    "dpo-lora": ("dpo-lora", dpo.rto),
    "scoring": ("dpo", scoring),
    "rl": ("ppo", ppo.rto),
    "rl-adapters": ("ppo-adapters", ppo.rto),
    "sampling": ("generate", sampling.rto),
}


@dataclass
class Profile:
    """Of one turn. ``shares`` are of the profiled turn's seconds, by group; ``ops`` by name and group."""

    seconds: list[float]  # of each turn that nobody looked at
    peaks: list[float]  # floating-point operations a second, around each of these
    flops: int
    shares: dict[str, float]
    ops: Counter[tuple[str, str]] = field(default_factory=Counter)
    system: float = 0.0  # share of the processor time that the system took, mostly to clear new pages
    faults: int = 0  # pages that were touched for the first time

    @property
    def of_peak(self) -> list[float]:
        return [self.flops / s / peak for s, peak in zip(self.seconds, self.peaks, strict=True)]


class Watched(Turns):
    """Takes its turns at once: warm-up, operations, ``timed`` ones, and the last one is profiled. ``peak`` measures."""

    def __init__(self, timed: int, peak: Callable[[], float]) -> None:
        self.orders = ("go", "count", *["go"] * timed, "go")
        super().__init__(io.StringIO("".join(f"{order}\n" for order in self.orders)), io.StringIO())
        self.events: Any = None
        self.flops, self.profiled = 0, 0.0
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.system, self.faults = 0.0, 0
        self._peak = peak

    @property
    def _timed(self) -> bool:
        return 2 <= self.number < len(self.orders) - 1

    def begin(self) -> None:
        if self._timed:
            self.peaks.append(self._peak())
        super().begin()
        if self.number == len(self.orders) - 1:
            from torch.profiler import ProfilerActivity, profile

            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.__enter__()
        self._used = resource.getrusage(resource.RUSAGE_SELF)

    def stop(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        super().stop()
        self.flops = self.flops or self._flops
        if self._timed:
            self.seconds.append(self._seconds)
            self.peaks[-1] = max(self.peaks[-1], self._peak())
            system, user = used.ru_stime - self._used.ru_stime, used.ru_utime - self._used.ru_utime
            self.system, self.faults = system / max(1e-9, system + user), used.ru_minflt - self._used.ru_minflt
        elif self.number == len(self.orders) - 1:
            self.profiled = self._seconds
            self._profile.__exit__(None, None, None)
            self.events = self._profile.events()


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Norms, and what turns logits into log-probs and tokens, leave marks in the profile."""
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
    from torch.profiler import record_function

    from rto.models import role
    from rto.rollouts import generate

    open_marks: list[Any] = []

    def begin(module: Any, *_: Any) -> None:
        if "Norm" in type(module).__name__:
            open_marks.append(record_function(NORM))
            open_marks[-1].__enter__()

    def end(module: Any, *_: Any) -> None:
        if "Norm" in type(module).__name__:
            open_marks.pop().__exit__(None, None, None)

    def around(work: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with record_function(HEAD):
                return work(*args, **kwargs)

        return inside

    with contextlib.ExitStack() as stack:
        for hook in (register_module_forward_pre_hook(begin), register_module_forward_hook(end)):
            stack.callback(hook.remove)
        for module, name in ((role, "token_logprobs"), (generate, "pick")):
            plain = getattr(module, name)
            setattr(module, name, around(plain))
            stack.callback(setattr, module, name, plain)
        yield


def group_of(names: list[str], scope: str) -> str:
    """``names``: the operation and what called it, from the inside out. ``scope``: the mark that it, or the forward
    operation that it is the gradient of, stands under."""
    name = names[0].partition("::")[2] or names[0]
    if name in PRODUCTS:
        return "matrix products"
    if any("scaled_dot_product" in caller for caller in names):
        return "attention"
    if any(caller.startswith("Optimizer.") for caller in names) or name.startswith("_foreach"):
        return "optimiser and clipping"
    if any("AccumulateGrad" in caller for caller in names):
        return "summing gradients"
    if scope == HEAD or any("_Selected" in caller for caller in names):
        return "log-probs and drawing"
    if scope == NORM:
        return "normalisation"
    if name in COPIES:
        return "copies and allocation"
    return "elementwise, rotary, embedding"


def shares(events: Any, seconds: float) -> tuple[dict[str, float], Counter[tuple[str, str]]]:
    """Of the profile of a turn. A gradient belongs to the mark of the operation whose sequence number it bears."""
    forward: dict[int, str] = {}
    found: Counter[tuple[str, str]] = Counter()
    lines = []
    for event in events:
        line = [event]
        while line[-1].cpu_parent is not None:
            line.append(line[-1].cpu_parent)
        names = [caller.name for caller in line]
        scope = next((name for name in names if name in (NORM, HEAD)), "")
        backward = next((e for e in line if e.name.startswith("autograd::engine::evaluate_function")), None)
        if backward is None and event.sequence_nr >= 0:
            forward[event.sequence_nr] = scope or forward.get(event.sequence_nr, "")
        lines.append((event, names, scope, backward))
    for event, names, scope, backward in lines:
        if event.name in (NORM, HEAD) or event.name.startswith(("ProfilerStep", "Optimizer.", "autograd::")):
            continue  # the time in between their operations is Python's
        if backward is not None:
            scope = scope or forward.get(backward.sequence_nr, "")
        found[event.name, group_of(names, scope)] += event.self_cpu_time_total / 1e6
    by_group = {group: sum(t for (_, of), t in found.items() if of == group) / seconds for group in GROUPS}
    by_group[GROUPS[-1]] = 1 - sum(by_group.values())
    return by_group, Counter({key: taken / seconds for key, taken in found.items()})


def profiled(work: Callable[[Case, Turns], None], case: Case, turns: Watched) -> Profile:
    from rto.rollouts import generate

    plain = generate.uniforms
    try:
        with marked(), contextlib.suppress(SystemExit):  # no orders are left
            work(case, turns)
    finally:
        generate.uniforms = plain  # type: ignore[assignment]
    by_group, ops = shares(turns.events, turns.profiled)
    return Profile(turns.seconds, turns.peaks, turns.flops, by_group, ops, turns.system, turns.faults)


def table(found: dict[str, Profile]) -> str:
    heads = ["", *found]
    rows = [
        ["seconds", *(_middle(p.seconds, "{:.3g}") for p in found.values())],
        ["TFLOP done", *(f"{p.flops / 1e12:.3g}" for p in found.values())],
        ["GEMM peak, GFLOP/s", *(_middle([peak / 1e9 for peak in p.peaks], "{:.0f}") for p in found.values())],
        ["share of the GEMM peak", *(_middle(p.of_peak, "{:.0%}") for p in found.values())],
        *([group, *(f"{p.shares[group]:.1%}" for p in found.values())] for group in GROUPS),
        ["page faults", *(f"{p.faults:,}" for p in found.values())],
        ["processor time in the system", *(f"{p.system:.1%}" for p in found.values())],
    ]
    lines = [heads, ["---", *["---:"] * len(found)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _middle(values: list[float], form: str) -> str:
    middle, low, high = (form.format(f(values)) for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="*", help=f"default: {', '.join(WORK)}")
    parser.add_argument("--quick", action="store_true", help="a tiny model: its shares say nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=3, help="that are timed, of each (default: 3)")
    parser.add_argument("--ops", type=int, default=0, help="also the largest operations of each")
    known = parser.parse_args(arguments)
    if unknown := [name for name in known.work if name not in WORK]:
        parser.error(f"there is no work named {', '.join(unknown)}: choose among {', '.join(WORK)}")
    if known.turns < 1:
        parser.error("--turns is 1 or more")
    use_threads(known.threads)
    found: dict[str, Profile] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), known.quick)
        for name in known.work or WORK:
            case, work = WORK[name]
            turns = Watched(known.turns, partial(gemm_peak, known.threads, 0.1 if known.quick else 2.0))
            made = make_case(case, base, Path(folder), turns=len(turns.orders), quick=known.quick)
            found[name] = profiled(work, made, turns)
            print(f"{name}: {_middle(found[name].seconds, '{:.3g}')} s", file=sys.stderr, flush=True)
    print(f"{described(known.threads)}\n\n{table(found)}")
    for name, profile in found.items():
        if known.ops:
            print(f"\n{name}\n")
        for (op, group), share in profile.ops.most_common(known.ops):
            print(f"- {share:.1%} {op} ({group})")


if __name__ == "__main__":
    main()
