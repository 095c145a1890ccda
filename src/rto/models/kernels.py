"""How a model computes: kernels of other libraries, ways of attention, and activations that wait in main memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

from rto import config as recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_device(
    model: recipe.Pretrained | recipe.Packaged | recipe.Scratch, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises ValueError for a key of [model] that this device cannot obey. ``dtype`` is the precision of passes."""
    if device.type == "cuda":
        if model.attention == "flash_attention_2" and dtype == torch.float32:
            raise ValueError(
                "model.attention = 'flash_attention_2' has no float32, in which this run computes: set model.dtype to "
                "'bfloat16' on a GPU that has it, or model.attention to 'sdpa'"
            )
        return
    if model.attention == "flash_attention_2":
        raise ValueError(
            f"model.attention = 'flash_attention_2' runs on GPUs, and this run is on {device.type}: set it to 'sdpa'"
        )
    if model.kernels == "liger":
        raise ValueError(
            f"model.kernels = 'liger': these kernels are for GPUs, and this run is on {device.type}: leave it out"
        )
    if model.offload_activations:
        raise ValueError(
            f"model.offload_activations = true moves activations of a GPU into main memory, and this run is on "
            f"{device.type}: set it to false"
        )


def use_liger(network: PreTrainedModel) -> None:
    """Put Liger's norms, rotary positions and gated layers into a network. Its losses stay out: log-probs are made in
    :mod:`rto.numerics`. The rotary positions are the whole family's, in every model of this process.

    Raises:
        ValueError: the library is not installed, or does not know the family.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # the way of transformers' Trainer
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model.kernels = 'liger': {error.name} is not installed: pip install rto-rlhf[gpu], or leave it out"
        ) from None
    family = network.config.model_type
    if family not in KNOWN:
        raise ValueError(f"model.kernels = 'liger': Liger knows no kernels for the family {family}: leave it out")
    _apply_liger_kernel_to_instance(model=network, cross_entropy=False, fused_linear_cross_entropy=False)


def share_keys() -> None:
    """Let keys and values that several heads read be kept once, in a process whose networks are on a CPU.

    Where there is a mask, transformers repeats them for every head, as PyTorch's kernels on GPUs ask for. That on CPUs
    does not, from some version on. A user's own ``TRANSFORMERS_SDPA_FORCE_GQA`` stays.
    """
    if _shares_keys():
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


@torch.enable_grad()
def _shares_keys() -> bool:
    """Tried: where the kernel does not take them, PyTorch's attention is made of plain operations, which is slow."""
    query, key = torch.zeros(1, 2, 1, 8, requires_grad=True), torch.zeros(1, 1, 1, 8)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    out = scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
    return "FlashAttentionForCpu" in type(out.grad_fn).__name__


@contextlib.contextmanager
def attending(network: PreTrainedModel, way: str) -> Iterator[None]:
    """Passes inside compute attention in this way, a name of transformers'."""
    parts = {key: getattr(network.config, key, None) for key in network.config.sub_configs}
    before = {"": network.config._attn_implementation}
    before |= {key: part._attn_implementation for key, part in parts.items() if part is not None}
    network.set_attn_implementation(way)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def attending_to_cache(network: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """For steps of sampling. Where prompts differ in length, transformers takes the padding out of all keys and values
    for flash attention, in every layer at every token; PyTorch's own attention reads them where they are."""
    flash = network.config.get_text_config()._attn_implementation.startswith("flash")
    return attending(network, "sdpa") if flash and network._supports_sdpa else contextlib.nullcontext()


class Offloaded(saved_tensors_hooks):
    """What the passes inside keep for their gradients waits in main memory. Weights stay where they are."""

    def __init__(self, network: nn.Module) -> None:
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        away = save_on_cpu(pin_memory=True)

        def pack(kept: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            return kept if kept.untyped_storage()._cdata in weights else away.pack_hook(kept)

        def unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
            return kept if isinstance(kept, Tensor) else away.unpack_hook(kept)

        super().__init__(pack, unpack)
