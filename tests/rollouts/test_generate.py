"""Sampling: the log-probs are the policy's own, and a row does not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from rto.batch import Rollouts
from rto.config import Lora
from rto.models.role import Backbone, Role
from rto.rollouts.generate import LEAVE, generate
from rto.rollouts.score import token_logprobs

V, PAD, END = 23, 0, 2
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14], [5, 6, 7, 8], [15, 16], [17], [18, 19, 20, 21, 22], [3, 4]]
NAMES = [("rollouts", 0, i) for i in range(len(PROMPTS))]


def role(cls=hf.LlamaForCausalLM, config=hf.LlamaConfig, end_bias: float = 0.0, **more) -> Role:
    """A policy that is sure enough of itself to say different things, and ends at different lengths."""
    torch.manual_seed(0)
    settings = config(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, initializer_range=0.3, pad_token_id=PAD, bos_token_id=1, eos_token_id=END, **more,
    )  # fmt: skip
    network = cls(settings).eval()
    network.lm_head = torch.nn.Linear(32, V)
    with torch.no_grad():
        network.lm_head.bias[END] += end_bias
    return Role(Backbone(network, "tiny", None, torch.float32))


def sample(policy: Role, rows: list[int] | None = None, **changes) -> Rollouts:
    rows = list(range(len(PROMPTS))) if rows is None else rows
    options = {"seed": 0, "limit": 12, "end": END, "pad": PAD} | changes
    return generate(policy, [PROMPTS[i] for i in rows], [NAMES[i] for i in rows], **options)


def same_rows(found: Rollouts, whole: Rollouts, rows: list[int]) -> None:
    for name in ("ids", "mask", "finished"):
        assert torch.equal(getattr(found.completions, name), getattr(whole.completions, name)[rows]), name
    torch.testing.assert_close(found.logprobs, whole.logprobs[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_a_fresh_pass(temperature):
    policy = role()
    found = sample(policy, temperature=temperature)
    fresh = token_logprobs(policy, found.completions, 10_000, temperature)
    torch.testing.assert_close(found.logprobs, fresh, atol=1e-5, rtol=0)
    assert (found.logprobs[found.completions.mask] < 0).all()
    assert (found.logprobs[~found.completions.mask] == 0).all()


def test_a_sliding_window_changes_nothing():
    policy = role(hf.MistralForCausalLM, hf.MistralConfig, sliding_window=3)
    found = sample(policy)
    torch.testing.assert_close(found.logprobs, token_logprobs(policy, found.completions, 10_000), atol=1e-5, rtol=0)


def test_a_model_of_learned_positions_answers_up_to_the_last_and_no_further():
    """The longest prompt has 5 tokens, an answer 12."""
    for positions, fits in ((17, True), (16, False)):
        policy = role(hf.GPT2LMHeadModel, hf.GPT2Config, end_bias=-50.0, max_position_embeddings=positions)
        if fits:
            found = sample(policy)
            assert not found.completions.finished.any()
            assert token_logprobs(policy, found.completions, 10_000).isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"17 tokens together \(data.max_prompt.*tiny has 16 positions"):
                sample(policy)


def test_an_adapter_samples_and_the_base_is_left():
    base = role()
    before = sample(base)
    shared = Backbone(base.backbone.network, "tiny", Lora(r=4), torch.float32)
    shared.add_adapter("policy")
    policy = Role(shared, "policy")
    same_rows(sample(policy), before, list(range(len(PROMPTS))))
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05
    found = sample(policy)
    assert not torch.equal(found.completions.ids, before.completions.ids)
    torch.testing.assert_close(found.logprobs, token_logprobs(policy, found.completions, 10_000), atol=1e-5, rtol=0)
    same_rows(sample(Role(shared)), before, list(range(len(PROMPTS))))


def test_a_head_reads_what_a_critic_on_the_same_trunk_reads():
    policy = role(end_bias=2.0)
    head = torch.nn.Linear(32, 1)
    found, plain = sample(policy, head=head), sample(policy)
    assert plain.values is None
    same_rows(found, plain, list(range(len(PROMPTS))))
    critic = Role(policy.backbone, head=head)
    torch.testing.assert_close(found.values, critic.values(found.completions).detach(), atol=1e-5, rtol=0)
    assert (found.values[found.completions.mask] != 0).all() and (found.values[~found.completions.mask] == 0).all()


@pytest.mark.parametrize(
    "rows", [[3], [8, 7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 8], [1, 3, 5, 7]], ids=["alone", "reversed", "even", "odd"]
)
def test_a_row_is_the_same_in_any_company(rows):
    policy = role()
    same_rows(sample(policy, rows), sample(policy), rows)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_row_is_the_same_under_any_budget(budget):
    policy = role()
    same_rows(sample(policy, budget=budget), sample(policy), list(range(len(PROMPTS))))


def test_names_and_seeds_decide():
    policy = role()
    whole = sample(policy)
    assert not torch.equal(whole.completions.ids[0], whole.completions.ids[4]), "one prompt, two names"
    twin = generate(policy, [PROMPTS[0]] * 2, [NAMES[0]] * 2, seed=0, limit=12, end=END, pad=PAD)
    assert torch.equal(twin.completions.ids[0], twin.completions.ids[1])
    assert not torch.equal(sample(policy, seed=1).completions.ids, whole.completions.ids)


def test_greedy_is_that_of_transformers():
    policy = role()
    found = sample(policy, temperature=0)
    for i, prompt in enumerate(PROMPTS):
        plain = policy.backbone.network.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12,
            do_sample=False,
        )[0, len(prompt) :]  # fmt: skip
        assert found.completions.ids[i, : len(plain)].tolist() == plain.tolist()
        assert found.completions.lengths[i] == len(plain)
    torch.testing.assert_close(found.logprobs, token_logprobs(policy, found.completions, 10_000), atol=1e-5, rtol=0)


def test_ends():
    found = sample(role(end_bias=2.0), limit=6)
    c = found.completions
    lengths = set(c.lengths.tolist())
    assert len(lengths) > 3 and c.finished.any() and not c.finished.all(), "the case has answers of all kinds"
    for ids, mask, finished in zip(c.ids, c.mask, c.finished, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and (ids[length:] == PAD).all()
        assert (ids[:length] == END).sum() == int(finished)
        if finished:
            assert ids[length - 1] == END
        else:
            assert length == 6


def test_finished_rows_leave_the_batch():
    """And what is left goes on as before; each pass holds no more rows than are still writing (a seventh more)."""
    policy = role(end_bias=3.0)
    sizes = []
    policy.backbone.network.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    found = sample(policy)
    writing = [int((found.completions.lengths > t).sum()) for t in range(12)]
    writing = [n for n in writing if n]
    assert sizes[0] == len(PROMPTS) - 1, "equal prompts are read once"
    assert len(sizes) == len(writing) and writing[-1] < writing[1]
    assert all(n <= size < n / LEAVE or size == n for n, size in zip(writing[1:], sizes[1:], strict=True))
    torch.testing.assert_close(found.logprobs, token_logprobs(policy, found.completions, 10_000), atol=1e-5, rtol=0)


def test_all_ended_stops_early():
    found = sample(role(end_bias=50.0))
    assert (found.completions.lengths == 1).all() and found.completions.finished.all()
    assert found.completions.ids.shape == (len(PROMPTS), 12)


def test_no_end_before_the_limit():
    found = sample(role(end_bias=-50.0), limit=3)
    assert (found.completions.lengths == 3).all() and not found.completions.finished.any()
    assert (found.completions.ids != END).all()
