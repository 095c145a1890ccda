"""Checkpoints on disk: whole or not there, checked before an older one goes, and read back only when undamaged.

One checkpoint is a folder ``step-00000012``: ``tensors.safetensors``, ``state.json`` and ``manifest.json`` with the
sizes and SHA-256 of the other two. It is written beside its place under a name that starts with ``.tmp-``, flushed
to the disk, read back against the checksums and only then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_PARTIAL, _OLD = ".tmp-", ".old-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk full, over quota, over the limit of a file's size
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a stage was after ``step`` steps: tensors on the CPU by name, and everything else as JSON values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Store:
    """The checkpoints of one stage, the newest ``keep`` of them. One process at a time may use it: see ``RunLock``.

    ``say`` gets one line for each checkpoint that is skipped or given up; default: a warning in the log.
    """

    def __init__(self, folder: Path, keep: int = 2, say: Callable[[str], None] | None = None) -> None:
        """Touches nothing yet. ValueError if ``keep`` is below 1."""
        if keep < 1:
            raise ValueError(f"{folder}: keep = {keep} would leave no checkpoint: give 1 or more")
        self.folder, self.keep, self.say = Path(folder), keep, say or logger.warning
        self._skipped: list[Path] = []  # by load

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint. When this returns it is on the disk and was read back; then older ones go.

        Tensors of any device; one at a time is copied to the CPU. Views and tensors that share memory are each written
        in full. Checkpoints of later steps belong to a course that was given up, so they go too.

        Raises:
            ValueError: a tensor's type has no place in the file, or ``state`` would not come back from JSON as it is.
            OSError: no room, or another fault of the disk. Nothing is left of this one, the others are intact.
        """
        assert step >= 0
        _plain(state, "state")
        header = _header(tensors)
        text = json.dumps(state, allow_nan=False).encode()
        _make(self.folder)
        self._tidy()
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / (_PARTIAL + final.name)
        try:
            temporary.mkdir()
            files = {
                TENSORS: _write(temporary / TENSORS, _blocks(header, tensors)),
                STATE: _write(temporary / STATE, [text]),
            }
            _write(temporary / MANIFEST, [json.dumps({"step": step, "files": files}, indent=1).encode()])
            _flush(temporary)
            try:
                _verify(temporary, step)
            except ValueError as error:
                raise OSError(errno.EIO, f"the disk does not give back what was written: {error}", temporary) from error
            self._place(temporary, final)
        except BaseException as error:
            self._tidy()
            if isinstance(error, OSError) and error.errno in _FULL:
                needed = len(header) + len(text) + sum(t.numel() * t.element_size() for t in tensors.values())
                raise OSError(error.errno, self._full(step, needed, os.strerror(error.errno))) from error
            raise
        self._prune(step)

    def load(self, tidy: bool = True) -> Checkpoint | None:
        """The newest good checkpoint; None if there is none at all. Each damaged one on the way is named to ``say``.

        ``tidy`` removes what a killed write left: for the main process alone, which loads before the others do.

        Raises:
            ValueError: there are checkpoints, and all of them are damaged.
        """
        if tidy:
            self._tidy()
        faults, self._skipped = [], []
        for step, path in reversed(self._steps()):
            try:
                _verify(path, step)
                # Copies: what load_file gives may stay mapped to a file that is about to be removed.
                tensors = {name: t.clone() for name, t in load_file(path / TENSORS).items()}
                return Checkpoint(step, tensors, json.loads((path / STATE).read_bytes()))
            except (ValueError, OSError, SafetensorError) as error:
                faults.append(f"{path.name}: {error}")
                self._skipped.append(path)
                self.say(f"{path} is damaged and was skipped: {error}")
        if faults:
            raise ValueError(
                f"{self.folder}: every checkpoint is damaged ({'; '.join(faults)}). Put a good copy in its place, or "
                "delete this folder to start the stage from its beginning"
            )
        return None

    def discard(self, step: int) -> None:
        """Remove the checkpoint of one step, if it is there."""
        for number, path in self._steps():
            if number == step:
                self._remove(path)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged ones too."""
        return [step for step, _ in self._steps()]

    def clear(self) -> None:
        """Remove every checkpoint, the oldest first, and the folder if nothing else is in it."""
        if not self.folder.exists():
            return
        self._tidy()
        for _, path in self._steps():
            self._remove(path)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
            _flush(self.folder.parent)

    def _steps(self) -> list[tuple[int, Path]]:
        """The checkpoints by step, damaged ones too. Whatever else lies in the folder is not ours."""
        paths = self.folder.glob("step-*") if self.folder.exists() else ()
        return sorted((int(path.name[5:]), path) for path in paths if re.fullmatch(r"step-\d{8,}", path.name))

    def _tidy(self) -> None:
        """Finish or undo what a killed process left half-done."""
        for path in self.folder.glob(_OLD + "step-*"):  # see _place
            final = path.with_name(path.name.removeprefix(_OLD))
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                shutil.rmtree(path) if final.exists() else path.rename(final)
        for path in self.folder.glob(_PARTIAL + "step-*"):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(path)

    def _place(self, temporary: Path, final: Path) -> None:
        """Give a finished folder its name. One of the same step steps aside first, under a name that _tidy undoes."""
        old = final.with_name(_OLD + final.name)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _flush(self.folder)
        if old.exists():
            shutil.rmtree(old)

    def _prune(self, newest: int) -> None:
        for step, path in self._steps():
            if step > newest:
                self.say(f"{path} was given up: the run went on from before it and has saved step {newest}")
            if step > newest or (step < newest and path in self._skipped):  # a damaged one is none of the kept
                self._remove(path)
        for _, path in self._steps()[: -self.keep]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        """By way of a temporary name, so that no half-removed folder looks like a checkpoint."""
        gone = path.with_name(_PARTIAL + path.name)
        path.rename(gone)
        shutil.rmtree(gone)

    def _full(self, step: int, needed: int, reason: str) -> str:
        steps = [number for number, _ in self._steps()]
        intact = f"Step {steps[-1]} is the last one there, untouched" if steps else "There is no earlier one"
        return (
            f"{reason}: the checkpoint of step {step} needs {needed:,} bytes in {self.folder}, where "
            f"{shutil.disk_usage(self.folder).free:,} are free (a quota may allow less). {intact}. "
            "Make room, then give the same command again"
        )


def _plain(value: Any, key: str) -> None:
    """ValueError with the dotted key of anything that would not come back from JSON equal and of the same type."""
    if isinstance(value, dict):
        for name, part in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{key} has the key {name!r}, which JSON would turn into text: use a string")
            _plain(part, f"{key}.{name}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _plain(part, f"{key}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}, which JSON does not have: use null, or put it into a tensor")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise ValueError(f"{key} is a {type(value).__name__}, which JSON does not have: use a list or a tensor")


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """The first bytes of a safetensors file: the header's length (8 bytes, little-endian), then name -> type, shape
    and place as JSON, padded to 8 bytes. Source: the format's README."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, t in _ordered(tensors):
        if t.dtype not in _DTYPES or t.layout != torch.strided or name == "__metadata__":
            raise ValueError(f"tensor {name!r} ({t.dtype}, {t.layout}) cannot be saved: give it another name or type")
        end = place + t.numel() * t.element_size()
        table[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors file piece by piece. Not by ``save_file``, whose bytes nobody sees before they are on the disk:
    a checksum taken from the file would agree with whatever was written. It also refuses shared memory, and a full
    disk has no error number there."""
    yield header
    for _, t in _ordered(tensors):
        flat = t.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Wide types first, so that each tensor begins at a multiple of its item's size."""
    return sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))


def _write(path: Path, blocks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and flush a file; its size and the SHA-256 of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _verify(folder: Path, step: int) -> None:
    """ValueError or OSError says what is wrong with a checkpoint."""
    for name in (MANIFEST, TENSORS, STATE):
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = {
            name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in (TENSORS, STATE)
        }
        stored = manifest["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is no manifest ({type(error).__name__}: {error})") from error
    if stored != step:
        raise ValueError(f"{MANIFEST} is that of step {stored!r}")
    for name, (size, checksum) in files.items():
        if (folder / name).stat().st_size != size:
            raise ValueError(f"{name} has {(folder / name).stat().st_size} bytes instead of {size}")
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        if digest.hexdigest() != checksum:
            raise ValueError(f"{name} is not what was written: its SHA-256 differs")


def flush_all(folder: Path) -> None:
    """Bring every file below ``folder``, and the folders' lists of names, to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):  # files before the folders that name them
        _flush(path)
    _flush(folder)
    _flush(folder.parent)


def _make(folder: Path) -> None:
    """``mkdir -p`` whose every new folder survives a power cut."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
