"""Two answers behind one prompt: the same states, log-probs, scores and gradients as each behind its own."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import FalconConfig, FalconForCausalLM

from rto.batch import Completions, Prompts, Siblings
from rto.config import Lora
from rto.models.role import Backbone, Role
from rto.models.siblings import fork


def siblings() -> Siblings:
    """Three pairs: ragged prompts and answers, one answer of one token, one of none but padding beside it."""
    prompt = torch.tensor([[0, 5, 6, 7], [0, 0, 0, 9], [4, 5, 6, 8]])
    asked = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]).bool()
    ids = torch.tensor([[8, 9, 2], [7, 2, 0], [2, 0, 0], [5, 2, 0], [6, 6, 6], [9, 8, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    return Siblings(Prompts(prompt.repeat(2, 1), asked.repeat(2, 1)), ids, mask, (ids == 2).any(-1))


def plain(s: Siblings) -> Completions:
    return Completions(s.prompt, s.ids, s.mask, s.finished)


def network(kind: str, attention: str = "sdpa"):
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    common = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    made = {
        "llama": lambda: LlamaConfig(**common, intermediate_size=24, initializer_range=0.3),
        "qwen2": lambda: Qwen2Config(**common, intermediate_size=24, initializer_range=0.3, num_key_value_heads=1),
        "gpt2": lambda: GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=1
        ),
        "window": lambda: MistralConfig(**common, intermediate_size=24, sliding_window=4, num_key_value_heads=2),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(made, attn_implementation=attention).eval()


def test_a_forked_row_by_hand():
    """Row 0: prompt 5 6 7, answers 8 9 2 and 5 2."""
    found = fork(siblings())
    assert found.ids[0].tolist() == [5, 6, 7, 8, 9, 2, 5, 2]
    assert found.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert found.positions[1].tolist() == [0, 1, 2, 1, 2, 3, 0, 0]  # padding too has a place that every model has
    assert found.attends[0, 0, 6].nonzero().flatten().tolist() == [0, 1, 2, 6]  # not the other answer
    assert found.attends[0, 0, 5].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert found.attends.any(-1).all()  # a softmax over nothing is NaN
    assert found.places[0].tolist() == [0, 0, 1, 2, 3, 4, 5] and found.places[3].tolist() == [0, 0, 1, 2, 6, 7, 0]
    assert found.ids[2].tolist() == [4, 5, 6, 8, 2, 9, 8, 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_log_probs_and_gradients_are_those_of_separate_rows(kind, attention):
    found = []
    for batch in (siblings(), plain(siblings())):
        role = Role(Backbone(network(kind, attention), "x", None, torch.float32))
        assert role.backbone.forks
        logprobs, entropy = role.logprobs(batch)
        (logprobs * torch.arange(18).view(6, 3) / 18).sum().backward()
        found.append((logprobs, entropy, [p.grad for p in role.parameters() if p.grad is not None]))
    assert_close(found[0], found[1], atol=3e-5, rtol=1e-4)


def test_scores_and_values_too():
    role = Role(Backbone(network("llama"), "x", None, torch.float32), head=torch.nn.Linear(16, 1, bias=False))
    one, other = siblings(), plain(siblings())
    for read in (role.scores, role.token_scores, role.values):
        assert_close(read(one), read(other), atol=1e-5, rtol=1e-4)


def test_with_an_adapter_and_recomputed_layers():
    found = []
    for batch in (siblings(), plain(siblings())):
        backbone = Backbone(network("llama"), "x", Lora(r=2), torch.float32, checkpointing=True)
        backbone.add_adapter("a")
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            for p in backbone.adapter_parameters("a").values():
                p.normal_(0, 0.3)
        role = Role(backbone, "a")
        for p in role.parameters():
            p.requires_grad_(True)
        logprobs, _ = role.logprobs(batch)
        logprobs.sum().backward()
        found.append((logprobs, [p.grad for p in role.parameters()]))
    assert_close(found[0], found[1], atol=3e-5, rtol=1e-4)


def test_a_window_of_attention_is_left_to_separate_rows():
    role = Role(Backbone(network("window"), "x", None, torch.float32))
    assert not role.backbone.forks
    assert_close(role.logprobs(siblings()), role.logprobs(plain(siblings())))


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_a_model_that_reads_forked_rows_in_its_own_way_is_found_out(ignored):
    odd = network("llama")
    body = odd.model.forward

    def own(*args, position_ids=None, attention_mask=None, **more):
        given = {"position_ids": position_ids, "attention_mask": attention_mask}
        return body(*args, **{**given, ignored: None}, **more)

    odd.model.forward = own
    assert not Backbone(odd, "x", None, torch.float32).forks


def test_a_family_that_takes_no_such_mask_is_left_to_separate_rows():
    """Falcon counts its ALiBi distances from a mask of two dimensions."""
    settings = FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=True)
    role = Role(Backbone(FalconForCausalLM(settings).eval(), "x", None, torch.float32))
    with pytest.raises(ValueError, match="too many values to unpack"):
        role.fork(siblings())
    assert not role.backbone.forks
    assert_close(role.logprobs(siblings()), role.logprobs(plain(siblings())))


def test_a_choice_of_siblings_need_not_be_siblings():
    assert type(siblings().rows(torch.tensor([0, 4]))) is Completions
    assert type(siblings().to("cpu")) is Siblings
