"""Norms and gated layers of Llama's kind as one operation each, on a CPU: fewer new tensors are written to.

They keep their inputs only, and their outputs need not be kept (:mod:`rto.models.kept`). On GPUs Liger's kernels do
this.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from rto.models.kept import make_again

EXACT = 1e-5  # of the largest number, in float32


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps)."""
    return (x * _inverse(x, eps)).mul_(weight)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return silu(gate).mul_(up)


def _inverse(x: Tensor, eps: float) -> Tensor:
    # Not from vector_norm, whose sum is three times less exact
    return torch.linalg.vecdot(x, x).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return normalised(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        inverse = _inverse(x, ctx.eps)
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (x * inverse).mul_(gradient).flatten(0, -2).sum(0)
        scaled = gradient * weight
        share = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(inverse**3).div_(x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x, share, value=-1), for_weight, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        for_up = silu(gate).mul_(gradient)
        return torch.ops.aten.silu_backward(gradient * up, gate), for_up


class FusedNorm:
    """Mixed into a norm's class. In other precisions than float32 that class does its own work."""

    weight: nn.Parameter
    eps_: float

    def forward(self, x: Tensor) -> Tensor:
        if not _plain(x, self.weight):
            return super().forward(x)  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return normalised(x, self.weight, self.eps_)
        out = _Normalised.apply(x, self.weight, self.eps_)
        make_again(out, (x, self.weight), functools.partial(normalised, eps=self.eps_))
        return out


class FusedGate:
    """Mixed into the class of a layer down(silu(gate(x)) * up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        here: Any = self
        gate, up = here.gate_proj(x), here.up_proj(x)
        if not _plain(gate, up):
            return here.down_proj(here.act_fn(gate) * up)
        if not torch.is_grad_enabled():
            return here.down_proj(silu(gate, inplace=True).mul_(up))
        out = _Gated.apply(gate, up)
        make_again(out, (gate, up), gated)
        return here.down_proj(out)


def fuse(network: nn.Module) -> None:
    """Change the norms and gated layers of ``network`` that are what they look like: tried on a few numbers."""
    module: Any
    for module in network.modules():
        kind: Any = type(module)
        if issubclass(kind, FusedNorm | FusedGate):
            continue
        if "RMSNorm" in kind.__name__ and isinstance(getattr(module, "weight", None), nn.Parameter):
            if len(inspect.signature(kind.forward).parameters) != 2:  # itself and x: one that takes a gate besides
                continue
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if isinstance(eps, float) and _norms(module, eps):
                module.eps_ = eps
                module.__class__ = _mixed(FusedNorm, kind)
        elif kind.__name__.endswith("MLP") and _gates(module):
            module.__class__ = _mixed(FusedGate, kind)


@functools.cache
def _mixed(mixin: type, kind: type) -> type:
    return type(f"Fused{kind.__name__}", (mixin, kind), {})


def _plain(*tensors: Tensor) -> bool:
    alike = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return alike and not torch.is_autocast_enabled("cpu")


def _probe(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _norms(module: nn.Module, eps: float) -> bool:
    twin: Any = copy.copy(module)
    twin._parameters = {"weight": nn.Parameter(_probe(8))}
    x = _probe(3, 8)
    return _close(lambda: twin(x), normalised(x, twin.weight, eps))


@torch.no_grad()
def _gates(module: nn.Module) -> bool:
    if set(module._modules) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or module._parameters:
        return False
    twin: Any = copy.copy(module)
    with torch.random.fork_rng(devices=[]):  # nobody else's random numbers change
        gate, up, down = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(5, 8)
    twin._modules = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": module.act_fn}
    x = _probe(3, 8)
    return _close(lambda: twin(x), down(gated(gate(x), up(x))))


def _close(said: Callable[[], Tensor], ours: Tensor) -> bool:
    try:
        gap = (said() - ours).abs().max()
    except (RuntimeError, TypeError, AttributeError):  # it wants to be called otherwise
        return False
    return bool(gap < EXACT * ours.abs().max())
