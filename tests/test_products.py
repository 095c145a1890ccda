"""Products and linear layers by oneDNN against the formula in float64, whatever processor the tests run on."""

from __future__ import annotations

import os

import pytest
import torch
import transformers as hf
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close

from rto import products
from rto.config import Lora
from rto.data.collate import collate_completions
from rto.models.linear import ProductLinear, linear, use_products
from rto.models.lora import add_in_place
from rto.models.role import Backbone, Role
from rto.output_layer import selected_logprobs
from rto.products import add_product, by_onednn, onednn_is_faster, product

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def onednn(monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN multiplies everything that it can. Returns the shapes that it was given."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "MULTIPLICATIONS", 0)
    monkeypatch.setattr(products, "COPIED", 0)
    for module in ("rto.products", "rto.models.linear"):
        monkeypatch.setattr(f"{module}.onednn_is_faster", lambda: True)
    seen: list[tuple[int, ...]] = []

    def counted(left: Tensor, right: Tensor) -> bool:
        faster = by_onednn(left, right)
        if faster:
            seen.append((*left.shape, len(right)))
        return faster

    monkeypatch.setattr(products, "by_onednn", counted)
    return seen


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    whole = left.double() @ right.double().T
    return (whole if bias is None else whole + bias.double()).float()


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (1, 5), (0, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_equal_to_the_formula(onednn, shape, biased):
    left, right, bias = drawn(*shape), drawn(4, 5, seed=1), drawn(4, seed=2) if biased else None
    assert_close(product(left, right, bias), exact(left, right, bias), **CLOSE)
    assert onednn == [(*shape, 4)]


def test_matrices_that_lie_otherwise(onednn):
    """Transposed, every second row or column of something, and expanded."""
    wide, tall = drawn(14, 10), drawn(5, 4, seed=1)
    for left in (drawn(5, 7).T, wide[::2, ::2], wide[:, 5:], drawn(1, 5).expand(7, 5)):
        for right in (tall.T, drawn(8, 10, seed=2)[::2, ::2], drawn(4, 9, seed=3)[:, 2:7], tall[:, :1].T.expand(4, 5)):
            assert_close(product(left, right), exact(left, right), **CLOSE)


def test_only_what_it_is_faster_for(onednn, monkeypatch):
    ours = drawn(3, 5), drawn(4, 5)
    assert by_onednn(*ours)
    assert not by_onednn(ours[0].double(), ours[1].double())
    assert not by_onednn(ours[0].bfloat16(), ours[1].bfloat16())
    assert not by_onednn(ours[0].to("meta"), ours[1].to("meta"))
    monkeypatch.setattr(products, "MULTIPLICATIONS", 61)
    assert not by_onednn(*ours)
    monkeypatch.setattr(products, "MULTIPLICATIONS", 60)
    assert by_onednn(*ours)
    turned = drawn(5, 3).T, ours[1]
    assert by_onednn(*turned)
    monkeypatch.setattr(products, "COPIED", 5)
    assert by_onednn(*ours) and not by_onednn(*turned)
    monkeypatch.setattr(products, "COPIED", 4)
    assert by_onednn(*turned)
    monkeypatch.setattr("rto.products.onednn_is_faster", lambda: False)
    assert not by_onednn(*ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fresh", [True, False])
def test_added_where_it_stands(onednn, fresh, dtype):
    left, right = drawn(3, 5), drawn(4, 5, seed=1)
    total = torch.full((3, 4), float("nan") if fresh else 2.0, dtype=dtype)
    place = total.data_ptr()
    add_product(total, left, right, fresh)
    assert_close(total, exact(left, right).to(dtype) + (0.0 if fresh else 2.0), **CLOSE)
    assert total.data_ptr() == place


@pytest.mark.parametrize("fresh", [True, False])
def test_a_large_sum_is_added_to_share_by_share(onednn, monkeypatch, fresh):
    monkeypatch.setattr(products, "SHARE", 20)
    monkeypatch.setattr(products, "ROWS", 1)
    left, right = drawn(13, 3), drawn(4, 3, seed=1)
    total = torch.full((13, 4), float("nan") if fresh else 2.0)
    add_product(total, left, right, fresh)
    assert [shape[0] for shape in onednn[1:]] == [5, 5, 3]  # 20 numbers each; the first question was which library
    assert_close(total, exact(left, right).float() + (0.0 if fresh else 2.0), **CLOSE)


def read(layer: nn.Linear, x: Tensor, trained: str) -> list[Tensor | None]:
    """The output and the gradients for another weight on each output."""
    x = x.detach().clone().requires_grad_("x" in trained)
    layer.weight.requires_grad_("w" in trained)
    if layer.bias is not None:
        layer.bias.requires_grad_("b" in trained)
    out = layer(x)
    if trained:
        (out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum().backward()
    return [out.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad]


@pytest.mark.parametrize("trained", ["xwb", "x", "w", "b", "xw", ""])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_gradients_of_a_layer_are_torch_s(onednn, shape, trained):
    results = []
    for kind in (nn.Linear, ProductLinear):
        layer = kind(5, 4)
        with torch.no_grad():
            layer.weight.copy_(drawn(4, 5, seed=1))
            layer.bias.copy_(drawn(4, seed=2))
        results.append(read(layer, drawn(*shape), trained))
    for want, got in zip(*results, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            assert_close(got, want, **CLOSE)
    assert len(onednn) == 1 + ("x" in trained) + ("w" in trained)  # no product that nobody reads


def test_gradients_by_hand(onednn):
    """y = 2 x1 + 3 x2 + 5 at (7, 11): 52. Gradients of y: x (2, 3), weights (7, 11), bias 1."""
    layer = ProductLinear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 3.0]]))
        layer.bias.fill_(5.0)
    x = torch.tensor([[7.0, 11.0]], requires_grad=True)
    layer(x).sum().backward()
    assert (layer(x).item(), x.grad.tolist(), layer.weight.grad.tolist(), layer.bias.grad.tolist()) == (
        52.0, [[2.0, 3.0]], [[7.0, 11.0]], [1.0],
    )  # fmt: skip


def test_autocast_and_other_precisions_are_torch_s(onednn):
    layer, x = ProductLinear(5, 4), drawn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert not onednn


def test_the_layers_of_a_network(monkeypatch):
    class Own(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(2, 2), Own(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    names = list(network.state_dict())
    monkeypatch.setattr("rto.models.linear.onednn_is_faster", lambda: False)
    use_products(network)
    assert type(network[0]) is nn.Linear
    monkeypatch.setattr("rto.models.linear.onednn_is_faster", lambda: True)
    use_products(network)
    assert [type(network[0]), type(network[1]), type(network[2][0])] == [ProductLinear, Own, ProductLinear]
    assert list(network.state_dict()) == names


def test_large_products_of_the_output_layer(onednn):
    """The whole of it by oneDNN, against torch's way in float64."""
    states, weight, labels = drawn(7, 5), drawn(23, 5, seed=1), torch.arange(7) * 3
    results = []
    for dtype in (torch.float32, torch.float64):
        for frozen in (True, False):
            x, w = (t.to(dtype, copy=True).requires_grad_() for t in (states, weight))
            w.requires_grad_(not frozen)
            logprobs, _ = selected_logprobs(x, w, labels, block=10)
            (logprobs * torch.arange(1.0, 8.0)).sum().backward()
            results.append([t.float() for t in (logprobs.detach(), x.grad, w.grad) if t is not None])
    assert len(onednn) == 3 * 2 + 3 * (4 + 1)  # products of three blocks; add_product asks twice
    for got, want in zip(results[:2], results[2:], strict=True):
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, **CLOSE)


@pytest.mark.parametrize(
    ("capability", "maker", "faster"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX512", "", False),  # not told
        ("AVX2", "AuthenticAMD", False),
    ],
)
def test_the_processor_decides(tmp_path, monkeypatch, capability, maker, faster):
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this PyTorch has one library only")
    told = f"processor\t: 0\nvendor_id\t: {maker}\nmodel name\t: A processor\n" if maker else "processor: 0\n"
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(products, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    onednn_is_faster.cache_clear()
    try:
        assert onednn_is_faster() is faster
        monkeypatch.setattr(products, "PROCESSOR", tmp_path / "none")
        onednn_is_faster.cache_clear()
        assert not onednn_is_faster()
    finally:
        onednn_is_faster.cache_clear()


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_a_model_s_losses_and_gradients(onednn, monkeypatch, lora):
    """All of a pass, what is kept for gradients and the adapters included."""
    results = []
    for ours in (False, True):
        torch.manual_seed(0)
        monkeypatch.setattr(products, "MULTIPLICATIONS", 0 if ours else 10**9)
        settings = hf.LlamaConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            initializer_range=0.3, bos_token_id=None, eos_token_id=1,
        )  # fmt: skip
        shared = Backbone(hf.LlamaForCausalLM(settings).eval(), "tiny", lora, torch.float32)
        if lora is not None:
            shared.add_adapter("policy")
        role = Role(shared, "policy" if lora is not None else None)
        for p in role.parameters():
            p.data += 0.1 * torch.randn(p.shape)
            p.requires_grad_()
        onednn.clear()
        logprobs, _ = role.logprobs(
            collate_completions([[3, 4], [5]], [[6, 7, 8], [9, 10, 11, 12, 1]], [False, True], pad=0)
        )
        logprobs.sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in role.parameters())])
        assert (len(onednn) > 40) is ours
    for want, got in zip(*results, strict=True):
        assert_close(got, want, atol=1e-5 * max(1.0, float(want.abs().max())), rtol=0)


def test_few_kernels_are_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"})  # a user's own
    use_products(nn.Linear(2, 2))
    assert os.environ == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7", "LRU_CACHE_CAPACITY": "64"}


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_gradients_of_gradients_are_refused(onednn, lora):
    """oneDNN's products have none: they would be left out without a word."""
    network = nn.Sequential(nn.Linear(5, 4))
    use_products(network)
    if lora is not None:
        layer = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), network, adapter_name="a")[0]
        add_in_place([layer])
    x = drawn(3, 5).requires_grad_()
    (once,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_linear_without_a_layer(onednn):
    x, weight = drawn(3, 5), drawn(4, 5, seed=1).requires_grad_()
    with torch.no_grad():
        assert_close(linear(x, weight), exact(x, weight.detach()), **CLOSE)
    out = linear(x, weight)
    assert out.requires_grad and not linear(x, weight.detach()).requires_grad
