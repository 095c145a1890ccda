"""Scores in micro-batches are the scores of one batch."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from rto.batch import Completions
from rto.data.collate import collate_completions
from rto.models.role import Backbone, Role
from rto.rollouts.score import in_micro_batches, sentence_scores, state_values, token_logprobs

PAD, END = 0, 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def role() -> Role:
    torch.manual_seed(0)
    settings = hf.LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        initializer_range=0.3, pad_token_id=PAD, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    return Role(Backbone(hf.LlamaForCausalLM(settings).eval(), "tiny", None, torch.float32), head=nn.Linear(32, 1))


@pytest.fixture(scope="module")
def completions() -> Completions:
    """Seven rows of all lengths in width 9, the last column padding in each."""
    draw = torch.Generator().manual_seed(0)
    lengths = [(4, 2), (1, 8), (7, 1), (2, 5), (3, 3), (9, 4), (1, 1)]
    prompts = [torch.randint(3, 40, (p,), generator=draw).tolist() for p, _ in lengths]
    answers = [[*torch.randint(3, 40, (t - 1,), generator=draw).tolist(), END] for _, t in lengths]
    return collate_completions(prompts, answers, [True] * 7, PAD, width=9)


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 14, 30, 10_000])
def test_any_budget_gives_the_whole(role, completions, budget):
    for found, whole in (
        (token_logprobs(role, completions, budget, 0.7), role.logprobs(completions, 0.7)[0]),
        (state_values(role, completions, budget), role.values(completions)),
        (sentence_scores(role, completions, budget), role.scores(completions)),
    ):
        assert found.shape == whole.shape and found.dtype == torch.float32
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_a_pass_holds_no_more_than_the_budget(role, completions):
    """Prompts and responses are padded apart, but the model runs on rows as wide as the longest of both together."""
    sizes = []
    hook = role.backbone.body.embed_tokens.register_forward_hook(lambda _, args, out: sizes.append(args[0].numel()))
    token_logprobs(role, completions, 24)
    hook.remove()
    assert len(sizes) > 1 and max(sizes) <= 24


def test_rows_come_back_to_where_they_were(completions):
    def total(part: Completions) -> torch.Tensor:
        ids, mask = part.sequence()
        assert mask.any(0).all(), "no column is padding only"
        return ids.where(mask, 0).sum(-1)

    ids, mask = completions.sequence()
    assert in_micro_batches(completions, total, 24, CPU).tolist() == ids.where(mask, 0).sum(-1).tolist()


def test_padding_is_zero(role, completions):
    for read in (token_logprobs, state_values):
        assert (read(role, completions, 30)[~completions.mask] == 0).all()


def test_nothing_keeps_a_graph(role, completions):
    assert not sentence_scores(role, completions, 30).requires_grad
