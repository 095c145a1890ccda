"""What a pass keeps lies in a room of its own; gradients are those of torch to the bit."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rto.batch import Completions
from rto.config import Lora, Training
from rto.data.collate import collate_completions
from rto.models import role
from rto.models.fused import fuse
from rto.models.kept import Kept, make_again
from rto.models.role import Backbone, Role
from rto.optim import Optimizer
from rto.room import Room

LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}

pytestmark = pytest.mark.usefixtures("no_other_garbage")


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The idle chunks."""
    chunks: list[Tensor] = []
    monkeypatch.setattr(Room, "idle", chunks)
    yield chunks
    assert Kept.now is None


def made(kind: Any = hf.LlamaConfig, lora: bool = False, dtype: Any = None, **more: Any) -> Role:
    """A role of a new network. ``dtype``: of the weights; bfloat16 under autocast is ``compute``."""
    attention, compute = more.pop("attention", "sdpa"), more.pop("compute", torch.float32)
    tied = more.pop("tie_word_embeddings", kind is hf.GPT2Config)
    sizes = LLAMA | {"num_key_value_heads": 2} if kind is hf.LlamaConfig else GPT2
    sizes = {"vocab_size": 61, "initializer_range": 0.3, "tie_word_embeddings": tied, **sizes}
    torch.manual_seed(0)
    settings = kind(pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    net = hf.AutoModelForCausalLM.from_config(settings, attn_implementation=attention).eval().to(dtype or torch.float32)
    shared = Backbone(net, "tiny", Lora(r=4, alpha=8) if lora else None, compute, **more)
    if not lora:
        return Role(shared)
    shared.add_adapter("a")
    acting = Role(shared, "a")
    for p in acting.parameters():
        p.data.normal_(0, 0.2)
        p.requires_grad_()
    return acting


def batch(seed: int = 0) -> Completions:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 61, (length,), generator=draw).tolist() for length in (4, 1, 2, 3, 5, 1)]
    return collate_completions(rows[:3], rows[3:], [True] * 3, 0)


def loss(acting: Role, seed: int = 0) -> Tensor:
    return acting.logprobs(batch(seed))[0].square().sum()


def gradients(acting: Role) -> dict[str, Tensor]:
    """Takes them away."""
    found = {name: p.grad for name, p in acting.backbone.network.named_parameters() if p.grad is not None}
    acting.backbone.network.zero_grad()
    return found


def expected(acting: Role, *seeds: int) -> dict[str, Tensor]:
    """Of one pass after another, with nothing copied or made again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(role, "Kept", lambda network: contextlib.nullcontext())
        for seed in seeds:
            loss(acting, seed).backward()
    return gradients(acting)


def assert_same(found: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert found and found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert found[name].dtype == gradient.dtype and gradient.any(), name
        assert torch.equal(found[name], gradient), name


def room_of(kept: Kept) -> int:
    assert len(kept._room._chunks) <= 1
    return kept._room._used


# --- gradients ----------------------------------------------------------------------------------------

CASES: dict[str, Callable[[], Role]] = {
    "llama": made,
    "llama, eager": lambda: made(attention="eager"),
    "llama, adapter": lambda: made(lora=True),
    "llama, checkpointing": lambda: made(checkpointing=True),
    "llama, adapter, checkpointing": lambda: made(lora=True, checkpointing=True),
    "llama, bfloat16": lambda: made(compute=torch.bfloat16),
    "llama, adapter, bfloat16": lambda: made(lora=True, dtype=torch.bfloat16, compute=torch.bfloat16),
    "llama, float64": lambda: made(dtype=torch.float64),
    "gpt2": lambda: made(hf.GPT2Config),
    "gpt2, eager": lambda: made(hf.GPT2Config, attention="eager"),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_to_the_bit(case: str, idle: list[Tensor]) -> None:
    acting = CASES[case]()
    plain = expected(acting, 0)
    assert idle == []
    for _ in range(2):  # the second time in memory that was used before
        loss(acting).backward()
        assert_same(gradients(acting), plain)
        assert len(idle) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("lora", [False, True])
def test_two_passes_at_once(order: tuple[int, int], lora: bool, idle: list[Tensor]) -> None:
    acting = made(lora=lora)
    plain = expected(acting, *order)
    losses = [loss(acting, seed) for seed in (0, 1)]
    for number in order:
        losses[number].backward()
    assert_same(gradients(acting), plain)
    del losses
    assert len(idle) == 2


def test_backward_twice() -> None:
    acting = made()
    plain = expected(acting, 0, 0)
    total = loss(acting)
    total.backward(retain_graph=True)
    total.backward()
    assert_same(gradients(acting), plain)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_micro_batches_in_an_optimizer_s_room(tied: bool, idle: list[Tensor]) -> None:
    """Those of the embedding and of the output layer are added where they stand, there too."""
    acting = made(tie_word_embeddings=tied)
    plain = expected(acting, 0, 1)
    trained = Optimizer(acting.parameters(), Training(lr=0.1), lr=0.1, steps=3)
    for _ in range(2):
        for seed in (0, 1):
            loss(acting, seed).backward()
        assert len(trained._gradients._chunks) == 1 and len(idle) == 1
        assert_same(gradients(acting), plain)
        trained.forget()
        assert len(idle) == 2


# --- copies -------------------------------------------------------------------------------------------


def test_the_value_at_the_time_of_saving_counts() -> None:
    """d/dw of w * x is x. Here x is 2 at first, 3 later, and 5 when the gradient is asked for."""
    w, x = torch.ones(16, requires_grad=True), torch.full((16,), 2.0)
    kept = Kept(nn.Identity())
    with kept:
        first = w * x
        again = w * x  # the same copy
        assert room_of(kept) == 64
        x.fill_(3.0)
        second = w * x
        assert room_of(kept) == 128
    x.fill_(5.0)
    (first + 10 * again + 100 * second).sum().backward()
    assert w.grad is not None and w.grad.tolist() == [2.0 + 20.0 + 300.0] * 16


def test_a_tensor_where_another_one_lay() -> None:
    """d/dw of w * 0 + ... + w * 19 is 190, although most of these factors come to lie in the same place."""
    w = torch.ones(5, requires_grad=True)
    with Kept(nn.Identity()):
        total = torch.zeros(5)
        for number in range(20):
            total = total + w * torch.full((5,), float(number))
    total.sum().backward()
    assert w.grad is not None and w.grad.tolist() == [190.0] * 5


def test_views_share_one_copy_and_small_parts_stand_alone() -> None:
    whole = torch.arange(64.0).reshape(8, 8)
    views = [whole, whole.T, whole[1:, 2:], whole[:, None].expand(8, 3, 8)]
    part = whole[3:5, ::2]
    w = torch.ones((), requires_grad=True)
    kept = Kept(nn.Identity())
    with kept:
        products = [w * view for view in views]
        assert room_of(kept) == 256
        products.append(w * part)
        assert room_of(kept) == 256 + 64
    sums = [view.sum() for view in (*views, part)]
    whole.zero_()
    for product, right in zip(products, sums, strict=True):
        (found,) = torch.autograd.grad(product.sum(), w)
        assert found == right


def test_weights_and_what_is_no_number_are_not_copied() -> None:
    table = nn.Embedding(8, 16)
    x, rows = torch.randn(3, 16, requires_grad=True), torch.tensor([1, 2, 3])
    kept = Kept(table)
    with kept:
        out = (x @ table.weight.T)[rows[:2]]
        assert room_of(kept) == 3 * 16 * 4  # x, for the gradient of the weights
    out.sum().backward()
    torch.testing.assert_close(x.grad, table.weight.sum(0).expand(3, 16) * torch.tensor([[0.0], [1.0], [1.0]]))


# --- made again ---------------------------------------------------------------------------------------


def test_outputs_of_norms_and_gates_are_not_kept() -> None:
    """Of a norm, a gated layer and a norm: their inputs, the gate and what it lets through. Without fusing, their
    outputs as well."""
    settings = hf.LlamaConfig(**LLAMA)
    torch.manual_seed(0)
    net = nn.Sequential(LlamaRMSNorm(32), LlamaMLP(settings), LlamaRMSNorm(32), nn.Linear(32, 5))
    x = torch.randn(8, 32, requires_grad=True)
    fuse(net)
    kept = Kept(net)
    with kept:
        out = net(x)
    assert room_of(kept) == 4 * 8 * (32 + 64 + 64 + 32)
    found = torch.autograd.grad(out.sum(), [x, *net.parameters()])
    plain = torch.autograd.grad(net(x).sum(), [x, *net.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))


def test_an_output_that_is_read_in_another_order_is_kept() -> None:
    norm = LlamaRMSNorm(4)
    fuse(norm)
    x, w = torch.randn(3, 4), torch.ones(4, 3, requires_grad=True)
    with Kept(norm):
        out = norm(x)
        total = (w * out.T).sum() + (w.view(3, 4) * out).sum() + (w.flatten() * out.flatten()).sum()
    total.backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, out.detach().T + 2 * out.detach().reshape(4, 3))


# --- memory -------------------------------------------------------------------------------------------


def test_each_pass_uses_the_same_memory(idle: list[Tensor]) -> None:
    acting = made()
    places = set()
    for _ in range(3):
        total = loss(acting)
        assert idle == []
        total.backward()
        del total
        places |= {chunk.data_ptr() for chunk in idle}
        assert len(idle) == 1
    assert len(places) == 1


def test_a_graph_that_is_dropped_leaves_its_memory(idle: list[Tensor]) -> None:
    acting = made(lora=True)
    gc.disable()  # nothing waits for the collector
    try:
        total = loss(acting)
        assert idle == []
        del total
        assert len(idle) == 1
    finally:
        gc.enable()


def test_an_output_that_lies_in_another_order_is_not_made_again(idle: list[Tensor]) -> None:
    """What is made from copies lies row by row: to view it like the output would mix up its numbers."""
    x, scale = torch.randn(3, 3).t().requires_grad_(), torch.randn(3, 3)
    with Kept(nn.Identity()):
        out = x * 2
        assert not out.is_contiguous() and out.t().is_contiguous()
        make_again(out, (x,), lambda part: part.clone(memory_format=torch.contiguous_format) * 2)
        total = (out.t().square() * scale).sum()
    total.backward()
    torch.testing.assert_close(x.grad, (8 * x * scale.t()).detach())


def test_a_norm_that_changes_before_the_gradient_is_noticed() -> None:
    """Frozen, as below an adapter: only what is made again from it would show the change."""
    acting = made(lora=True)
    total = loss(acting)
    network: Any = acting.backbone.network
    with torch.no_grad():
        network.model.layers[0].input_layernorm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        total.backward()


def test_an_error_inside_ends_it(idle: list[Tensor]) -> None:
    acting = made()
    with pytest.raises(IndexError):
        acting.backbone.states(torch.tensor([[5, 99]]))
    assert Kept.now is None
    net, w = nn.Identity(), torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="half way"), Kept(net):
        total = w * torch.ones(3)
        raise RuntimeError("half way")
    assert Kept.now is None and idle == []
    del total
    gc.collect()
    assert len(idle) == 1
    plain = expected(acting, 0)
    loss(acting).backward()
    assert_same(gradients(acting), plain)


def test_nothing_is_kept_without_gradients(idle: list[Tensor]) -> None:
    with torch.no_grad():
        loss(made())
        loss(made(lora=True))
    assert idle == []


def test_an_output_that_is_changed_in_place_is_kept() -> None:
    norm = LlamaRMSNorm(4)
    fuse(norm)
    w = torch.ones(3, 4, requires_grad=True)
    with Kept(norm):
        out = norm(torch.randn(3, 4)).mul_(2.0)
        total = (w * out).sum()
    total.backward()
    assert w.grad is not None
    assert torch.equal(w.grad, out)


def test_weights_that_change_before_the_gradients_are_refused() -> None:
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with Kept(layer):
        total = layer(x).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        total.backward()


@pytest.mark.parametrize("fused", [False, True])
def test_checkpointed_layers_keep_their_inputs_only(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 16 tokens of 32 numbers for each of 2 layers at most, and what is around the layers."""
    passes: list[Kept] = []

    class Watched(Kept):
        def __init__(self, network: nn.Module) -> None:
            super().__init__(network)
            passes.append(self)

    if not fused:
        monkeypatch.setattr(role, "fuse", lambda network: None)
    monkeypatch.setattr(role, "Kept", Watched)
    net = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=61, **LLAMA))
    shared = Backbone(net, "tiny", None, torch.float32, checkpointing=True)
    net.train()
    states = shared.states(torch.arange(32).view(2, 16))
    assert passes[0]._room._used <= 8 * 2 * 16 * 32 * 4
    states.sum().backward()
