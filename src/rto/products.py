"""Matrix products in float32 on a CPU, by whichever of PyTorch's two libraries uses all of the processor.

PyTorch asks MKL, which has AVX-512 code for Intel's processors only: on others it takes AVX2, half of their width.
oneDNN, which PyTorch carries too, asks the processor. On two cores of an EPYC (Zen 5) products of a small model's
sizes run at 200 to 220 GFLOP/s with the one and at 370 to 510 with the other. Rounding errors of a product are two to
three times MKL's, those of a whole model's log-probs and gradients 1.2 to 1.6 times.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

KERNELS = 64  # of oneDNN that are kept
MULTIPLICATIONS = 2**22  # of a product: oneDNN's kernels cost 10 microseconds to call, which fewer do not pay for
COPIED = 192  # columns of a product whose left matrix has to be copied: fewer do not pay for that
SHARE, ROWS = 2**20, 1024  # numbers of a product that stand beside the sum they are added to, and no fewer rows
PROCESSOR = Path("/proc/cpuinfo")


def product(
    left: Float[Tensor, "*rows K"], right: Float[Tensor, "M K"], bias: Float[Tensor, " M"] | None = None
) -> Float[Tensor, "*rows M"]:
    """left @ right.T (+ bias), without a gradient of its own. ``right`` may be the transposed view of a matrix, which
    costs nothing; a ``left`` that is one is copied."""
    if by_onednn(left, right):
        return torch.ops.mkldnn._linear_pointwise.default(left, right, bias, "none", [], "")
    return torch.nn.functional.linear(left, right, bias)


def add_product(
    total: Float[Tensor, "N M"], left: Float[Tensor, "N K"], right: Float[Tensor, "M K"], fresh: bool
) -> None:
    """Add left @ right.T to ``total`` where it stands. ``fresh``: it has any numbers in it, and is written over."""
    if total.dtype == left.dtype and not by_onednn(left, right):
        total.addmm_(left, right.T, beta=0 if fresh else 1)  # beta 0 reads nothing
        return
    rows = max(ROWS, SHARE // len(right))
    for start in range(0, len(total), rows):
        share, part = total[start : start + rows], product(left[start : start + rows], right)
        share.copy_(part) if fresh else share.add_(part)


def by_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies these faster."""
    if left.dtype != torch.float32 or right.dtype != torch.float32 or left.device.type != "cpu":
        return False
    if left.numel() * len(right) < MULTIPLICATIONS or (len(right) < COPIED and not left.is_contiguous()):
        return False
    return onednn_is_faster()


@functools.cache
def onednn_is_faster() -> bool:
    """On a processor with AVX-512 that is not Intel's. ``ATEN_CPU_CAPABILITY=avx2`` in the environment says no."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and torch.backends.cpu.get_cpu_capability() == "AVX512" and _maker() not in ("", "GenuineIntel")


def bound_kernels() -> None:
    """Let 64 kernels of oneDNN be kept, to be called before its first product; a user's own numbers stay.

    It makes one for every shape, in half a millisecond, of up to 3 MB. Two caches keep 1,024 each: gigabytes, where
    rows have all lengths. A pass through a model needs some 30, in every layer again.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def _maker() -> str:
    if not PROCESSOR.is_file():
        return ""
    lines = (line.partition(":") for line in PROCESSOR.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")
