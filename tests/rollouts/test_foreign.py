"""A scorer with its own words reads the policy's answers: as plain transformers would, at the right characters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from rto.batch import Completions
from rto.config import Pretrained
from rto.data.chat import Encoder, PromptRow
from rto.data.collate import collate_completions
from rto.models.role import Backbone, Role
from rto.models.runtime import Runtime
from rto.rollouts.attention import attention_weights
from rto.rollouts.foreign import ForeignScorer
from rto.rollouts.score import sentence_scores, token_values
from rto.rollouts.signals import Reader, Scorer

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
CORPUS = ["the cat sat on the mat and the dog sat on the cat", "the small dog ran to the mat; the cat ran on"] * 3
TALKS = [[{"role": "user", "content": text}] for text in ("say the cat", "on?", "the dog and the cat ran")]
ANSWERS = ["the cat sat on the mat", "caf\u00e9 \U0001f642 the dog", "no"]
BIG = 10_000


def byte_level(size: int, template: str | None) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE: a character outside ASCII is several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|start|>", "<|end|>"]
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special)
    )
    made = hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def metaspace(size: int = 50) -> hf.PreTrainedTokenizerFast:
    """As Llama 2 has it: a space in front of every text, single bytes for what is not in the vocabulary."""
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special)
    core.train_from_iterator([*CORPUS, "[INST] say ? [/INST] no caf"], trainer)
    core.add_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    made = hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = LLAMA2
    return made


def scorer_role(tokenizer: hf.PreTrainedTokenizerFast, positions: int = 512) -> Role:
    torch.manual_seed(0)
    settings = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_labels=1, initializer_range=0.3, max_position_embeddings=positions, pad_token_id=0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    network = hf.LlamaForSequenceClassification(settings).eval()
    return Role(Backbone(network, "judge", None, torch.float32), head=network.score)


POLICY = Encoder(byte_level(272, CHATML), 200, 200)
BARE = [PromptRow(row, POLICY.text(talk), POLICY.prompt(talk)) for row, talk in enumerate(TALKS)]  # text alone
ROWS = [replace(row, prompt=talk) for row, talk in zip(BARE, TALKS, strict=True)]


def foreign(tokenizer: hf.PreTrainedTokenizerFast, policy: Encoder = POLICY, **options) -> ForeignScorer:
    return ForeignScorer(scorer_role(tokenizer, options.pop("positions", 512)), tokenizer, policy, **options)


def completions(encoder: Encoder = POLICY, cut: tuple[int, ...] = ()) -> Completions:
    """The answers in the policy's tokens; those of ``cut`` have lost their end."""
    answers = [encoder.answer(talk, text)[0] for talk, text in zip(TALKS, ANSWERS, strict=True)]
    answers = [ids[:-1] if row in cut else ids for row, ids in enumerate(answers)]
    return collate_completions(
        [encoder.prompt(talk) for talk in TALKS], answers, [row not in cut for row in range(3)], encoder.pad, 40
    )


@torch.no_grad()
def plain(judge: ForeignScorer, row: int, cut: bool = False) -> tuple[Tensor, list[tuple[int, int]]]:
    """Its head at every answer token, straight from transformers, and these tokens' characters in the answer."""
    tokenizer = judge.encoder.tokenizer
    lead, end = (" ", "</s>") if tokenizer.chat_template == LLAMA2 else ("", "<|end|>")
    prompt = tokenizer.apply_chat_template(TALKS[row], add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    coded = tokenizer(lead + ANSWERS[row], add_special_tokens=False, return_offsets_mapping=True)
    spans = [(start - len(lead), stop - len(lead)) for start, stop in coded["offset_mapping"]]
    ids = before + coded["input_ids"] + ([] if cut else [tokenizer.convert_tokens_to_ids(end)])
    network = judge.role.backbone.network
    read = network.score(network.model(input_ids=torch.tensor([ids])).last_hidden_state)[0, len(before) :, 0]
    return read, spans


# --- the same tokenizer: nothing changes --------------------------------------------------------------


def test_a_scorer_with_the_policys_tokenizer_reads_as_ever():
    judge, given = foreign(POLICY.tokenizer), completions(cut=(0,))
    scores = sentence_scores(judge.role, given, BIG)
    torch.testing.assert_close(judge.scores(given, ROWS, BIG), scores)
    torch.testing.assert_close(judge.token_scores(given, ROWS, BIG), token_values(judge.role, given, BIG))
    assert judge.moved == 0.0
    for reading in ("last", "mean"):
        expected = attention_weights(judge.role, given, reading, BIG)
        torch.testing.assert_close(judge.attention(given, ROWS, reading, BIG), expected)
        assert judge.moved == 0.0
    torch.testing.assert_close(judge.scores(given, BARE, BIG), scores)  # here the text of the prompts says the same


# --- another one --------------------------------------------------------------------------------------

OTHERS = [metaspace(), byte_level(286, LLAMA2), byte_level(264, CHATML)]


def check_misaligned(judge: ForeignScorer) -> None:
    """Tokens that are parts of the policy's tokens never lie across a border."""
    finer = judge.encoder.tokenizer is OTHERS[2]
    assert judge.moved == 0 if finer else 0 < judge.moved < judge.mass


@pytest.mark.parametrize("tokenizer", OTHERS, ids=["metaspace", "coarser", "finer"])
@pytest.mark.parametrize("cut", [False, True])
def test_scores_are_those_of_the_scorers_own_chat(tokenizer, cut):
    judge = foreign(tokenizer)
    given = completions(cut=(0, 1, 2) if cut else ())
    expected = torch.stack([plain(judge, row, cut)[0][-1] for row in range(3)])
    torch.testing.assert_close(judge.scores(given, ROWS, BIG), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokenizer", OTHERS, ids=["metaspace", "coarser", "finer"])
@pytest.mark.parametrize("cut", [False, True])
def test_token_scores_are_read_where_the_policys_tokens_end(tokenizer, cut):
    judge = foreign(tokenizer)
    given = completions(cut=(0, 1, 2) if cut else ())
    found = judge.token_scores(given, ROWS, BIG)
    assert found.shape == given.ids.shape and (found[~given.mask] == 0).all()
    check_misaligned(judge)
    for row in (0, 2):  # without characters of several bytes, whose spans are another test's
        read, spans = plain(judge, row, cut)
        ids = given.ids[row][given.mask[row]].tolist()
        for t in range(len(ids) - (not cut)):
            end = len(POLICY.decode(ids[: t + 1]))
            place = next(index for index, (_, stop) in enumerate(spans) if stop >= end)
            torch.testing.assert_close(found[row, t], read[place], atol=1e-5, rtol=0)
        if not cut:
            torch.testing.assert_close(found[row, len(ids) - 1], read[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokenizer", OTHERS, ids=["metaspace", "coarser", "finer"])
@pytest.mark.parametrize("reading", ["last", "mean"])
def test_attention_stays_a_share(tokenizer, reading):
    judge, given = foreign(tokenizer), completions(cut=(1,))
    found = judge.attention(given, ROWS, reading, BIG)
    torch.testing.assert_close(found.sum(-1), torch.ones(3))
    assert (found >= 0).all() and (found[~given.mask] == 0).all()
    check_misaligned(judge)


def test_rows_are_the_same_alone():
    judge, given = foreign(metaspace()), completions()
    together = judge.token_scores(given, ROWS, BIG)
    for row in range(3):
        alone = judge.token_scores(given.rows(torch.tensor([row])), [ROWS[row]], BIG)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


def test_without_conversations_the_scorer_reads_the_policys_template():
    judge, given = foreign(metaspace()), completions()
    assert "<|start|>user" in BARE[0].text
    spelled = [replace(row, prompt=row.text) for row in BARE]
    torch.testing.assert_close(judge.scores(given, BARE, BIG), judge.scores(given, spelled, BIG))
    assert (judge.scores(given, BARE, BIG) - judge.scores(given, ROWS, BIG)).abs().max() > 1e-3


def test_the_space_before_an_answer_belongs_to_the_template():
    """The plain template's answers begin with a space, ChatML's do not: the scorer sees the same text."""
    spaced = Encoder(byte_level(272, None), 200, 200)
    assert spaced.decode(spaced.answer(TALKS[0], "the cat")[0]) == " the cat"
    judge = foreign(OTHERS[2], spaced)
    found = judge.scores(completions(spaced), ROWS, BIG)
    torch.testing.assert_close(found, foreign(OTHERS[2]).scores(completions(), ROWS, BIG))
    assert judge.token_scores(completions(spaced), ROWS, BIG).isfinite().all()


def test_an_answer_without_words():
    """Only the end, or a special token and no end."""
    judge = foreign(metaspace())
    special = POLICY.tokenizer.convert_tokens_to_ids("<s>")
    given = collate_completions([ROWS[0].ids] * 2, [[POLICY.end], [special]], [True, False], POLICY.pad)
    scores = judge.scores(given, ROWS[:1] * 2, BIG)
    torch.testing.assert_close(judge.token_scores(given, ROWS[:1] * 2, BIG)[:, 0], scores)
    torch.testing.assert_close(judge.attention(given, ROWS[:1] * 2, "last", BIG), torch.ones(2, 1))


def test_an_end_token_that_is_spelled_out_ends_the_answer():
    judge = foreign(metaspace())
    ids = POLICY.tokenizer("the cat</s", add_special_tokens=False)["input_ids"]
    ids += POLICY.tokenizer("> the dog", add_special_tokens=False)["input_ids"]
    short = POLICY.answer(TALKS[0], "the cat")[0]
    given = collate_completions([ROWS[0].ids] * 2, [[*ids, POLICY.end], short], [True, True], POLICY.pad)
    scores = judge.scores(given, ROWS[:1] * 2, BIG)
    torch.testing.assert_close(scores[0], scores[1])
    assert judge.token_scores(given, ROWS[:1] * 2, BIG).isfinite().all()


# --- spans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [byte_level(280, CHATML), metaspace()], ids=["byte-level", "metaspace"])
@pytest.mark.parametrize("text", [*ANSWERS, "\u4e16\u754c \U0001f642\U0001f642", "a  b\n\nc", ""])
def test_spans_cover_the_text_and_wait_for_characters(tokenizer, text):
    judge = foreign(OTHERS[0], Encoder(tokenizer, 100, 100))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans, whole = judge._spans(ids), judge.policy.decode(ids)
    assert len(spans) == len(ids)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(ids)]
    assert not ids or spans[-1][1] == len(whole)
    for t, (_, end) in enumerate(spans):
        assert judge.policy.decode(ids[: t + 1]).rstrip("\ufffd").startswith(whole[:end])
        if "\ufffd" not in judge.policy.decode(ids[: t + 1]):
            assert judge.policy.decode(ids[: t + 1]) == whole[:end]


def test_spans_where_a_tokens_text_depends_on_its_neighbours():
    """After a special token this decoder drops the space of what is the first word; so every beginning is decoded."""
    tokenizer = metaspace()
    judge = foreign(OTHERS[0], Encoder(tokenizer, 100, 100))
    ids = tokenizer(" ".join([*ANSWERS, "na\u00efve \u4e16"]), add_special_tokens=False)["input_ids"]
    begun = [tokenizer.bos_token_id, *ids]
    assert "".join(judge._split(ids)) == judge.policy.decode(ids) == judge.policy.decode(begun)
    assert "".join(judge._split(begun)) != judge.policy.decode(begun)
    assert judge._spans(begun) == [(0, 0), *judge._spans(ids)]


def test_spans_of_bytes_by_hand():
    """The bytes of \u00e9 are two tokens; it is there with the second."""
    judge, ids = foreign(OTHERS[0]), POLICY.tokenizer("\u00e9!", add_special_tokens=False)["input_ids"]
    assert judge._spans(ids) == [(0, 0), (0, 1), (1, 2)]
    assert judge._spans(ids[:1]) == [(0, 1)]  # it was cut: what there is stands for the replacement character
    assert judge._spans([]) == []


# --- passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "read", "readings"),
    [
        ({"type": "terminal"}, "scores", 1),
        ({"type": "segment"}, "segments", 1),
        ({"type": "attention", "reader": "scorer", "reading": "last"}, "attention", 2),  # and the scores
    ],
)
def test_a_pass_is_as_large_as_the_reader_has_it_now(term, read, readings):
    """A lack of memory halves the reader's budget: the same answers are read in smaller passes."""
    judge, given, passes = foreign(OTHERS[0]), completions(), []
    judge.role.backbone.network.model.register_forward_pre_hook(lambda *_: passes.append(1))
    reader = Reader([term], judge.role, POLICY, BIG, scorer=Scorer(judge))
    found = []
    for budget, rows in ((BIG, 3), (1, 1)):  # rows of a pass; one at least
        passes.clear()
        reader.budget = budget
        found.append(reader.read(given, torch.zeros(given.ids.shape), judge.role, ROWS)[read])
        assert len(passes) == readings * 3 / rows
    torch.testing.assert_close(*found)


# --- limits and refusals ------------------------------------------------------------------------------


def test_a_long_prompt_loses_its_beginning_but_not_its_bos():
    tokenizer = metaspace()
    judge = foreign(tokenizer, positions=24)
    own, _, _ = judge._translated(completions(), ROWS)
    widths = (own.prompt.mask.sum(-1) + own.lengths).tolist()
    assert max(widths) == 24
    assert (own.prompt.ids[0][own.prompt.mask[0]][0]) == tokenizer.bos_token_id
    assert judge.token_scores(completions(), ROWS, BIG).isfinite().all()


def test_an_answer_over_the_limit_is_an_error():
    with pytest.raises(ValueError, match="an answer has .* tokens for the scorer judge, which reads 5 with the prompt"):
        foreign(metaspace(), limit=5).scores(completions(), ROWS, BIG)


def test_open_reads_a_folder(tmp_path: Path):
    tokenizer = metaspace()
    role = scorer_role(tokenizer)
    role.backbone.network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = ForeignScorer.open(Pretrained(name=str(tmp_path)), tokenizer, POLICY, Runtime("cpu"))
    assert not any(p.requires_grad for p in judge.role.parameters())
    expected = foreign(tokenizer).token_scores(completions(), ROWS, BIG)
    torch.testing.assert_close(judge.token_scores(completions(), ROWS, BIG), expected)


def test_an_adapter_is_refused(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: merge it"):
        ForeignScorer.open(Pretrained(name=str(tmp_path)), metaspace(), POLICY, Runtime("cpu"))


def test_a_slow_tokenizer_is_refused():
    class Slow(hf.PythonBackend):
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ValueError, match="judge: .* needs a fast tokenizer"):
        ForeignScorer(scorer_role(metaspace()), Slow(), POLICY)
