from __future__ import annotations

import torch

from rto import room
from rto.models import runtime


def test_memory_that_is_free_goes_back_between_phases(monkeypatch):
    chunk = torch.empty(2**10, dtype=torch.uint8)
    monkeypatch.setattr(room.Room, "idle", [chunk])
    monkeypatch.setattr(runtime, "SPARE", 2**60)
    runtime.release_memory()
    assert room.Room.idle == [chunk]  # too little to be worth it
    monkeypatch.setattr(runtime, "SPARE", 2**9)
    runtime.release_memory()
    assert room.Room.idle == []
