"""A step that was not applied: what is known of it, as a JSON file with the rows of its batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from rto.finite import NotFinite

Decode = Callable[[list[int]], str]


class Incidents:
    """The folder ``incidents`` of a run. ``decode`` turns token ids into text."""

    def __init__(self, folder: Path, decode: Decode) -> None:
        self.folder, self.decode = folder, decode

    def write(self, stage: str, step: int, error: NotFinite) -> Path:
        """``NUMBER-STAGE-step-STEP.json``: the culprit, its data row, the token and the text around it, the batch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name[:4]) for p in self.folder.glob("[0-9][0-9][0-9][0-9]-*.json")), default=0)
        path = self.folder / f"{number:04d}-{stage.replace('/', '_')}-step-{step}.json"
        found: dict[str, Any] = {"stage": stage, "step": step, **asdict(error.culprit), **self.place(error)}
        found["batch"] = []
        head = json.dumps(found, indent=1, ensure_ascii=False)
        rows = (json.dumps(self.record(row), ensure_ascii=False) for row in error.rows)
        text = head.replace('"batch": []', '"batch": [\n  ' + ",\n  ".join(rows) + "\n ]") + "\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate's JSON escape
        return path

    def place(self, error: NotFinite) -> dict[str, Any]:
        """``data_row``, ``token_text`` and ``text_before``, as far as they are known."""
        culprit, found = error.culprit, {}
        if culprit.row is None or not error.rows:
            return {}
        row = error.rows[culprit.row]
        found["data_row"] = row.row
        if culprit.part and culprit.token is not None:
            name, _, number = culprit.part.partition(".")
            ids = getattr(row, name)
            ids = ids[int(number)] if number else ids
            found["token_text"] = self.decode(ids[culprit.token : culprit.token + 1])
            found["text_before"] = self.decode(ids[: culprit.token])
        return found

    def record(self, row: Any) -> dict[str, Any]:
        """A row of data with the text beside token ids."""
        assert is_dataclass(row)
        return {field.name: self._with_text(getattr(row, field.name)) for field in fields(row)}

    def _with_text(self, value: Any) -> Any:
        if isinstance(value, list) and value and all(type(part) is int for part in value):
            return {"ids": value, "text": self.decode(value)}
        return [self._with_text(part) for part in value] if isinstance(value, list) else value
