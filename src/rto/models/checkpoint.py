"""Roles on disk: what the ecosystem loads, and nothing but safetensors.

A full policy is a ``save_pretrained`` causal LM, a full scorer a ``...ForSequenceClassification`` with one
label; with LoRA either is a PEFT adapter folder. A scorer's folder also has ``scorer.json``: the mean and
standard deviation that normalise its scores, and its accuracy.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rto.models.role import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREFIX = "base_model.model."
_HEAD = f"{_PREFIX}score.weight"


@dataclass(frozen=True)
class ScorerNotes:
    """(score - mean) / std makes scores of the evaluation pairs zero-mean and unit-variance (std unbiased)."""

    mean: float
    std: float
    accuracy: float
    pairs: int


def save_role(role: Role, folder: Path, tokenizer: PreTrainedTokenizerBase, pad: int) -> None:
    """Write a role to ``folder``. ``pad`` goes into a scorer's config: plain transformers reads the score at
    the last token that is not the padding token, so padding must differ from end-of-sequence there."""
    folder.mkdir(parents=True, exist_ok=True)
    if role.adapter is None:
        role.backbone.network.config.pad_token_id = pad
        role.backbone.network.save_pretrained(folder)
    else:
        weights = {
            _PREFIX + key.replace(f".{role.adapter}.", "."): p.detach().cpu().contiguous()
            for key, p in role.backbone.adapter_parameters(role.adapter)
        }
        task = {"task_type": "CAUSAL_LM"}
        if role.head is not None:
            weights[_HEAD] = role.head.weight.detach().cpu().contiguous()
            task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = role.backbone.adapter_config(inference_mode=True, **task)
        settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").exists()


def read_adapter(role: Role, folder: Path) -> None:
    """Fill a role's adapter, and its head if it has one, from a folder.

    Raises:
        ValueError: the folder holds another shape of adapter, or no head for a role that has one.
    """
    assert role.adapter is not None
    stored = load_file(folder / "adapter_model.safetensors")
    own = {
        _PREFIX + key.replace(f".{role.adapter}.", "."): p for key, p in role.backbone.adapter_parameters(role.adapter)
    }
    if role.head is not None and _HEAD in stored:
        own[_HEAD] = role.head.weight
    if set(own) != set(stored) or any(own[key].shape != stored[key].shape for key in own):
        odd = sorted(set(own) ^ set(stored)) or [key for key in own if own[key].shape != stored[key].shape]
        raise ValueError(f"the adapter in {folder} does not fit [model.lora] ({odd[0]}): use the lora settings it has")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(stored[key])


def merged(role: Role) -> nn.Module:
    """The role's network with its adapter folded into the weights and every adapter removed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = role.backbone.network
    role.backbone.activate(role.adapter)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=[role.adapter])  # type: ignore[call-arg]
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    return network


def save_notes(folder: Path, notes: ScorerNotes) -> None:
    (folder / "scorer.json").write_text(json.dumps(asdict(notes), indent=1) + "\n")


def read_notes(folder: str | Path) -> ScorerNotes:
    """Raises:
    ValueError: the folder has no normaliser; a missing one is never taken as (0, 1).
    """
    path = Path(folder) / "scorer.json"
    if not path.exists():
        raise ValueError(
            f"{path} is missing: a scorer needs its mean and std to be normalised. Train it with `rto reward`, "
            "or set reward.normalize = false"
        )
    return ScorerNotes(**json.loads(path.read_text()))
