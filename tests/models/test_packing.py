"""Packed rows: the log-probs, entropies, scores, values and gradients of padded ones."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch.nn import functional
from torch.testing import assert_close

from rto.batch import Completions, Prompts, Siblings
from rto.config import Lora
from rto.data.collate import collate_completions
from rto.models.packing import pack, same_states, tried
from rto.models.role import Backbone, Role
from rto.models.workshop import verify

END = 2
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12], [13]]
ANSWERS = [[20, 21, END], [], [22, 23, 24, 25, END], [26]]
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZE |= {"intermediate_size": 24, "initializer_range": 0.3}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
FAMILIES = {
    "llama": (hf.LlamaConfig, SIZE),
    "qwen2": (hf.Qwen2Config, SIZE),
    "window": (hf.MistralConfig, SIZE | {"sliding_window": 3}),
    "gpt2": (hf.GPT2Config, GPT2),
}


def rows(chosen: list[int] | None = None) -> Completions:
    chosen = [0, 1, 2, 3] if chosen is None else chosen
    return collate_completions([PROMPTS[i] for i in chosen], [ANSWERS[i] for i in chosen], [True] * len(chosen), 0, 5)


def network(kind: str, attention: str = "sdpa") -> hf.PreTrainedModel:
    settings, sizes = FAMILIES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = settings(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=END, **sizes)
        return hf.AutoModelForCausalLM.from_config(made, attn_implementation=attention).eval()


def role(packing: bool, kind: str = "llama", attention: str = "sdpa", lora: bool = False, again: bool = False) -> Role:
    made = network(kind, attention)
    backbone = Backbone(made, kind, Lora(r=2) if lora else None, torch.float32, again, packing)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = torch.nn.Linear(16, 1)
        if lora:
            backbone.add_adapter("a")
            with torch.no_grad():
                for parameter in backbone.adapter_parameters("a").values():
                    parameter.normal_(0, 0.1).requires_grad_(True)
    return Role(backbone, "a" if lora else None, head)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """To 1e-5 of the largest number (of 1, where all are smaller)."""
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_a_packed_row_by_hand():
    packed = pack(rows())
    assert packed.ids.tolist() == [[5, 6, 7, 8, 20, 21, 2, 9, 10, 11, 12, 22, 23, 24, 25, 2, 13, 26]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1]]
    assert packed.ends.tolist() == [0, 7, 8, 16, 18] and packed.longest == 8
    assert packed.places[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6]  # an answer of 3, and padding
    assert packed.places[1].tolist() == [7] * 9  # a prompt of 1
    assert packed.places[2].tolist() == [8, 8, 9, 10, 11, 12, 13, 14, 15]


def test_a_row_of_nothing_is_left_out():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    nothing[0] = True
    packed = pack(Completions(Prompts(torch.full((2, 3), 7), nothing), torch.full((2, 3), 8), nothing, nothing[:, 0]))
    assert packed.ids.tolist() == [[7, 7, 7, 8, 8, 8]] and packed.ends.tolist() == [0, 6]
    assert packed.places[1].max() <= 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "window", "gpt2"])
def test_log_probs_and_gradients_are_those_of_padded_rows(kind, attention):
    found = []
    for packing in (False, True):
        made = role(packing, kind, attention)
        logprobs, entropy = made.logprobs(rows())
        (logprobs * torch.arange(20).view(4, 5) / 20).sum().backward()
        found.append([logprobs, entropy, *(p.grad for p in made.backbone.network.parameters())])
    assert made.backbone.packs
    same(found[1], found[0])


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [2], [1]], ids=["all", "one row", "no answer"])
def test_values_and_scores_are_those_of_padded_rows(chosen):
    for read in ("values", "token_scores", "scores"):
        found = []
        for packing in (False, True):
            made = role(packing)
            out = getattr(made, read)(rows(chosen))
            out.square().sum().backward()
            grads = [p.grad for p in made.backbone.network.parameters() if p.grad is not None]
            found.append([out, made.head.weight.grad, *grads])
        same(found[1], found[0])


def test_with_an_adapter_and_recomputed_layers():
    found = []
    for packing in (False, True):
        made = role(packing, lora=True, again=True)
        logprobs, _ = made.logprobs(rows())
        logprobs.sum().backward()
        found.append([logprobs, *(p.grad for p in made.backbone.adapter_parameters("a").values())])
    same(found[1], found[0])


def test_siblings_are_packed_each_behind_its_own_prompt():
    prompt, mask = torch.tensor([[5, 6]] * 2), torch.ones(2, 2, dtype=torch.bool)
    pair = Siblings(Prompts(prompt, mask), torch.tensor([[8, 9], [7, 2]]), mask, mask[:, 0])
    plain, packing = role(False), role(True)
    assert plain.backbone.forks and not packing.backbone.forks
    assert_close(packing.logprobs(pair), plain.logprobs(pair), atol=1e-5, rtol=1e-5)


def test_the_model_is_verified_with_packed_rows():
    assert verify(role(True), END) < 1e-4


def test_families_that_mix_packed_sequences_are_refused():
    made = hf.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    snake = Role(Backbone(hf.MambaForCausalLM(made).eval(), "snake", None, torch.float32, packing=True))
    with pytest.raises(ValueError, match=r"model\.packing = true: snake .*MambaForCausalLM.*: set it to false"):
        snake.logprobs(rows())
    with pytest.raises(ValueError, match="model.packing"):  # and at the second try
        verify(snake, END)


def test_a_trial_that_a_family_cannot_read_has_no_result():
    def refusing(error: Exception):
        raise error

    for error in (ValueError("shape"), RuntimeError("shape"), IndexError("shape"), TypeError("shape")):
        assert tried(lambda error=error: refusing(error)) is None
    with pytest.raises(torch.OutOfMemoryError):  # it says nothing of the family
        tried(lambda: refusing(torch.OutOfMemoryError("CUDA out of memory")))


def test_a_family_that_cannot_read_packed_rows_is_refused(monkeypatch):
    forward = hf.LlamaModel.forward

    def strict(self, input_ids=None, attention_mask=None, position_ids=None, **others):
        if position_ids is not None and attention_mask is None:
            raise RuntimeError("no mask")
        return forward(self, input_ids, attention_mask, position_ids, **others)

    monkeypatch.setattr(hf.LlamaModel, "forward", strict)
    with pytest.raises(ValueError, match=r"model\.packing = true: llama .*LlamaForCausalLM.*: set it to false"):
        role(True).logprobs(rows())


def test_states_are_compared_beside_a_dimension_that_is_larger_than_all_others():
    """15 of 16 numbers are wrong: by 1 of 100 at most, but by 15 of 115 on average; then by twice as much."""
    real = torch.tensor([[True, True, True], [True, True, False]])
    plain = torch.ones(2, 3, 16)
    plain[..., 0] = 100

    def same(wrong: dict[tuple[int, int], float], compute: torch.dtype) -> bool:
        found = plain.clone()
        for place, number in wrong.items():
            found[place][1:] = number
        return same_states(found, plain, real, compute)

    assert same({}, torch.float32) and same({(1, 2): torch.nan}, torch.float32), "nothing, and padding"
    assert not same({(0, 0): 0.0}, torch.float32) and not same({(0, 0): torch.nan}, torch.float32)
    assert same({(0, 0): 0.0, (0, 1): 0.0}, torch.bfloat16), "13 of 100 is rounding"
    assert same({(0, 0): -1.0, (1, 0): -1.0, (1, 2): torch.nan}, torch.bfloat16), "one token of a row"
    assert not same({(0, 0): -1.0, (0, 1): -1.0}, torch.bfloat16), "26 of 100"
    assert not same({(1, 0): torch.nan, (1, 1): torch.nan}, torch.bfloat16)


def test_positions_that_are_ignored_are_found_out(monkeypatch):
    forward = hf.LlamaModel.forward

    def deaf(self, input_ids=None, position_ids=None, **others):
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(hf.LlamaModel, "forward", deaf)
    with pytest.raises(ValueError, match="does not keep packed sequences apart"):
        role(True).logprobs(rows())


def test_flash_attention_gets_the_ends_of_sequences(monkeypatch):
    """transformers hands them to the kernel for sequences of many lengths, which stands here as a loop."""
    from transformers import modeling_flash_attention_utils as flash

    seen = []

    def one(q, k, v, causal=True, softmax_scale=None, **others):
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(-3, -2)

    def many(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True, softmax_scale=None):
        seen.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k))
        parts = zip(*(x.tensor_split(cu_seqlens_q[1:-1].long().cpu()) for x in (q, k, v)), strict=True)
        return torch.cat([one(*(x[None] for x in part), causal, softmax_scale)[0] for part in parts])

    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (one, many, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    expected = role(False).logprobs(rows())
    made = role(True)
    made.backbone.network.config._attn_implementation = "flash_attention_2"
    found = made.logprobs(rows())
    assert seen[-1] == ([0, 7, 8, 16, 18],) * 2 + (8, 8)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_flash_attention_on_a_gpu():
    pytest.importorskip("flash_attn")
    sizes = SIZE | {"hidden_size": 64}
    made = hf.LlamaConfig(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=END, **sizes)
    options = {"attn_implementation": "flash_attention_2", "dtype": torch.bfloat16}
    model = hf.AutoModelForCausalLM.from_config(made, **options).eval().cuda()
    plain, packed = (Role(Backbone(model, "x", None, torch.bfloat16, packing=packing)) for packing in (False, True))
    batch = rows().to("cuda")
    assert_close(packed.logprobs(batch)[0], plain.logprobs(batch)[0], atol=0.1, rtol=0.05)
    assert verify(packed, END) < 0.2
