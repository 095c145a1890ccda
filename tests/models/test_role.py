"""Roles give the numbers of plain transformers, whatever the padding; adapters keep to themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from rto.batch import Completions, Prompts
from rto.config import Lora
from rto.data.collate import collate_completions
from rto.models.load import without_dropout
from rto.models.role import Backbone, Role
from rto.models.workshop import verify

V, PAD, END = 61, 0, 2
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = SIZE | {"num_key_value_heads": 2, "initializer_range": 0.3}


def network(cls=hf.LlamaForCausalLM, config=hf.LlamaConfig, **settings) -> hf.PreTrainedModel:
    settings = settings or GROUPED
    torch.manual_seed(0)
    return cls(config(vocab_size=V, pad_token_id=PAD, bos_token_id=1, eos_token_id=END, **settings)).eval()


def backbone(lora: bool = False, checkpointing: bool = False, cls=hf.LlamaForCausalLM) -> Backbone:
    settings = Lora(r=4, alpha=8) if lora else None
    return Backbone(network(cls, num_labels=1, **GROUPED), "tiny", settings, torch.float32, checkpointing)


def adapter(shared: Backbone, name: str, seed: int | None = None, head: bool = False) -> Role:
    """A role of its own adapter; with a seed, every weight of it is drawn anew."""
    shared.add_adapter(name)
    role = Role(shared, name, nn.Linear(32, 1, bias=False) if head else None)
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in role.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) * 0.2)
    return role


PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
ANSWERS = [[20, 21, END], [22, 23, 24, 25, END], [26]]


def batch(rows: list[int] | None = None) -> Completions:
    rows = [0, 1, 2] if rows is None else rows
    return collate_completions([PROMPTS[i] for i in rows], [ANSWERS[i] for i in rows], [True] * len(rows), PAD)


def plain_logprobs(model: nn.Module, prompt: list[int], answer: list[int], temperature: float = 1.0) -> Tensor:
    """The formula: log softmax of the model's own logits, one row, no padding."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(answer)), answer]


# --- numbers ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_plain_transformers(temperature):
    shared = backbone()
    logprobs, entropy = Role(shared).logprobs(batch(), temperature)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        expected = plain_logprobs(shared.network, prompt, answer, temperature)
        torch.testing.assert_close(logprobs[i, : len(answer)], expected, atol=1e-5, rtol=0)
        assert (logprobs[i, len(answer) :] == 0).all()
        logits = shared.network(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        spread = torch.distributions.Categorical(logits=logits / temperature).entropy()
        torch.testing.assert_close(entropy[i, : len(answer)], spread, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_are_the_same_alone():
    role = Role(backbone())
    together = role.logprobs(batch())[0]
    for i, answer in enumerate(ANSWERS):
        alone = role.logprobs(batch([i]))[0]
        torch.testing.assert_close(alone[0], together[i, : len(answer)], atol=1e-5, rtol=0)


@torch.no_grad()
def test_scalars_are_read_where_they_should():
    shared = backbone()
    role = Role(shared, head=nn.Linear(32, 1))
    rows = batch()
    values, tokens, scores = role.values(rows), role.token_scores(rows), role.scores(rows)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        p, t = len(prompt), len(answer)
        states = shared.body(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0]
        every = role.head(states).squeeze(-1)
        torch.testing.assert_close(values[i, :t], every[p - 1 : -1], atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens[i, :t], every[p:], atol=1e-5, rtol=0)
        torch.testing.assert_close(scores[i], every[-1], atol=1e-5, rtol=0)
        assert (values[i, t:] == 0).all() and (tokens[i, t:] == 0).all()


@torch.no_grad()
def test_scalars_are_float32_from_bfloat16_weights():
    role = Role(backbone(), head=nn.Linear(32, 1).bfloat16())
    assert role.scores(batch()).dtype == torch.float32


@torch.no_grad()
def test_bfloat16_is_near_float32():
    exact = Role(backbone()).logprobs(batch())[0]
    rough = Role(Backbone(network(), "tiny", None, torch.bfloat16)).logprobs(batch())[0]
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.2


# --- families -----------------------------------------------------------------------------------------

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
GEMMA2 = GROUPED | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 3}
FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": network,
    "gpt2": lambda: network(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT2),
    "qwen2": lambda: network(hf.Qwen2ForCausalLM, hf.Qwen2Config, **GROUPED),
    "gemma2": lambda: network(hf.Gemma2ForCausalLM, hf.Gemma2Config, **GEMMA2),  # soft cap, sliding window
    "mistral": lambda: network(hf.MistralForCausalLM, hf.MistralConfig, sliding_window=3, **GROUPED),
    "granite": lambda: network(hf.GraniteForCausalLM, hf.GraniteConfig, logits_scaling=8.0, **GROUPED),
    "cohere": lambda: network(hf.CohereForCausalLM, hf.CohereConfig, **GROUPED),
    "neox": lambda: network(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **SIZE, initializer_range=0.3),
    "opt": lambda: network(hf.OPTForCausalLM, hf.OPTConfig, hidden_size=32, num_hidden_layers=2, ffn_dim=64,
                           num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3),
    "bloom": lambda: network(hf.BloomForCausalLM, hf.BloomConfig, hidden_size=32, n_layer=2, n_head=4,
                             initializer_range=0.3),  # takes no positions: it reads them from the mask
    "lfm2": lambda: network(hf.Lfm2ForCausalLM, hf.Lfm2Config, layer_types=["conv", "full_attention"], **GROUPED),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_accepts(family):
    assert verify(Role(Backbone(FAMILIES[family](), family, None, torch.float32)), END) < 1e-4


def test_verify_refuses_logits_that_we_do_not_reproduce():
    model = network()
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match=r"odd \(LlamaForCausalLM\).*hidden states.*choose another"):
        verify(Role(Backbone(model, "odd", None, torch.float32)), END)


def test_verify_refuses_a_recurrent_family():
    """To a recurrence, padding on the left is a beginning of its own."""
    settings = SIZE | {"num_hidden_layers": 3, "lru_width": 32}
    model = network(hf.RecurrentGemmaForCausalLM, hf.RecurrentGemmaConfig, **settings)
    with pytest.raises(ValueError, match="recurrent.*sampling steps differ from the model's own.*choose another"):
        verify(Role(Backbone(model, "recurrent", None, torch.float32)), END)


def test_verify_refuses_a_cache_whose_rows_stay_where_they_are(monkeypatch):
    """In sampling, answers to one prompt share its pass, and rows that have ended leave."""

    def deaf(self, beam_idx):
        rows = torch.arange(len(beam_idx)) % len(self.keys)
        self.keys, self.values = self.keys[rows], self.values[rows]

    monkeypatch.setattr(hf.cache_utils.DynamicLayer, "reorder_cache", deaf)
    with pytest.raises(ValueError, match="sampling steps differ"):
        verify(Role(backbone()), END)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_verify_refuses_random_layers_where_they_are_trained(checkpointing):
    """Evaluation mode hides them, but checkpointing needs training mode."""
    random = network(attention_dropout=0.5, **GROUPED)
    role = Role(Backbone(random, "odd", None, torch.float32, checkpointing))
    if checkpointing:
        with pytest.raises(ValueError, match="passes in training mode.*set model.gradient_checkpointing = false"):
            verify(role, END)
        without_dropout(random)
    assert verify(role, END) < 1e-4
    assert not random.training


def test_verify_refuses_an_end_without_an_embedding():
    with pytest.raises(ValueError, match="tiny has 61 words.*id 61"):
        verify(Role(backbone()), V)


# --- adapters -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_fresh_adapter_is_the_base_bit_for_bit():
    shared = backbone(lora=True)
    before = Role(shared).logprobs(batch())[0]
    role = adapter(shared, "policy")
    assert torch.equal(role.logprobs(batch())[0], before)
    assert torch.equal(Role(shared).logprobs(batch())[0], before)


def test_training_one_adapter_changes_no_other():
    shared = backbone(lora=True)
    roles = {"reference": Role(shared), "guide": adapter(shared, "guide", 1), "scorer": adapter(shared, "scorer", 2)}
    policy = adapter(shared, "policy", 3)

    @torch.no_grad()
    def answers() -> dict[str, Tensor]:
        return {name: role.logprobs(batch())[0] for name, role in roles.items()}

    before, own = answers(), policy.logprobs(batch())[0].detach()
    for p in policy.parameters():
        p.requires_grad_(True)
    policy.logprobs(batch())[0].sum().backward()
    torch.optim.SGD(policy.parameters(), lr=0.01).step()
    after = answers()
    assert all(torch.equal(before[name], after[name]) for name in roles)
    assert not torch.equal(policy.logprobs(batch())[0], own)


@pytest.mark.parametrize("head", [False, True])
def test_only_the_trained_role_gets_gradients(head):
    shared = backbone(lora=True)
    trained, other = adapter(shared, "critic", 1, head), adapter(shared, "scorer", 2, head)
    for p in trained.parameters():
        p.requires_grad_(True)
    assert not any(p.requires_grad for p in other.parameters() if p is not getattr(other.head, "weight", None))
    loss = trained.values(batch()) if head else trained.logprobs(batch())[0]
    with torch.no_grad():  # another role's turn between forward and backward
        Role(shared).logprobs(batch())
    loss.sum().backward()
    own = {id(p) for p in trained.parameters()}
    got = {id(p) for p in [*shared.network.parameters(), *trained.parameters()] if p.grad is not None}
    assert got == own
    assert all(p.grad.abs().sum() > 0 for p in trained.parameters())


def test_a_later_adapter_leaves_the_trained_one_trainable():
    shared = backbone(lora=True)
    policy = adapter(shared, "policy")
    for p in policy.parameters():
        p.requires_grad_(True)
    later = adapter(shared, "later")
    later.activate()
    Role(shared).activate()
    assert all(p.requires_grad for p in policy.parameters())
    assert not any(p.requires_grad for p in later.parameters())


def test_names_within_names_stay_apart():
    """Parts of the network's own names, and names that begin alike."""
    shared = backbone(lora=True)
    roles = [adapter(shared, name) for name in ("rl", "rl-2", "mlp", "weight")]
    sizes = {len(role.parameters()) for role in roles}
    assert sizes == {2 * 7 * 2}  # A and B of 7 linear layers in each of 2 blocks
    everything = [p for role in roles for p in role.parameters()]
    assert len({id(p) for p in everything}) == len(everything)


def test_a_full_model_takes_no_adapter():
    with pytest.raises(ValueError, match="lora.r"):
        backbone().add_adapter("policy")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(lora, head):
    """Another role's turn before the backward pass must not change what is recomputed."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        cls = hf.LlamaForSequenceClassification if head and not lora else hf.LlamaForCausalLM
        shared = backbone(lora, checkpointing, cls)
        whole = Role(shared, head=shared.network.score if head and not lora else None)
        role = adapter(shared, "policy", 1, head) if lora else whole
        for p in role.parameters():
            p.requires_grad_(True)
        loss = role.values(batch()) if head else role.logprobs(batch())[0]
        if lora:
            with torch.no_grad():
                Role(shared).hidden(batch())
        loss.sum().backward()
        return [p.grad for p in role.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 0
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_checkpointing_recomputes_the_layers():
    """The layers run a second time in the backward pass, and not without gradients."""
    role = Role(backbone(checkpointing=True))
    calls = []
    role.backbone.network.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    role.logprobs(batch())[0].sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        role.logprobs(batch())
    assert len(calls) == 3


@torch.no_grad()
def test_an_empty_answer_scores_zero():
    rows = batch()
    mask = rows.mask.clone()
    mask[1] = False
    rows = Completions(Prompts(rows.prompt.ids, rows.prompt.mask), rows.ids, mask, rows.finished)
    role = Role(backbone(), head=nn.Linear(32, 1))
    assert role.scores(rows)[1] == 0 and role.scores(rows)[0] != 0
    assert (role.logprobs(rows)[0][1] == 0).all()
