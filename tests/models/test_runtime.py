from __future__ import annotations

import pytest
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


def test_gradients_are_summed_in_messages(monkeypatch):
    """Two processes with the same gradients: every sum is twice its own."""
    sent: list[int] = []

    def twice(flat: torch.Tensor) -> None:
        sent.append(flat.numel())
        flat *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", twice)
    monkeypatch.setattr(runtime, "MESSAGE", 5)
    here = runtime.Runtime("cpu")
    here.world = 2
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (1, 2), (4,), (7,), (2, 3), (1,))]
    for number, p in enumerate(parameters[:-1], 1):
        p.grad = torch.full(p.shape, float(number))
    parameters[4].grad = torch.arange(6.0).view(3, 2).T  # its rows do not lie side by side
    here.sum_gradients(parameters)
    assert sent == [3 + 2, 4, 7, 6, 1]
    assert [p.grad.flatten().tolist() for p in parameters[:4]] == [[2.0] * 3, [4.0] * 2, [6.0] * 4, [8.0] * 7]
    assert parameters[4].grad.tolist() == [[0.0, 4.0, 8.0], [2.0, 6.0, 10.0]]
    assert parameters[5].grad.tolist() == [0.0]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    runtime._check_processes(cpu=True)
    with pytest.raises(ValueError, match=r"2 processes on a machine with 1 GPUs: .* \(--device cpu\)"):
        runtime._check_processes(cpu=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # each may see another one
    runtime._check_processes(cpu=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes on a machine with 2 GPUs"):
        runtime._check_processes(cpu=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    runtime._check_processes(cpu=False)


def test_a_run_on_the_cpu_asks_nothing_of_a_gpu(monkeypatch):
    here, asked = runtime.Runtime("cpu"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert here.peak_memory_mb() > 10
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: asked.append(device_ids))
    here.wait()
    here.world = 2
    here.wait()
    assert asked == [None]
