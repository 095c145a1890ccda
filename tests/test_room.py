"""Chunks are used again, but not while somebody looks; gradients lie in them and are those of torch to the bit."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rto import optim, room
from rto.config import Training
from rto.optim import Optimizer
from rto.room import Room

pytestmark = pytest.mark.usefixtures("no_other_garbage")


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The idle chunks, which here are of 1024 bytes."""
    chunks: list[Tensor] = []
    monkeypatch.setattr(Room, "idle", chunks)
    monkeypatch.setattr(room, "CHUNK", 1024)
    return chunks


# --- a room -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_tensors_lie_side_by_side_at_multiples_of_64_bytes(dtype: torch.dtype) -> None:
    here, like = Room(), torch.zeros(0, dtype=dtype)
    taken = [here.take(count, like) for count in (1, 5, 0, 17)]
    for number, tensor in enumerate(taken):
        tensor.fill_(number + 1)
    for number, tensor in enumerate(taken):  # nobody wrote over a neighbour
        assert tensor.dtype == dtype and tensor.data_ptr() % 64 == 0 and (tensor == number + 1).all()
    assert [len(tensor) for tensor in taken] == [1, 5, 0, 17]
    assert taken[1].data_ptr() - taken[0].data_ptr() == 64
    assert len({tensor.untyped_storage().data_ptr() for tensor in taken}) == 1


def test_what_does_not_fit_goes_into_a_new_chunk() -> None:
    here, byte = Room(), torch.zeros(0, dtype=torch.uint8)
    full = [here.take(512, byte), here.take(512, byte)]  # exactly one chunk
    large = here.take(5000, byte)
    small = here.take(1, byte)
    places = [tensor.untyped_storage().data_ptr() for tensor in (*full, large, small)]
    assert places[0] == places[1] and len(set(places)) == 3
    assert large.untyped_storage().nbytes() == 5000
    assert large.fill_(7).sum() == 35000


def test_chunks_are_idle_at_the_end_and_taken_again(idle: list[Tensor]) -> None:
    here, like = Room(), torch.zeros(0)
    places = [here.take(200, like).data_ptr() for _ in range(2)]
    assert idle == []
    here.end()
    assert sorted(chunk.data_ptr() for chunk in idle) == sorted(places)
    other = Room()
    assert sorted(other.take(200, like).data_ptr() for _ in range(2)) == sorted(places)
    assert idle == []
    here.end()  # a second time: nothing is in it
    assert idle == []
    assert here.take(1, like).data_ptr() not in places


def test_a_chunk_that_is_too_small_stays_idle(idle: list[Tensor]) -> None:
    here, byte = Room(), torch.zeros(0, dtype=torch.uint8)
    here.take(1, byte)
    here.end()
    here.take(1025, byte)
    assert [len(chunk) for chunk in idle] == [1024]


def test_a_chunk_that_somebody_looks_at_is_not_used_again(idle: list[Tensor]) -> None:
    here, like = Room(), torch.zeros(0)
    mine = here.take(4, like).fill_(3.0)
    look, place = mine[1:2], mine.data_ptr()
    del mine
    here.end()
    here.take(4, like).zero_()
    assert look.item() == 3.0 and len(idle) == 1
    here.end()
    del look
    again = {here.take(200, like).data_ptr() for _ in range(2)}
    assert place in again and idle == []


def test_holds() -> None:
    here, other, like = Room(), Room(), torch.zeros(3)
    mine, theirs = here.take(200, like), other.take(3, like)
    last = here.take(3, like)
    assert here.holds(mine) and here.holds(last) and here.holds(mine[4:].view(-1, 14))
    assert not here.holds(theirs) and not here.holds(like) and not here.holds(mine.clone())
    here.end()
    assert not here.holds(mine)


def test_a_rehearsal_leaves_no_chunk(idle: list[Tensor]) -> None:
    here = Room()
    with FakeTensorMode():
        like = torch.zeros(0, dtype=torch.bfloat16)
        taken = here.take(3, like)
        assert taken.shape == (3,) and taken.dtype == torch.bfloat16 and here.holds(taken)
    here.end()
    assert idle == [] and here.take(2, torch.zeros(0)).fill_(1.0).tolist() == [1.0, 1.0]


# --- gradients ----------------------------------------------------------------------------------------


def stack() -> nn.ParameterList:
    draw = torch.Generator().manual_seed(0)
    return nn.ParameterList(torch.randn(shape, generator=draw) for shape in ((7, 5), (5,), (5, 3), (2,)))


def backward(weights: nn.ParameterList, seed: int) -> None:
    """The last one has no part in it. The third is used twice, the second time transposed."""
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
    hidden = (x @ weights[0] + weights[1]).tanh() @ weights[2]
    (hidden.square().mean() + (hidden @ weights[2].T).sum()).backward()


def optimizer(weights: nn.ParameterList) -> Optimizer:
    return Optimizer(weights, Training(lr=0.1, warmup=0.0, schedule="constant", optimizer="adam"), lr=0.1, steps=9)


def test_gradients_of_several_passes_lie_in_the_room_and_are_those_of_torch() -> None:
    ours, plain = stack(), stack()
    trained = optimizer(ours)
    places: list[int] = []
    for seed in range(3):
        for weights in (ours, plain):
            backward(weights, seed)
        gradients = [p.grad for p in ours if p.grad is not None]
        assert len(gradients) == 3 and ours[3].grad is None
        assert all(trained._gradients.holds(gradient) for gradient in gradients)
        assert len({gradient.data_ptr() for gradient in gradients}) == 3
        places = places or [gradient.data_ptr() for gradient in gradients]
        assert [gradient.data_ptr() for gradient in gradients] == places
        for mine, theirs in zip(gradients, plain, strict=False):
            assert theirs.grad is not None and mine.shape == theirs.shape and torch.equal(mine, theirs.grad)


def test_each_step_uses_the_same_memory(idle: list[Tensor]) -> None:
    ours, plain = stack(), stack()
    trained = optimizer(ours)
    t = trained.training
    inner = torch.optim.Adam(plain, lr=0.1, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay, fused=True)
    places = set()
    for seed in range(3):
        for weights in (ours, plain):
            backward(weights, seed)
        places.add(ours[0].grad.data_ptr())
        trained.step()
        nn.utils.clip_grad_norm_(plain, t.max_norm, foreach=True)
        inner.step()
        inner.zero_grad()
        assert len(idle) == 1 and trained._gradients._chunks == []
        assert all(p.grad is None for p in ours)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))
    backward(ours, 0)
    trained.forget()
    assert len(places) == len(idle) == 1 and all(p.grad is None for p in ours)


def test_a_gradient_that_somebody_keeps_outlives_the_step() -> None:
    weights = stack()
    trained = optimizer(weights)
    backward(weights, 0)
    kept = weights[0].grad
    assert kept is not None
    trained.forget()
    value = kept.clone()
    backward(weights, 1)
    assert torch.equal(kept, value) and not torch.equal(weights[0].grad, value)


def test_the_next_optimizer_of_the_same_weights_is_alone() -> None:
    weights = stack()
    for _ in range(3):
        trained = optimizer(weights)
        assert all(len(p._post_accumulate_grad_hooks) == 1 for p in weights)
        backward(weights, 0)
        assert trained._gradients.holds(weights[0].grad)
        trained.forget()
        del trained
        gc.collect()
        assert not any(p._post_accumulate_grad_hooks for p in weights)
    backward(weights, 0)
    assert weights[0].grad is not None and Room.idle and weights[0].grad.untyped_storage().nbytes() == 4 * 35


def test_gradients_of_a_dropped_optimizer_stay() -> None:
    weights, plain = stack(), stack()
    trained = optimizer(weights)
    backward(weights, 0)
    del trained
    gc.collect()
    for seed in (0, 1):
        backward(plain, seed)
    backward(weights, 1)
    assert torch.equal(weights[0].grad, plain[0].grad)


def test_large_gradients_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "CHUNK", 5 * 3 * 4)
    weights = stack()
    trained = optimizer(weights)
    backward(weights, 0)
    assert [trained._gradients.holds(p.grad) for p in weights[:3]] == [False, True, False]
