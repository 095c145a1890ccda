"""The machine: how fast it multiplies matrices, and the settings that every process of a benchmark gets."""

from __future__ import annotations

import os
import platform
import time
from functools import partial

MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"}
# Of a peer. On a CPU its malloc: as installed, or such that large blocks are kept and not given back to the system (rto
# calls mallopt for itself, see rto.models.runtime). On a GPU gradient checkpointing: on, as TRL's trainers have it, or
# off.
SETUPS = ("default", "tuned")
PEAK_SIZES = {  # rows, inner size and columns of matrix products: as a small model has them, and as keep a GPU busy
    "cpu": ((2048, 2048, 2048), (2048, 576, 1536), (1024, 1024, 4096)),
    "cuda": ((8192, 8192, 8192), (16384, 4096, 4096)),
}


def environment(threads: int, setup: str = "default", device: str = "cpu") -> dict[str, str]:
    """Of one measured process. No network, no leftovers of the caller's own tuning."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    fixed = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cuda":  # of several GPUs one: TRL's trainers refuse more in one process
        return kept | fixed | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    return kept | fixed | (MALLOC if setup == "tuned" else {})


def use_threads(count: int) -> None:
    """In this process: as many as the user asks for, also where rto would choose fewer."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def wait(device: str) -> None:
    """Until a GPU has done what it was told to do."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def gemm_peak(threads: int, seconds: float = 2.0, device: str = "cpu", dtype: str = "float32") -> float:
    """Floating-point operations a second of the best matrix product of some sizes: on a CPU of either library that
    PyTorch has, whichever its own products ask."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = 0.0
    sizes, kind = PEAK_SIZES[device], {"device": device, "dtype": getattr(torch, dtype)}
    for rows, inner, columns in sizes:
        a, b = torch.randn(rows, inner, **kind), torch.randn(inner, columns, **kind)
        wait(device)
        ways = [partial(torch.mm, a, b)]
        if device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
            ways.append(partial(torch.ops.mkldnn._linear_pointwise.default, a, b.T, None, "none", [], ""))
        for way in ways:
            until = time.perf_counter() + seconds / len(sizes) / len(ways)
            while time.perf_counter() < until:
                begun = time.perf_counter()
                way()
                wait(device)
                best = max(best, 2 * rows * inner * columns / (time.perf_counter() - begun))
    torch.set_num_threads(before)
    if device == "cuda":
        del a, b, ways
        torch.cuda.empty_cache()  # the sides share the GPU with this process
    return best


def described(threads: int, device: str = "cpu") -> str:
    """One line for the head of a table."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    if device == "cuda":
        import torch

        name = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), {name}"
    return (
        f"{name}, {threads} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, {' '.join(platform.libc_ver())}"
    )
