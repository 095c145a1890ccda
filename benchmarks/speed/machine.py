"""The machine: how fast it multiplies matrices, and the settings that every process of a benchmark gets."""

from __future__ import annotations

import os
import platform
import time

MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"}
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},  # as installed; rto calls mallopt for itself, see rto.models.runtime
    "tuned": MALLOC,  # large blocks are kept and not given back to the system: both sides
}


def environment(threads: int, variant: str) -> dict[str, str]:
    """Of one measured process. No network, no leftovers of the caller's own tuning."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    fixed = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | fixed | VARIANTS[variant]


def use_threads(count: int) -> None:
    """In this process: as many as the user asks for, also where rto would choose fewer."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def gemm_peak(threads: int, seconds: float = 2.0) -> float:
    """Floating-point operations a second of the best float32 matrix product, over sizes that a small model has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (2048, 576, 1536), (1024, 1024, 4096)):
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        until = time.perf_counter() + seconds / 3
        while time.perf_counter() < until:
            begun = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - begun))
    torch.set_num_threads(before)
    return best


def described(threads: int) -> str:
    """One line for the head of a table."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return (
        f"{name}, {threads} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, {' '.join(platform.libc_ver())}"
    )
