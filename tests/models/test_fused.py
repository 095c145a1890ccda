import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rto.models import fused
from rto.models.fused import FusedGate, FusedNorm, fuse
from rto.models.kept import Kept

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def network(kind: Any = LlamaConfig, **more: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(kind(**SIZES, **HEADS, **more))
    for p in made.parameters():  # norms that are not 1
        p.data += 0.2 * torch.randn_like(p)
    return made.eval()


def gradients(net: Any, ids: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(input_ids=ids).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_the_formulas_in_double() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    by_hand = w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(fused.normalised(x, w, 1e-3), by_hand, rtol=0, atol=1e-14)
    up = torch.randn_like(x)
    torch.testing.assert_close(fused.gated(x, up), x / (1 + (-x).exp()) * up, rtol=0, atol=1e-14)


def test_gradients_in_double() -> None:
    torch.manual_seed(0)
    x, up = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: fused._Normalised.apply(x, w, 1e-3), (x, w))
    assert torch.autograd.gradcheck(fused._Gated.apply, (x, up))


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e15])
def test_extreme_inputs(size: float) -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]]) * size
    norm = LlamaRMSNorm(3)
    plain = norm(x)
    fuse(norm)
    torch.testing.assert_close(norm(x), plain)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("kept", [False, True])
def test_equal_to_the_family_s_own(kind: Any, kept: bool) -> None:
    plain = network(kind)
    ours = copy.deepcopy(plain)
    fuse(ours)
    kinds = {type(m).__mro__[1] for m in ours.modules() if isinstance(m, FusedNorm | FusedGate)}
    assert kinds == {FusedNorm, FusedGate}
    ids = torch.randint(50, (2, 7))
    expected = gradients(plain, ids)
    if kept:
        ours.zero_grad()
        with Kept(ours):
            logits = ours(input_ids=ids).logits
        logits.square().mean().backward()
        found = {name: p.grad for name, p in ours.named_parameters()}
    else:
        found = gradients(ours, ids)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_layers_that_only_look_alike_are_left_alone() -> None:
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1

    class OtherMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(hidden_states) * (1 if gate is None else gate)

    net = network()
    settings = net.config
    for module in (OtherRMSNorm(4), OtherMLP(settings), GatedRMSNorm(4)):
        fuse(module)
        assert not isinstance(module, FusedNorm | FusedGate)
    gemma = network(Gemma2Config, head_dim=4)  # adds 1 to its norms' weights; its gate is another function
    fuse(gemma)
    assert not any(isinstance(m, FusedNorm | FusedGate) for m in gemma.modules())


def test_nobody_s_random_numbers_change() -> None:
    net = network()
    before = torch.random.get_rng_state()
    fuse(net)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bfloat16_is_the_family_s_own() -> None:
    net = network().bfloat16()
    ids = torch.randint(50, (1, 5))
    plain = net(input_ids=ids).logits
    fuse(net)
    assert torch.equal(net(input_ids=ids).logits, plain)
