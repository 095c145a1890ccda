"""Copies of weights for sampling: exact, of this moment, and gone when the sampling is over."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from rto.config import Lora
from rto.models import prepacked
from rto.models.prepacked import STEPS, Prepacked, copied
from rto.models.role import Backbone, Role

IDS = torch.arange(2, 14).reshape(3, 4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Weights of the test's models are large enough."""
    monkeypatch.setattr(prepacked, "NUMBERS", 1)


def network(**more) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    settings = hf.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.3, bos_token_id=None, eos_token_id=1, **more,
    )  # fmt: skip
    return hf.LlamaForCausalLM(settings).eval()


def adapted(noise: float = 0.1) -> tuple[Role, Role]:
    """A policy whose adapter does something, and the reference below it."""
    shared = Backbone(network(), "tiny", Lora(r=4), torch.float32)
    shared.add_adapter("policy")
    policy = Role(shared, "policy")
    with torch.no_grad():
        for p in policy.parameters():
            p += noise * torch.randn(p.shape)
    return policy, Role(shared)


@torch.no_grad()
def logits(role: Role) -> torch.Tensor:
    backbone = role.activate()
    return backbone.project(backbone.states(IDS).flatten(0, 1))


def untouched(role: Role) -> bool:
    return not any("forward" in vars(module) for module in role.backbone.network.modules())


@pytest.mark.parametrize("more", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_a_full_model_says_the_same(more):
    role = Role(Backbone(network(**more), "tiny", None, torch.float32))
    plain = logits(role)
    before = {key: value.clone() for key, value in role.backbone.network.state_dict().items()}
    copies = Prepacked(role, STEPS)
    with torch.no_grad(), copies.acting():
        assert not untouched(role)
        torch.testing.assert_close(logits(role), plain, atol=1e-5, rtol=0)
        assert role.backbone.network.state_dict().keys() == before.keys(), "a checkpoint written now has no copies"
    assert untouched(role) and torch.equal(logits(role), plain)
    for key, value in role.backbone.network.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("packs", [True, False])
def test_an_adapter_is_folded_in(packs, monkeypatch):
    if not packs:  # a build without oneDNN, or small weights
        monkeypatch.setattr(prepacked, "NUMBERS", 10**9)
    policy, reference = adapted()
    plain, below = logits(policy), logits(reference)
    assert (plain - below).abs().max() > 0.1
    with torch.no_grad(), Prepacked(policy, STEPS).acting():
        torch.testing.assert_close(logits(policy), plain, atol=1e-5, rtol=0)
        adapters = [m for m in policy.backbone.network.modules() if hasattr(m, "lora_A")]
        assert adapters and all("forward" in vars(m) for m in adapters), "no adapter runs by itself"
    with torch.no_grad(), Prepacked(reference, STEPS).acting():
        torch.testing.assert_close(logits(reference), below, atol=1e-5, rtol=0)
    assert untouched(policy) and torch.equal(logits(reference), below) and torch.equal(logits(policy), plain)


def test_copies_are_of_the_moment():
    policy, _ = adapted()
    stale = Prepacked(policy, STEPS)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1
    plain = logits(policy)
    with torch.no_grad(), stale.acting():
        assert (logits(policy) - plain).abs().max() > 0.1
    with torch.no_grad(), Prepacked(policy, STEPS).acting():
        torch.testing.assert_close(logits(policy), plain, atol=1e-5, rtol=0)


def test_they_go_when_sampling_fails_and_never_see_a_gradient():
    policy, _ = adapted()
    copies = Prepacked(policy, STEPS)
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad(), copies.acting():
        raise RuntimeError("out of memory")
    assert untouched(policy)
    with pytest.raises(AssertionError, match="gradients"), copies.acting():
        pass
    assert untouched(policy)
    for p in policy.parameters():
        p.requires_grad_(True)
    policy.activate().states(IDS).sum().backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_what_is_not_copied(monkeypatch):
    policy, reference = adapted()
    plain = Role(Backbone(network(), "tiny", None, torch.float32))
    assert len(copied(plain, STEPS)) == len(copied(policy, STEPS)) == 2 * 7 + 1, "seven layers a block, and the output"
    assert copied(policy, STEPS - 1) == [], "too few steps"
    assert copied(Role(Backbone(network().bfloat16(), "tiny", None, torch.bfloat16)), STEPS) == []
    assert copied(Role(Backbone(network().to("meta"), "tiny", None, torch.float32)), STEPS) == [], "not on a CPU"
    monkeypatch.setattr(prepacked, "NUMBERS", 10**9)
    assert copied(plain, STEPS) == copied(reference, STEPS) == [], "small weights"
    assert len(copied(policy, STEPS)) == 2 * 7, "but adapters are folded in"
