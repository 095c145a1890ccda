"""Attention shares are those of plain transformers, and the model is afterwards what it was."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from rto.batch import Completions
from rto.config import Lora
from rto.data.collate import collate_completions
from rto.models.role import Backbone, Role
from rto.rollouts.attention import attention_weights

V, PAD, END = 41, 0, 2
SIZE = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.4, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END,
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4, "pad_token_id": PAD,
    "bos_token_id": None, "eos_token_id": END,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14]]
ANSWERS = [[20, 21, END], [22, 23, 24, 25, END], [26], [27, 28]]


def network(family: str = "llama") -> hf.PreTrainedModel:
    torch.manual_seed(0)
    if family == "classifier":
        return hf.LlamaForSequenceClassification(hf.LlamaConfig(num_labels=1, **SIZE)).eval()
    if family == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)).eval()
    if family == "window":  # a token sees two others and itself
        return hf.MistralForCausalLM(hf.MistralConfig(sliding_window=3, num_key_value_heads=2, **SIZE)).eval()
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **SIZE)).eval()


def role(family: str = "llama") -> Role:
    made = network(family)
    return Role(Backbone(made, "tiny", None, torch.float32), head=getattr(made, "score", None))


def batch(rows: list[int] | None = None, width: int | None = None) -> Completions:
    rows = [0, 1, 2, 3] if rows is None else rows
    done = [ANSWERS[i][-1] == END for i in rows]
    return collate_completions([PROMPTS[i] for i in rows], [ANSWERS[i] for i in rows], done, PAD, width)


@torch.no_grad()
def plain(model: nn.Module, row: int, reading: str) -> Tensor:
    """The formulas on one row, from transformers' own output."""
    model.set_attn_implementation("eager")
    prompt, answer = PROMPTS[row], ANSWERS[row]
    weights = model(input_ids=torch.tensor([prompt + answer]), output_attentions=True).attentions[-1][0].mean(0)
    model.set_attn_implementation("sdpa")
    paid, n = weights[len(prompt) :, len(prompt) :], len(answer)
    if n == 1:
        return torch.ones(1)
    shares = paid[-1]
    if reading == "mean":
        steps = [[paid[s, t] for s in range(t, n - 1) if paid[s, t] > 0] for t in range(n)]
        shares = torch.stack([torch.stack(seen).mean() if seen else torch.tensor(0.0) for seen in steps])
    return shares / shares.sum()


@pytest.mark.parametrize("reading", ["last", "mean"])
@pytest.mark.parametrize("family", ["llama", "classifier", "gpt2", "window"])
def test_shares_are_those_of_plain_transformers(family, reading):
    reader = role(family)
    found = attention_weights(reader, batch(width=7), reading, 10_000)
    assert found.shape == (4, 7) and found.dtype == torch.float32
    for row, answer in enumerate(ANSWERS):
        expected = plain(reader.backbone.network, row, reading)
        torch.testing.assert_close(found[row, : len(answer)], expected, atol=1e-5, rtol=0)
        assert (found[row, len(answer) :] == 0).all()


@pytest.mark.parametrize("reading", ["last", "mean"])
def test_rows_sum_to_one_and_are_the_same_alone(reading):
    reader = role()
    together = attention_weights(reader, batch(), reading, 10_000)
    assert (together >= 0).all()
    torch.testing.assert_close(together.sum(-1), torch.ones(4))
    for row, answer in enumerate(ANSWERS):
        alone = attention_weights(reader, batch([row]), reading, 10_000)
        torch.testing.assert_close(alone[0], together[row, : len(answer)], atol=1e-5, rtol=0)


def test_the_last_token_has_no_share_of_the_mean_unless_it_is_alone():
    """No step came after it."""
    found = attention_weights(role(), batch(), "mean", 10_000)
    ends = [row[len(answer) - 1].item() for row, answer in zip(found, ANSWERS, strict=True)]
    assert ends == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("budget", [1, 600, 10_000])
def test_any_budget_gives_the_same_and_weights_keep_within_it(budget):
    """A layer's weights are no more numbers than the hidden states of ``budget`` tokens, or those of one row."""
    reader, sizes = role(), []
    layer = reader.backbone.body.layers[0].self_attn
    hook = layer.register_forward_hook(lambda module, args, out: sizes.append((out[1].numel(), len(out[1]))))
    found = attention_weights(reader, batch(), "last", budget)
    hook.remove()
    assert all(rows == 1 or numbers <= budget * 32 for numbers, rows in sizes)
    assert len(sizes) == (4 if budget == 1 else 1)
    torch.testing.assert_close(found, attention_weights(role(), batch(), "last", 10_000), atol=1e-5, rtol=0)


def test_an_adapter_acts():
    shared = Backbone(network(), "tiny", Lora(r=4, alpha=8), torch.float32)
    shared.add_adapter("mine")
    mine, base = Role(shared, "mine"), Role(shared)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs = attention_weights(base, batch(), "last", 10_000)
    torch.testing.assert_close(theirs, attention_weights(role(), batch(), "last", 10_000), atol=1e-5, rtol=0)
    assert (attention_weights(mine, batch(), "last", 10_000) - theirs).abs().max() > 0.01


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_the_model_is_what_it_was(before):
    reader = role()
    reader.backbone.network.set_attn_implementation(before)
    attention_weights(reader, batch(), "last", 10_000)
    check_untouched(reader, before)


def check_untouched(reader: Role, attention: str) -> None:
    network = reader.backbone.network
    assert network.config._attn_implementation == reader.backbone.body.config._attn_implementation == attention
    assert not any(module._forward_hooks for module in network.modules())


def test_the_model_is_what_it_was_after_an_error():
    reader = role()
    broken = batch()
    broken.ids[0, 0] = V  # no such word
    with pytest.raises(IndexError):
        attention_weights(reader, broken, "last", 10_000)
    check_untouched(reader, "sdpa")


def test_memory_of_one_layer():
    """Nobody asks for the weights of every layer: transformers' own hooks are not even there."""
    reader = role()
    attention_weights(reader, batch(), "mean", 10_000)
    assert not getattr(reader.backbone.body, "_output_capturing_hooks_installed", False)


def test_a_family_without_weights_is_refused():
    """A state space model has no attention."""
    settings = hf.MambaConfig(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=PAD)
    reader = Role(Backbone(hf.MambaForCausalLM(settings).eval(), "snake", None, torch.float32))
    with pytest.raises(ValueError, match="snake: MambaForCausalLM gives no attention weights"):
        attention_weights(reader, batch(), "last", 10_000)


def test_nothing_paid_to_the_response_leaves_the_whole_to_the_end():
    """All attention goes to the first token: credit falls back to the last one, and stays a share."""
    reader = role()
    layer = reader.backbone.body.layers[-1].self_attn

    def to_the_first(module: nn.Module, args: object, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return out[0], torch.zeros_like(out[1]).index_fill_(-1, torch.tensor([0]), 1.0)

    hook = layer.register_forward_hook(to_the_first)
    for reading in ("last", "mean"):
        found = attention_weights(reader, batch(), reading, 10_000)
        assert found.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    hook.remove()
