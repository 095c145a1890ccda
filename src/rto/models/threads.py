"""The threads that this process computes with, and what the machine has for them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from rto.products import onednn_is_faster

SYSTEM = Path("/sys")
CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's own


@dataclass(frozen=True)
class Threads:
    """``cores``: physical ones that this process may run on. ``given``: the variable of the environment that says how
    many threads. ``malloc``: the library that allocates memory. ``products``: the one that multiplies matrices."""

    count: int
    cores: int
    nodes: int
    given: str | None
    malloc: str
    products: str

    def __str__(self) -> str:
        by = f"set by {self.given}" if self.given else "no OMP_NUM_THREADS"
        nodes = "1 NUMA node" if self.nodes == 1 else f"{self.nodes} NUMA nodes"
        used = f"malloc of {self.malloc}, matrix products of {self.products}"
        return f"threads {self.count} ({by}) on {self.cores} physical cores, {nodes}, {used}"


def choose_threads() -> Threads:
    """At most one thread a physical core of this process's share; what the user has set, fewer included, stays.

    Hardware threads of one core share its arithmetic: more threads than cores make matrix products slower.
    ``LOCAL_WORLD_SIZE``, as torchrun and accelerate set it, is the number of processes on this machine.
    """
    cores = _cores()
    given = next((name for name in CHOICES if os.environ.get(name)), None)
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if given is None and torch.get_num_threads() > share:
        torch.set_num_threads(share)
    nodes = len(list(SYSTEM.glob("devices/system/node/node[0-9]*")))
    products = "oneDNN" if onednn_is_faster() else "PyTorch's choice"
    return Threads(torch.get_num_threads(), cores, max(1, nodes), given, _malloc(), products)


def _cores() -> int:
    """Those that the scheduler may use, and no more than the control group's share of time pays for."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found = set()
    for cpu in allowed:
        place = SYSTEM / f"devices/system/cpu/cpu{cpu}/topology"
        try:
            found.add(((place / "physical_package_id").read_text(), (place / "core_id").read_text()))
        except OSError:  # not told: every one counts
            found.add((str(cpu), ""))
    quota = SYSTEM / "fs/cgroup/cpu.max"
    if quota.is_file():
        time, period = quota.read_text().split()
        if time != "max":
            return max(1, min(len(found), int(time) // int(period)))
    return len(found)


def _malloc() -> str:
    """The allocator whose library is loaded into this process before the system's own."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        loaded = ""
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if f"lib{name}" in loaded:
            return name
    return platform.libc_ver()[0] or "the system"
