"""The machine: device, precision, processes. The only module that imports accelerate.

Data parallelism without wrappers: every process holds the whole model, computes its share of a *global*
loss (numerics.reduce divides by global counts), and :meth:`Runtime.sum_gradients` adds the shares up. So two
processes with half the batch each give the gradient of one process with all of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn

from rto.models.kernels import share_keys
from rto.models.threads import choose_threads
from rto.room import Room

# One process alone writes and reads back a checkpoint while the others wait: NCCL's own limit is 10 minutes
PATIENCE = timedelta(hours=4)
MESSAGE = 2**26  # numbers of gradients that are sent at once, beside which a copy of them stands


class Runtime:
    """One a process. ``device`` is "auto", "cpu" or "cuda"."""

    def __init__(self, device: str = "auto", trackers: Iterable[str] = (), folder: str | None = None) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda', but this machine has no usable GPU: use device = 'auto' or 'cpu'")
        self._trackers = list(trackers)
        self._drawn: set[str] = set()  # what wandb knows the x axis of
        _check_trackers(self._trackers)
        cpu = device == "cpu" or not torch.cuda.is_available()
        _check_processes(cpu)
        _keep_freed_memory()
        self.threads = choose_threads()
        waiting = InitProcessGroupKwargs(timeout=PATIENCE)
        self.accelerator = Accelerator(
            cpu=cpu, log_with=self._trackers or None, project_dir=folder, kwargs_handlers=[waiting]
        )
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            share_keys()
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.main = self.accelerator.is_main_process

    def dtype(self, name: str) -> torch.dtype:
        """``auto`` is bfloat16 on a GPU that has it and float32 elsewhere (CPUs emulate bfloat16 slowly)."""
        if name == "auto":
            cuda = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if cuda else torch.float32
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]

    def share(self, items: list[Any]) -> list[Any]:
        """This process's part of a list: every world-th item."""
        return items[self.rank :: self.world]

    def gather_all(self, item: Any) -> list[Any]:
        """One item of every process, by rank."""
        return gather_object([item]) if self.world > 1 else [item]

    def gather_rows(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors whose rows were cut by :meth:`share`, whole again. Their widths must agree."""
        if self.world == 1:
            return parts
        everybody = self.gather_all(parts)
        whole = {}
        for name in parts:
            pieces = [part[name] for part in everybody]
            joined = pieces[0].new_empty((sum(map(len, pieces)), *pieces[0].shape[1:]))
            for rank, piece in enumerate(pieces):
                joined[rank :: self.world] = piece
            whole[name] = joined
        return whole

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each value summed over the processes; a process that lacks a key adds nothing to it."""
        total: dict[str, float] = {}
        for part in self.gather_all(values):
            for key, value in part.items():
                total[key] = total.get(key, 0.0) + value
        return total

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the processes' gradients in a few messages; a parameter without a gradient counts as zero."""
        if self.world == 1:
            return
        parameters = list(parameters)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        for some in _messages(grads):
            flat = torch.cat([g.flatten() for g in some]) if len(some) > 1 else some[0].flatten()
            torch.distributed.all_reduce(flat)
            for g, part in zip(some, flat.split([g.numel() for g in some]), strict=True):
                g.copy_(part.view_as(g))

    def wait(self) -> None:
        if self.world > 1:  # accelerate's own would name a GPU, also where the processes compute on the CPU
            torch.distributed.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def start_trackers(self, name: str, config: dict[str, Any]) -> None:
        if self._trackers:
            self.accelerator.init_trackers(name, dict(_flat(config)))

    def track(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One row of a stage. wandb drops a row whose step is below the last one's, and every stage begins at 1: there
        the rows are counted, and ``STAGE/step`` is the x axis of the stage."""
        axis, row = f"{stage}/step", {f"{stage}/{key}": value for key, value in values.items()}
        for tracker in self.accelerator.trackers:  # of the main process only
            if tracker.name != "wandb":
                tracker.log(row, step=step)
                continue
            for key in sorted(row.keys() - self._drawn):  # not STAGE/*, which would take in prefer/NAME with prefer
                tracker.tracker.define_metric(key, step_metric=axis)
            self._drawn |= row.keys()
            tracker.log(row | {axis: step})

    def peak_memory_mb(self) -> float:
        """The largest memory this process has held so far, in MB of 2^20 bytes: on a GPU that of its tensors there."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def close(self) -> None:
        if self._trackers:
            self.accelerator.end_training()


def _messages(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, no more than MESSAGE numbers each; a larger gradient goes alone."""
    some: list[Tensor] = []
    count = 0
    for grad in grads:
        if some and count + grad.numel() > MESSAGE:
            yield some
            some, count = [], 0
        some.append(grad)
        count += grad.numel()
    if some:
        yield some


def _check_processes(cpu: bool) -> None:
    if cpu:
        return
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.cuda.device_count()
    own = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # each process may see another one
    if here > gpus and not own:
        raise ValueError(
            f"{here} processes on a machine with {gpus} GPUs: each needs one of its own. Start "
            "fewer (--nproc_per_node), or compute on the CPU (--device cpu)"
        )


def _check_trackers(names: list[str]) -> None:
    """accelerate leaves a tracker that is not installed out, and says so in debug messages only."""
    usable = set(map(str, get_available_trackers()))
    if missing := [name for name in names if name not in usable]:
        raise ValueError(
            f"trackers: {missing[0]!r} is not installed: pip install {missing[0]}, or take it out of the list"
        )


def _flat(config: dict[str, Any], lead: str = "") -> Iterator[tuple[str, str | int | float]]:
    """Dotted keys with values that every tracker takes: numbers, truths and text; all else as JSON."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{lead}{key}.")
        else:
            yield lead + key, value if isinstance(value, (str, int, float)) else json.dumps(value)


def leave_group() -> None:
    """At the end of a process: part from the others while Python is whole. Otherwise gloo's threads, which may still
    hold a tensor, want Python's lock when it is gone, and the process that did all its work ends with SIGABRT."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


MAPPED = 2**25  # bytes from which a block is the system's own and goes back to it when it is freed


def _keep_freed_memory() -> None:
    """Let glibc reuse freed blocks below ``MAPPED``. By default it gives those of a few MB back to the system, which
    clears every page anew at the next use. Larger ones would make holes in the heap: a tenth of the memory and more,
    another amount in every run."""
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1  # the numbers of malloc.h
        libc.mallopt(mmap_threshold, MAPPED)
        libc.mallopt(trim_threshold, -1)  # never


SPARE = 2**28  # bytes that are kept for the next phase; more go back to the system


class Heap(ctypes.Structure):
    """glibc's mallinfo2, in bytes."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    @property
    def size(self) -> int:
        return int(self.field0)

    @property
    def free(self) -> int:
        return int(self.field8)


def ask_heap() -> Heap | None:
    """None where the C library is another one, or too old to tell."""
    if platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        return None
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Heap
    return ask()


def release_memory() -> None:
    """Between phases that hold different things: what is free after the one goes back to the system, if it is much."""
    heap = ask_heap()
    if sum(map(len, Room.idle)) + (heap.free if heap is not None else 0) < SPARE:
        return
    Room.idle.clear()
    if heap is not None:
        ctypes.CDLL(None).malloc_trim(0)
