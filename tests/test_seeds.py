"""Numbers from a seed and names: fixed for ever, independent of each other, and of torch's global state."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch

from rto.seeds import derive, global_torch, shuffled, uniforms


def test_derive_is_the_first_63_bits_of_blake2b():
    digest = hashlib.blake2b(b"7/rollouts/3", digest_size=8).digest()
    assert derive(7, "rollouts", 3) == int.from_bytes(digest, "big") // 2


def test_derive_never_changes():
    """A new value here would silently change every published run."""
    assert derive(0, "rollouts", 0, 0) == 6798328677968939865


def test_derive_depends_on_everything():
    calls = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "b", "a"), (0, "ab"), (0, "a", 1), (0, "a", 11)]
    calls += [(0, "a", 1, 1), (1, "a")]
    numbers = [derive(*call) for call in calls]
    assert all(a != b for a, b in itertools.combinations(numbers, 2))
    assert all(0 <= number < 2**63 for number in numbers)


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_shuffled_is_a_permutation(n):
    order = shuffled(n, 0, "epoch", 1)
    assert sorted(order) == list(range(n))
    assert order == shuffled(n, 0, "epoch", 1)


def test_shuffled_differs_by_name_and_seed():
    assert len({tuple(shuffled(50, seed, "epoch", e)) for seed in (0, 1) for e in (0, 1)}) == 4


def test_uniforms():
    draws = uniforms(10_000, 0, "row", 5)
    assert draws.shape == (10_000,) and draws.dtype == torch.float32
    assert (draws >= 0).all() and (draws < 1).all()
    assert abs(draws.mean() - 1 / 2) < 5 * (1 / 12 / 10_000) ** 0.5  # five standard errors
    assert torch.equal(draws, uniforms(10_000, 0, "row", 5))
    assert not torch.equal(draws, uniforms(10_000, 0, "row", 6))
    assert uniforms(0, 0, "row").shape == (0,)


def test_uniforms_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    uniforms(5, 0, "row")
    shuffled(5, 0, "row")
    assert torch.equal(before, torch.random.get_rng_state())


def test_global_torch_seeds_and_puts_back():
    before = torch.random.get_rng_state()
    with global_torch(3, "head"):
        first = torch.randn(4)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)  # elsewhere in the stream
    with global_torch(3, "head"):
        second = torch.randn(4)
    with global_torch(3, "tail"):
        other = torch.randn(4)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(first, torch.randn(4, generator=torch.Generator().manual_seed(derive(3, "head"))))


def test_global_torch_puts_back_after_an_error():
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), global_torch(0, "x"):
        torch.rand(1)
        raise RuntimeError("stop")
    assert torch.equal(before, torch.random.get_rng_state())


def test_global_torch_leaves_the_generators_of_gpus_alone(monkeypatch):
    """They would not be put back."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", asked.append)
    with global_torch(3, "head"):
        torch.randn(4)
    assert asked == []
