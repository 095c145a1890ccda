"""One side's half of the conversation with the driver: it waits for its turn, does it once, and says what it took."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any, TextIO

from benchmarks.speed.machine import wait
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Result = dict[str, Any]


class Turns:
    """``begin`` waits for a line: "go", or "count", where floating-point operations are counted and time means
    nothing. ``end`` answers with one line of JSON. At the end of ``orders`` the process ends. On a GPU a turn and each
    of its phases end when the GPU has done them."""

    def __init__(self, orders: TextIO, answers: TextIO, device: str = "cpu") -> None:
        self._orders, self._answers, self._device = orders, answers, device
        self._counter: FlopCounterMode | None = None
        self.spent: dict[str, float] = {}  # seconds, by phase
        self.done: dict[str, int] = {}  # operations, by phase; empty where they are not counted
        self.number = 0  # of turns that are done

    def ready(self, settings: dict[str, Any]) -> None:
        """Everything is loaded. ``settings`` are worth knowing beside a time."""
        import torch

        found = {name: _version(name) for name in ("rto-rlhf", "trl", "transformers", "torch")}
        versions = {name: version for name, version in found.items() if version}
        self._say({"settings": {**versions, "threads": torch.get_num_threads(), **settings}})

    def begin(self) -> None:
        order = self._orders.readline().strip()
        if not order:
            raise SystemExit(0)
        self.spent, self.done = {}, {}
        if order == "count":
            self._counter = FlopCounterMode(display=False, custom_mapping=_fused())
            self._counter.__enter__()
        wait(self._device)
        self._begun = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Its seconds and operations are added to those of the same name in this turn, without those of phases
        inside of it."""
        wait(self._device)
        begun, seconds, operations = time.perf_counter(), sum(self.spent.values()), self._counted()
        inside = sum(self.done.values())
        yield
        wait(self._device)
        taken = time.perf_counter() - begun - (sum(self.spent.values()) - seconds)
        self.spent[name] = self.spent.get(name, 0.0) + taken
        if self._counter is not None:
            made = self._counted() - operations - (sum(self.done.values()) - inside)
            self.done[name] = self.done.get(name, 0) + made

    def _counted(self) -> int:
        return 0 if self._counter is None else self._counter.get_total_flops()

    def stop(self) -> None:
        """The work is done; what comes now is not measured."""
        wait(self._device)
        self._seconds = time.perf_counter() - self._begun
        self._flops = self._counted()
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    def end(self, tokens: int, rest: str, checks: dict[str, float]) -> None:
        """``rest`` is the phase that takes all other seconds. ``checks`` must be the same on both sides."""
        phases = self.spent | {rest: self._seconds - sum(self.spent.values())}
        done = self.done | {rest: self._flops - sum(self.done.values())}
        self.number += 1
        self._say(
            {
                "seconds": self._seconds,
                "phases": phases,
                "flops": self._flops,
                "phase_flops": done,
                "tokens": tokens,
                "checks": checks,
                "memory_mb": peak_memory_mb(self._device),
            }
        )
        if self._device == "cuda":  # the other sides work on the same GPU
            import torch

            torch.cuda.empty_cache()

    def _say(self, result: Result) -> None:
        print(json.dumps(result), file=self._answers, flush=True)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def peak_memory_mb(device: str = "cpu") -> float:
    """The largest memory this program has held; on a GPU that of its tensors there. Not ``ru_maxrss``: on Linux a child
    inherits its parent's."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _fused() -> dict[Any, Any]:
    """Operations that torch's counter does not know: attention on CPUs, and linear layers with packed weights."""
    import torch

    def attention(query, key, value, *_: Any, **__: Any) -> int:
        heads = query[1]  # each of which reads keys and values, whether they are its own or not
        return sdpa_flop_count(query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))

    def attention_backward(_gradient, query, key, value, *_: Any, **__: Any) -> int:
        return 5 * attention(query, key, value) // 2  # five products for two, scores computed again

    def linear(x, weight, *_: Any, out_shape: Any = None, **__: Any) -> int:
        rows = 1
        for size in x[:-1]:
            rows *= size
        return 2 * rows * x[-1] * out_shape[-1]

    found: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    for space, name in (("mkldnn", "_linear_pointwise"), ("mkl", "_mkl_linear")):
        with contextlib.suppress(AttributeError):  # not in every build
            found[getattr(getattr(torch.ops, space), name)] = linear
    return found
