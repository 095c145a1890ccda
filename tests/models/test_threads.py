"""Threads: one a physical core of this process's share, unless the user has chosen."""

from __future__ import annotations

import os

import pytest
import torch

from rto.models import threads
from rto.models.threads import choose_threads


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Two sockets of two cores with two hardware threads each; 8 threads in PyTorch, none chosen by the user."""
    for cpu in range(8):
        place = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "physical_package_id").write_text(f"{cpu // 2 % 2}\n")
        (place / "core_id").write_text(f"{cpu % 2}\n")
    for node in ("node0", "node1", "online"):
        (tmp_path / "devices/system/node" / node).mkdir(parents=True)
    monkeypatch.setattr(threads, "SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in (*threads.CHOICES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield tmp_path
    torch.set_num_threads(before)


def test_a_thread_a_physical_core(system):
    found = choose_threads()
    assert (found.count, found.cores, found.nodes, found.given) == (4, 4, 2, None)
    assert torch.get_num_threads() == 4
    assert str(found).startswith("threads 4 (no OMP_NUM_THREADS) on 4 physical cores, 2 NUMA nodes, malloc of ")


def test_processes_share_the_cores(system, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert choose_threads().count == 1


@pytest.mark.parametrize(("faster", "said"), [(True, "oneDNN"), (False, "PyTorch's choice")])
def test_who_multiplies(system, monkeypatch, faster, said):
    monkeypatch.setattr(threads, "onednn_is_faster", lambda: faster)
    assert str(choose_threads()).endswith(f", matrix products of {said}")


@pytest.mark.parametrize("name", threads.CHOICES)
def test_what_the_user_sets_stays(system, monkeypatch, name):
    monkeypatch.setenv(name, "8")
    found = choose_threads()
    assert (found.count, found.given) == (8, name)
    assert f"threads 8 (set by {name})" in str(found)


def test_fewer_threads_stay_fewer(system):
    torch.set_num_threads(3)
    assert choose_threads().count == 3


def test_only_the_cores_that_the_process_may_use(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4}, raising=False)  # 0 and 4 are one core
    assert choose_threads().cores == 2


@pytest.mark.parametrize(("said", "cores"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_share_of_time_is_no_more_cores(system, said, cores):
    (system / "fs/cgroup").mkdir(parents=True)
    (system / "fs/cgroup/cpu.max").write_text(said + "\n")
    assert choose_threads().cores == cores


def test_cores_that_nobody_tells_of_are_counted_one_by_one(system, monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "SYSTEM", tmp_path / "nowhere")
    found = choose_threads()
    assert (found.count, found.cores, found.nodes) == (8, 8, 1)
