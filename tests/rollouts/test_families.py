"""Sampling from other families of models, with copies of weights and with adapters: log-probs are a fresh pass's."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from rto.batch import Rollouts
from rto.config import Lora
from rto.models import prepacked
from rto.models.role import Backbone, Role
from rto.rollouts.generate import generate
from rto.rollouts.score import token_logprobs

V, PAD, END = 23, 0, 2
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [5, 6, 7, 8], [12, 13, 14], [5, 6, 7, 8], [9], [15, 16]]  # some of them twice
SIZES = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "initializer_range": 0.3, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END,
}  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
GEMMA = {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0}
QWEN_NEXT = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_experts": 4}
QWEN_NEXT |= {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "num_experts_per_tok": 2,
}
QWEN_NEXT |= {"linear_value_head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
FAMILIES = {
    "llama, tied": (hf.LlamaConfig, SIZES | {"tie_word_embeddings": True}),
    "llama, eager": (hf.LlamaConfig, SIZES | {"attn_implementation": "eager"}),
    "qwen2, biases": (hf.Qwen2Config, SIZES),
    "gemma2": (hf.Gemma2Config, SIZES | GEMMA | {"attn_implementation": "eager"}),
    "gpt2": (hf.GPT2Config, GPT2 | {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END}),
    "mistral, window": (hf.MistralConfig, SIZES | {"sliding_window": 3}),
    "mixtral": (hf.MixtralConfig, SIZES | {"num_local_experts": 4}),
    "lfm2, conv": (hf.Lfm2Config, SIZES | {"layer_types": ["conv", "full_attention"]}),
    "qwen3 next, linear": (hf.Qwen3NextConfig, SIZES | QWEN_NEXT),
    "falcon h1, both": (hf.FalconH1Config, SIZES | FALCON_H1),
}


CASES = [(family, False) for family in FAMILIES] + [(family, True) for family in list(FAMILIES)[:4]]


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_log_probs_are_those_of_a_fresh_pass(family, lora, monkeypatch):
    """With left padding, prompts of a group, rows that leave, and a head."""
    monkeypatch.setattr(prepacked, "NUMBERS", 1)
    monkeypatch.setattr(prepacked, "STEPS", 1)
    torch.manual_seed(0)
    config, settings = FAMILIES[family]
    network = hf.AutoModelForCausalLM.from_config(config(**settings)).eval()
    backbone = Backbone(network, "tiny", Lora(r=4) if lora else None, torch.float32)
    if lora:
        backbone.add_adapter("policy")
    policy = Role(backbone, "policy" if lora else None)
    with torch.no_grad():
        for p in policy.parameters() if lora else []:
            p += 0.1 * torch.randn(p.shape)
    head = torch.nn.Linear(32, 1)
    assert prepacked.copied(policy, 12), "something is copied"

    def sample(end: int) -> Rollouts:
        names = [("rollouts", i) for i in range(len(PROMPTS))]
        return generate(policy, PROMPTS, names, seed=0, limit=12, end=end, pad=PAD, temperature=1.5, head=head)

    endless = sample(end=-1).completions.ids
    found = sample(end=int(endless[0, 4]))
    written = found.completions.mask
    assert 1 <= written[0].sum() <= 5 and written.all(-1).any(), "some rows leave, some do not"
    assert torch.equal(found.completions.ids[written], endless[written])
    fresh = token_logprobs(policy, found.completions, 10_000, 1.5)
    torch.testing.assert_close(found.logprobs, fresh, atol=1e-5, rtol=0)
    values = Role(backbone, policy.adapter, head).values(found.completions).detach()
    torch.testing.assert_close(found.values, values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_are_refused_where_they_would_stretch(kind):
    """Beyond 8 positions every row would be read otherwise, and keys in the cache would keep the earlier positions. So
    sampling does not begin, and up to there nothing changes."""
    torch.manual_seed(0)
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}
    settings = hf.LlamaConfig(**SIZES, max_position_embeddings=8 if kind == "dynamic" else 64, rope_parameters=rope)
    policy = Role(Backbone(hf.LlamaForCausalLM(settings).eval(), "tiny", None, torch.float32))
    names = [("rollouts", i) for i in range(2)]
    found = generate(policy, PROMPTS[:2], names, seed=0, limit=4, end=-1, pad=PAD)
    fresh = token_logprobs(policy, found.completions, 10_000)
    torch.testing.assert_close(found.logprobs, fresh, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="9 tokens.*8 positions before they stretch, for every row"):
        generate(policy, PROMPTS[:2], names, seed=0, limit=5, end=-1, pad=PAD)
