"""LoRA layers that add in place against peft's own forward pass."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.testing import assert_close

from rto.models.lora import AddingLinear, add_in_place


def layer(bias: bool = True, dtype: torch.dtype = torch.float64) -> Linear:
    """5 inputs, 3 outputs and an adapter "a" of rank 2 with scaling 1.5 and random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3, bias=bias, dtype=dtype)).requires_grad_(False)
        settings = LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
        made = inject_adapter_in_model(settings, model, adapter_name="a")[0]
        for weights in (made.lora_A, made.lora_B):
            weights["a"].to(dtype)
            nn.init.normal_(weights["a"].weight)
    return made


def read(made: Linear, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the adapter for another weight on each output."""
    x = x.clone().requires_grad_()
    out = made(x)
    (out * torch.arange(1.0, out.numel() + 1, dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(part.grad for part in (x, made.lora_A["a"].weight, made.lora_B["a"].weight))]


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_what_peft_says(bias, shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = read(layer(bias), x)
    changed = layer(bias)
    add_in_place([changed])
    assert type(changed) is AddingLinear
    for got, want in zip(read(changed, x), expected, strict=True):
        assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_by_hand():
    """W = 2, A = 3, B = 5, scaling 1.5: (2 + 1.5 * 5 * 3) * 10 = 245."""
    made = layer(bias=False)
    add_in_place([made])
    with torch.no_grad():
        made.base_layer.weight.zero_()[0, 0] = 2
        made.lora_A["a"].weight.zero_()[0, 0] = 3
        made.lora_B["a"].weight.zero_()[0, 0] = 5
        assert made(torch.tensor([[10.0, 0, 0, 0, 0]], dtype=torch.float64)).tolist() == [[245.0, 0.0, 0.0]]


def test_the_layer_below_keeps_its_weights_and_output():
    made = layer()
    add_in_place([made])
    before = [made.base_layer.weight.clone(), made.base_layer.bias.clone()]
    x = torch.ones(2, 5, dtype=torch.float64)
    plain = made.base_layer(x)
    with torch.no_grad():
        made(x)
    assert torch.equal(made.base_layer(x), plain)
    assert torch.equal(made.base_layer.weight, before[0]) and torch.equal(made.base_layer.bias, before[1])


@pytest.mark.parametrize("what", ["disabled", "merged", "half", "autocast", "two"])
def test_what_is_not_plain_is_left_to_peft(what):
    found = []
    for change in (False, True):
        made = layer(dtype=torch.float32)
        if change:
            add_in_place([made])
        x = torch.ones(2, 5)
        if what == "disabled":
            made.enable_adapters(False)
        elif what == "merged":
            made.merge(adapter_names=["a"])
        elif what == "half":
            made.base_layer.to(torch.bfloat16)
            x = x.bfloat16()
        elif what == "two":
            made.update_layer("b", r=2, lora_alpha=2, init_lora_weights=True, config=LoraConfig(r=2))
            nn.init.ones_(made.lora_B["b"].weight)
            nn.init.ones_(made.lora_A["b"].weight)
            made.set_adapter(["a", "b"])
        with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
            found.append(made(x).detach())
    assert torch.equal(*found)


def test_under_autocast_the_input_is_not_made_float32_and_back():
    """Which would change no number: gradients come out as peft has them, to the bit."""
    found = []
    for autocast in (False, True):
        made = layer(dtype=torch.float32)
        made.base_layer.to(torch.bfloat16)
        add_in_place([made], autocast)
        inputs: list[torch.dtype] = []
        made.lora_A["a"].register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(read(made, torch.linspace(-1, 1, 20).view(4, 5).bfloat16()))
        assert inputs == [torch.bfloat16 if autocast else torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_pefts_linear_layers_are_changed():
    others = [nn.Linear(2, 2), nn.LayerNorm(2)]
    add_in_place(others)
    assert [type(module) for module in others] == [nn.Linear, nn.LayerNorm]
