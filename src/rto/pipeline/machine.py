"""What the machine has: memory, disk, and what a process holds before it holds a model."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import torch

from rto.batch import Completions, Prompts
from rto.config import Lora, Scratch, Sft
from rto.data.worlds import world_tokenizer
from rto.models.load import scratch_network
from rto.models.role import Backbone, Role
from rto.models.runtime import Runtime
from rto.optim import Optimizer
from rto.rollouts.generate import generate

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup 2, cgroup 1


def resident() -> int:
    """Bytes of memory that this process holds now (where the system does not say: that it ever held)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory(device: torch.device) -> int:
    """Bytes that a process may hold: of the GPU, or of main memory and of the control group's limit the smaller."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _LIMITS:
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            found.append(int(text))
    return min(found)


def disk(folder: Path) -> int:
    """Free bytes where ``folder`` is, or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def warm_up(lora: bool, runtime: Runtime) -> None:
    """A real step and a real answer of a toy model: after it, the process has imported and touched of Python, PyTorch
    and transformers what every training run does."""
    tokenizer = world_tokenizer()
    toy = Scratch(type="scratch", hidden=16, layers=1, heads=2, intermediate=16)
    network = scratch_network(toy, tokenizer, 1, 0).to(runtime.device)  # type: ignore[arg-type]
    backbone = Backbone(network, "", Lora(r=1) if lora else None, torch.float32)
    if lora:
        backbone.add_adapter("toy")
    role = Role(backbone, "toy" if lora else None)
    ids = torch.ones(2, 4, dtype=torch.long, device=runtime.device)
    answers = Completions(Prompts(ids, ids.bool()), ids, ids.bool(), ids[:, 0].bool())
    optimizer = Optimizer(role.parameters(), Sft(), 1e-3, 1)
    role.logprobs(answers)[0].sum().backward()
    optimizer.step()
    generate(role, [[3, 4]], [("toy",)], seed=0, limit=2, end=1, pad=0)
