"""Beam search against a plain search without caches and batches, against enumeration, and through the command line."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from rto import pipeline, recipe
from rto.batch import Completions
from rto.cli import main
from rto.config import Lora
from rto.data.collate import collate_completions
from rto.models.role import Backbone, Role
from rto.rollouts.generate import generate
from rto.rollouts.score import token_logprobs
from rto.rollouts.search import beam_search

V, PAD, END = 23, 0, 2
PROMPTS = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14], [5, 6, 7, 8], [15, 16], [18, 19, 20, 21, 22]]
KINDS = list(itertools.product(("policy", "implicit"), (False, True)))  # score, length_norm


def role(seed: int = 0, end_bias: float = 1.0, v: int = V, cls=hf.LlamaForCausalLM, config=hf.LlamaConfig, **more):
    torch.manual_seed(seed)
    settings = config(
        vocab_size=v, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, initializer_range=0.3, pad_token_id=PAD, bos_token_id=1, eos_token_id=END, **more,
    )  # fmt: skip
    network = cls(settings).eval()
    network.lm_head = torch.nn.Linear(32, v)
    with torch.no_grad():
        network.lm_head.bias[END] += end_bias
    return Role(Backbone(network, "tiny", None, torch.float32))


def unlike() -> Role:
    """A reference that ends less readily than the guide."""
    return role(1, end_bias=-1.0)


def search(guide: Role, rows: list[int] | None = None, **changes):
    rows = list(range(len(PROMPTS))) if rows is None else rows
    return beam_search(guide, [PROMPTS[i] for i in rows], **({"limit": 6, "end": END, "pad": PAD} | changes))


def texts(found: Completions) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(found.ids, found.mask, strict=True)]


@torch.no_grad()
def following(policy: Role, ids: list[list[int]]) -> torch.Tensor:
    """Log-probs of the token after each of ``ids``, which are equally long: no cache and no padding."""
    return policy.activate().network(input_ids=torch.tensor(ids)).logits[:, -1].float().log_softmax(-1)


def plain(guide: Role, prompt: list[int], beams: int, reference: Role | None, norm: bool, limit: int):
    """The search as the docstring tells it, one prompt at a time and always to the limit."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done = []
    for t in range(1, limit + 1):
        grown = []
        ids = [prompt + text for _, text in live]
        gains = following(guide, ids)
        likely = gains.topk(min(2 * beams, gains.shape[1])).indices.tolist()
        if reference is not None:
            gains = gains - following(reference, ids)
        for (total, text), tokens, gain in zip(live, likely, gains.tolist(), strict=True):
            grown += [(total + gain[token], [*text, token]) for token in tokens]
        grown.sort(reverse=True)
        done += [(s / (t if norm else 1), text) for s, text in grown[:beams] if text[-1] == END or t == limit]
        live = [(s, text) for s, text in grown if text[-1] != END][:beams]
    return max(done)


def score_of(found: Completions, guide: Role, reference: Role | None, norm: bool) -> torch.Tensor:
    gains = token_logprobs(guide, found, 10_000)
    if reference is not None:
        gains = gains - token_logprobs(reference, found, 10_000)
    return gains.sum(-1) / (found.lengths if norm else 1)


# --- the search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "norm"), KINDS)
@pytest.mark.parametrize("beams", [1, 4])
def test_as_a_plain_search(beams, score, norm):
    guide = role()
    reference = unlike() if score == "implicit" else None
    found, scores = search(guide, beams=beams, score=score, reference=reference, length_norm=norm)
    assert found.ids.shape == (len(PROMPTS), 6) and scores.dtype == torch.float32
    for i, (prompt, text) in enumerate(zip(PROMPTS, texts(found), strict=True)):
        best, expected = plain(guide, prompt, beams, reference, norm, 6)
        assert text == expected
        assert scores[i].item() == pytest.approx(best, abs=1e-4)
    torch.testing.assert_close(scores, score_of(found, guide, reference, norm), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("score", "norm"), KINDS)
@pytest.mark.parametrize("end_bias", [-1.0, 2.0])
def test_wide_beams_find_the_best_of_all_answers(score, norm, end_bias):
    v, limit, prompts = 4, 3, [[1, 3], [3], [0, 1, 1, 3]]
    guide = role(end_bias=end_bias, v=v)
    reference = role(1, v=v) if score == "implicit" else None
    others = [token for token in range(v) if token != END]
    whole = [[*head, END] for n in range(limit) for head in itertools.product(others, repeat=n)]
    whole += [list(text) for text in itertools.product(others, repeat=limit)]  # cut at the limit
    found, scores = beam_search(
        guide, prompts, beams=v**limit, score=score, reference=reference, length_norm=norm, limit=limit, end=END,
        pad=PAD,
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
        everything = collate_completions([prompt] * len(whole), whole, [text[-1] == END for text in whole], PAD)
        values = score_of(everything, guide, reference, norm)
        assert texts(found)[i] == whole[int(values.argmax())]
        assert scores[i].item() == pytest.approx(values.max().item(), abs=1e-4)


@pytest.mark.parametrize("end_bias", [-50.0, 1.0, 3.0])
def test_one_beam_is_greedy(end_bias):
    policy = role(end_bias=end_bias)
    found, scores = search(policy, beams=1, limit=12)
    names = [("row", i) for i in range(len(PROMPTS))]
    greedy = generate(policy, PROMPTS, names, seed=0, limit=12, end=END, pad=PAD, temperature=0)
    for name in ("ids", "mask", "finished"):
        assert torch.equal(getattr(found, name), getattr(greedy.completions, name)), name
    torch.testing.assert_close(scores, greedy.logprobs.sum(-1), atol=1e-4, rtol=0)


def test_more_beams_find_likelier_answers():
    policy = role()
    narrow, wide = (search(policy, beams=beams)[1] for beams in (1, 8))
    assert (wide >= narrow - 1e-5).all() and (wide > narrow + 0.1).any()


@pytest.mark.parametrize("score", ["policy", "implicit"])
def test_ends(score):
    implicit = {"score": "implicit", "reference": role(1, end_bias=0.0), "length_norm": True}
    guide = role(end_bias=1.5 if score == "implicit" else 1.0)
    found, _ = search(guide, limit=4, beams=3, **(implicit if score == "implicit" else {}))
    assert found.finished.any() and not found.finished.all() and len(set(found.lengths.tolist())) > 1
    for ids, mask, finished in zip(found.ids, found.mask, found.finished, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and (ids[length:] == PAD).all()
        assert (ids[:length] == END).nonzero().flatten().tolist() == ([length - 1] if finished else [])
        assert finished or length == 4


def test_a_sliding_window_changes_nothing():
    window = {"cls": hf.MistralForCausalLM, "config": hf.MistralConfig, "sliding_window": 3}
    guide, reference = role(**window), role(1, **window)
    found, scores = search(guide, beams=3, score="implicit", reference=reference)
    torch.testing.assert_close(scores, score_of(found, guide, reference, False), atol=1e-4, rtol=0)
    assert texts(found) == [plain(guide, prompt, 3, reference, False, 6)[1] for prompt in PROMPTS]


@pytest.mark.parametrize("score", ["policy", "implicit"])
@pytest.mark.parametrize(
    ("rows", "budget"),
    [([3], 10_000), ([6, 5, 4, 3, 2, 1, 0], 10_000), ([1, 3, 5], 10_000), (None, 1), (None, 70)],
    ids=["alone", "reversed", "odd", "a row a batch", "a few rows a batch"],
)
def test_a_row_is_the_same_in_any_company(score, rows, budget):
    guide, options = role(), {"score": score, "reference": unlike() if score == "implicit" else None, "beams": 3}
    whole, scores = search(guide, **options)
    found, again = search(guide, rows, budget=budget, **options)
    rows = list(range(len(PROMPTS))) if rows is None else rows
    for name in ("ids", "mask", "finished"):
        assert torch.equal(getattr(found, name), getattr(whole, name)[rows]), name
    torch.testing.assert_close(again, scores[rows], atol=1e-4, rtol=0)


def test_beams_count_against_the_budget():
    guide = role(end_bias=-50.0)
    sizes: list[int] = []
    guide.backbone.network.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    search(guide, beams=4, budget=2 * 4 * (5 + 6))
    assert max(sizes) == 2 * 4


def test_rows_leave_when_nothing_can_be_better():
    """Log-probs only fall, so a sure answer ends the search; log-ratios may rise again, so theirs goes on."""
    guide, reference = role(end_bias=50.0), unlike()
    steps: list[int] = []
    guide.backbone.network.model.layers[0].register_forward_pre_hook(lambda _, args: steps.append(len(args[0])))
    found, _ = search(guide, limit=12)
    assert (found.lengths == 1).all() and found.finished.all() and len(steps) == 1
    steps.clear()
    search(guide, limit=12, score="implicit", reference=reference)
    assert len(steps) == 12


def test_adapters_and_separate_models_agree():
    """Guide and reference on one backbone, with a cache each."""

    def adapted() -> Backbone:
        backbone = Backbone(role().backbone.network, "tiny", Lora(r=4), torch.float32)
        backbone.add_adapter("guide")
        with torch.no_grad():
            for p in Role(backbone, "guide").parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        return backbone

    shared, merged = adapted(), adapted()
    merged.merge_adapter("guide")
    for score, norm in KINDS:
        options = {"beams": 3, "score": score, "length_norm": norm}
        bases = (Role(shared), role()) if score == "implicit" else (None, None)
        found, scores = search(Role(shared, "guide"), reference=bases[0], **options)
        other, again = search(Role(merged), reference=bases[1], **options)
        assert torch.equal(found.ids, other.ids)
        torch.testing.assert_close(scores, again, atol=1e-4, rtol=0)
    assert not torch.equal(search(role(), beams=3)[0].ids, search(Role(shared, "guide"), beams=3)[0].ids)


def biased(seed: int, token: int, bias: float) -> Role:
    made = role(seed)
    with torch.no_grad():
        made.backbone.network.lm_head.bias[token] = bias
    return made


def test_a_token_that_both_models_find_impossible_is_left_alone():
    guide, reference = biased(0, 7, -40.0), biased(1, 7, -80.0)  # its log-ratio is about 40
    found, _ = search(guide, beams=3, score="implicit", reference=reference)
    assert not (found.ids == 7).any()
    wide, _ = search(guide, beams=V, limit=2, score="implicit", reference=reference)
    assert (wide.ids == 7).any(), "with the whole vocabulary it wins"


def test_log_probs_without_a_number():
    never = biased(0, 7, -torch.inf)  # impossible to the guide: not an answer, no matter how wide the beam is
    found, scores = search(never, beams=V, limit=2, score="implicit", reference=unlike())
    assert not (found.ids == 7).any() and scores.isfinite().all()
    with pytest.raises(ValueError, match="prompt 1 has score inf"):
        search(role(), beams=V, limit=2, score="implicit", reference=biased(1, 7, -torch.inf))
    with pytest.raises(ValueError, match="prompt 1 has score -inf: .* look at its weights"):
        search(biased(0, 7, torch.nan))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beams": 0}, "at least 1 .given: 0 and 6"),
        ({"limit": 0}, "at least 1 .given: 5 and 0"),
        ({"score": "implicit"}, "score = 'implicit': known are"),
        ({"reference": unlike()}, "score = 'policy': known are"),
    ],
)
def test_refuses(changes, said):
    with pytest.raises(ValueError, match=said):
        search(role(), **changes)


# --- the command line ---------------------------------------------------------------------------------


def rto(*words: str) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return SimpleNamespace(code=code, err=err.getvalue(), out=out.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """A run with a reference and a guide, an adapter on it."""
    table = {
        "device": "cpu",
        "output": str(tmp_path_factory.mktemp("run")),
        "model": {"type": "scratch", "hidden": 16, "layers": 1, "heads": 2, "intermediate": 16, "lora": {"r": 4}},
        "data": {"type": "world", "sft": 32, "pairs": 16, "prompts": 4, "test": 4, "max_response": 8},
        "sft": {"batch": 16, "lr": 1e-2},
        "prefer": {"batch": 16, "lr": 1e-2},
        "evaluation": {"oracle": {"type": "world"}},
    }
    return str(pipeline.run(recipe.build(table), ["sft", "prefer"], quiet=True))


def rows_of(trained: str, *words: str) -> list[dict]:
    done = rto("generate", trained, "--policy", "dpo", *words)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_generate_searches(trained):
    beams = ("--search", "beams")
    plain_keys = {"prompt", "answer", "finished", "policy"}
    greedy, narrow = rows_of(trained, "--temperature", "0"), rows_of(trained, *beams, "--beams", "1")
    assert set(greedy[0]) == plain_keys
    assert [{key: row[key] for key in plain_keys} for row in narrow] == greedy
    wide = rows_of(trained, *beams)
    assert set(wide[0]) == {*plain_keys, "search", "search_score"}
    assert {(row["search"], row["policy"]) for row in wide} == {("beams", "dpo")}
    assert all(row["search_score"] < 0 for row in wide)
    assert rows_of(trained, *beams, "--beams", "5", "--score", "policy") == wide
    alone = rows_of(trained, *beams, "--limit", "1")
    assert alone == [wide[0] | {"search_score": pytest.approx(wide[0]["search_score"], abs=1e-4)}]
    normed = rows_of(trained, *beams, "--length-norm")
    assert all(a["search_score"] > b["search_score"] for a, b in zip(normed, wide, strict=True))
    implicit = rows_of(trained, *beams, "--score", "implicit")
    assert any(row["search_score"] != 0 for row in implicit)
    assert [row["search_score"] for row in implicit] != [row["search_score"] for row in wide]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--temperature 0 --search beams", "temperature goes with search = 'sample' (given: search = 'beams')"),
        ("--search beams --top-p 0.9", "top_p goes with search = 'sample'"),
        ("--search beams --seed 0", "seed goes with search = 'sample'"),
        ("--beams 3", "beams goes with search = 'beams' (given: search = 'sample')"),
        ("--score policy", "score goes with search = 'beams'"),
        ("--search sample --length-norm", "length_norm goes with search = 'beams'"),
        ("--search beams --beams 0", "beams: at least 1 (given: 0)"),
        ("--search beams --score implicit --policy sft", "score = 'implicit' is 0 for every answer of sft"),
        ("--search beem", "argument --search: invalid choice: 'beem'"),
        ("--search beams --score ratio", "argument --score: invalid choice: 'ratio'"),
    ],
)
def test_generate_refuses(trained, words, said):
    refused = rto("generate", trained, *words.split())
    assert (refused.code, refused.out) == (2, "")
    assert said in refused.err and refused.err.count("\n") == 1
