"""Roles on disk: what the ecosystem loads, and nothing but safetensors.

A full policy is a ``save_pretrained`` causal LM, a full scorer a ``...ForSequenceClassification`` with one
label; with LoRA either is a PEFT adapter folder. A scorer's folder also has ``scorer.json``: the mean and
standard deviation that normalise its scores, and its accuracy.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rto.models.load import refuse_pickles
from rto.models.role import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREFIX = "base_model.model."
_HEAD = f"{_PREFIX}score.weight"
# PEFT's settings that make another model of the same weights (DoRA, biases and the like show in the weights' names),
# and its initialisations that leave the base model as it was.
_VARIANTS = ("use_rslora", "rank_pattern", "alpha_pattern", "alora_invocation_tokens")
_INITIALISATIONS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class ScorerNotes:
    """(score - mean) / std makes scores of the evaluation pairs zero-mean and unit-variance (std unbiased).

    ``cutoff`` is the entropy at which its training cut segments; None: it was read at the last token.
    """

    mean: float
    std: float
    accuracy: float
    pairs: int
    cutoff: float | None = None


def save_role(role: Role, folder: Path, tokenizer: PreTrainedTokenizerBase, pad: int) -> None:
    """Write a role and its tokenizer to ``folder``.

    ``pad`` is the padding id that others will use. Plain transformers reads a scorer at the last token that is
    not padding, so there it must differ from end-of-sequence. An adapter has no place for it: PEFT takes it from
    the base model's config.

    Raises:
        OSError: the disk is full or does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_role(role, folder, pad)
    except SafetensorError as error:  # which is no OSError
        number = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        said = f"{os.strerror(number)}: the model could not be written to {folder} ({error})"
        raise OSError(number, f"{said}. See to the disk, then give the same command again") from error
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(folder)


def _write_role(role: Role, folder: Path, pad: int) -> None:
    if role.adapter is None:
        role.backbone.network.config.pad_token_id = pad
        role.backbone.network.save_pretrained(folder)
    else:
        task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        if role.head is not None:
            task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        weights = {key: p.detach().cpu().contiguous() for key, p in _stored(role).items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        role.backbone.adapter_config(inference_mode=True, **task).save_pretrained(folder)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").exists()


def read_adapter(role: Role, folder: Path) -> None:
    """Fill a role's adapter, and its head if it has one, from a folder.

    Raises:
        ValueError: the folder holds another kind or shape of adapter, or no head for a role that has one.
    """
    refuse_pickles(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    _refuse_variants(settings, folder / "adapter_config.json")
    stored, own = load_file(folder / "adapter_model.safetensors"), _stored(role)
    if role.head is not None and _HEAD not in stored:
        raise ValueError(
            f"{folder} holds a policy's adapter: a scorer needs one with a head, which `rto reward` trains"
        )
    lora = role.backbone.lora
    assert lora is not None
    have, want = (settings["r"], settings["lora_alpha"]), (lora.r, lora.alpha)
    if have != want:
        raise ValueError(
            f"the adapter in {folder} has r = {have[0]}, alpha = {have[1]} and [model.lora] r = {want[0]}, "
            f"alpha = {want[1]}: give both the same"
        )
    if odd := [key for key in sorted(own.keys() | stored.keys()) if _shape(own, key) != _shape(stored, key)]:
        raise ValueError(
            f"the adapter in {folder} does not fit: {odd[0]} is {_shape(stored, odd[0])} there and "
            f"{_shape(own, odd[0])} here. It was made with other lora.targets, or for another model"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(stored[key])


def _refuse_variants(settings: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for an adapter that is not W + alpha / r B A on the base model as it is."""
    odd = [key for key in _VARIANTS if settings.get(key)]
    if settings.get("peft_type", "LORA") != "LORA":
        odd.insert(0, "peft_type")
    if str(settings.get("init_lora_weights", True)).lower() not in _INITIALISATIONS:
        odd.append("init_lora_weights")
    if odd:
        raise ValueError(
            f"{path}: {odd[0]} = {settings[odd[0]]!r} makes another model than plain LoRA, which is all that is read "
            "here. Merge the adapter into its base model with peft's merge_and_unload, and name that folder"
        )


def _stored(role: Role) -> dict[str, torch.Tensor]:
    """What an adapter folder holds, under PEFT's names."""
    assert role.adapter is not None
    weights: dict[str, torch.Tensor] = {
        _PREFIX + key: p for key, p in role.backbone.adapter_parameters(role.adapter).items()
    }
    if role.head is not None:
        weights[_HEAD] = role.head.weight
    return weights


def _shape(weights: Mapping[str, torch.Tensor], key: str) -> list[int] | str:
    return list(weights[key].shape) if key in weights else "missing"


def merged(role: Role) -> Role:
    """The role as a full model: its adapter is folded into the weights, and every adapter is gone."""
    assert role.adapter is not None
    role.backbone.merge_adapter(role.adapter)
    return Role(role.backbone)


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


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over a folder's safetensors files: the identity of a model.

    Raises:
        ValueError: there are none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file to take a fingerprint of; give a folder, not a hub name")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(2**22):
                digest.update(block)
    return digest.hexdigest()
