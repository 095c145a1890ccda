"""The reference's log-probs of whole answers, kept between epochs and runs, and found again by content."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rto.models.role import Role
from rto.models.runtime import Runtime


class ReferenceCache:
    """Summed log-probs by sha256 of (``fingerprint``, prompt ids, answer ids), in one safetensors file.

    ``fingerprint`` names the reference (see :func:`fingerprint`); where the reference moves, set it anew. What another
    reference said may lie in the same file and is never found. Every process has one; after :meth:`share` all know the
    same, whichever process meets an answer next.

    Raises:
        ValueError: the file is there and is no such cache.
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        self.known: dict[bytes, float] = {}
        self.added: dict[bytes, float] = {}  # since they were shared
        if self.path.exists():
            try:
                stored = load_file(self.path)
                keys, values = stored["keys"], stored["values"]
            except (SafetensorError, OSError, KeyError) as error:
                raise ValueError(f"{self.path} is no cache of reference log-probs ({error}): delete it") from error
            named = (row.tobytes() for row in keys.numpy())
            self.known = dict(zip(named, values.tolist(), strict=True))

    def knows(self, answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
        """Every (prompt, answer)."""
        return all(self._key(*ids) in self.known for ids in answers)

    def sums(
        self, answers: Sequence[tuple[Sequence[int], Sequence[int]]], compute: Callable[[], Tensor]
    ) -> Float[Tensor, " N"]:
        """The log-prob of each (prompt, answer). ``compute`` gives all of them, and is called if any is unknown."""
        keys = [self._key(*ids) for ids in answers]
        if not all(key in self.known for key in keys):
            read = dict(zip(keys, compute().tolist(), strict=True))
            self.known.update(read)
            self.added.update(read)
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float32)

    def share(self, runtime: Runtime) -> None:
        """Give every process what the others added. To be called by all of them at the same place."""
        for part in runtime.gather_all(self.added):
            self.known.update(part)
        self.added = {}

    def save(self, runtime: Runtime) -> None:
        """Write what all processes know: all of it or nothing."""
        self.share(runtime)
        if runtime.main and self.known:
            keys = torch.frombuffer(bytearray(b"".join(self.known)), dtype=torch.uint8).reshape(-1, 32)
            partial = self.path.with_suffix(".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            save_file({"keys": keys, "values": torch.tensor(list(self.known.values()))}, partial)
            os.replace(partial, self.path)
        runtime.wait()

    def _key(self, prompt: Sequence[int], answer: Sequence[int]) -> bytes:
        """The lengths stand in front, so that no prompt can run over into an answer."""
        ids = array("q", [len(prompt), len(answer), *prompt, *answer])
        return hashlib.sha256(self.fingerprint.encode() + b"\0" + ids.tobytes()).digest()


@torch.no_grad()
def fingerprint(role: Role) -> str:
    """sha256 of everything that a role's log-probs depend on: its config, its precision and all of its weights."""
    backbone, found = role.backbone, hashlib.sha256()
    scale = backbone.lora if role.adapter is not None else None
    found.update(f"{backbone.network.config.to_json_string()} {backbone.compute} {scale}".encode())
    weights = {
        name.replace(".base_layer.", "."): p for name, p in backbone.network.named_parameters() if ".lora_" not in name
    }
    if role.adapter is not None:
        weights |= {f"adapter {name}": p for name, p in backbone.adapter_parameters(role.adapter).items()}
    for name in sorted(weights):
        values = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        found.update(values.view(torch.uint8).numpy().tobytes() if values.dim() else str(values.item()).encode())
    return found.hexdigest()
