"""Text to tokens: one token a letter, so that every id sequence below can be read off its text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rto.config import Files
from rto.data.chat import PLAIN_TEMPLATE, Encoder, encode_answers, encode_pairs, encode_prompts, load_template
from rto.data.rows import make_tokenizer
from rto.data.sources import Loaded, RejectedRow, TextAnswer, TextPair, TextPrompt
from rto.recipe import build

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
HI = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "s"},
    *HI,
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "?"},
]


def letters(
    template: str | None = None, bos: bool = False, also_eos: bool = False, **special: str
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token for every ASCII character. ``bos``: it adds one by itself."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if bos:
        single = "<s> $A </s>" if also_eos else "<s> $A"
        tokens = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


def encoder(tokenizer: PreTrainedTokenizerFast, prompt: int = 1000, response: int = 1000, long: str = "truncate"):
    return Encoder(tokenizer, prompt, response, long)


def spelled(coder: Encoder, ids: list[int]) -> str:
    """Ids as text, special tokens included."""
    return coder.tokenizer.decode(ids, skip_special_tokens=False)


# --- templates -----------------------------------------------------------------------------------------


def test_chatml_prompt_answer_and_end():
    coder = encoder(letters(CHATML, eos_token="</s>", pad_token="<s>"))
    prompt, (answer, finished) = coder.prompt(HI), coder.answer(HI, "yo")
    assert spelled(coder, prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(coder, answer) == "yo<|im_end|>" and finished
    assert coder.end == coder.tokenizer.convert_tokens_to_ids("<|im_end|>") != coder.tokenizer.eos_token_id
    assert coder.pad == coder.tokenizer.convert_tokens_to_ids("<s>")
    assert coder.decode(answer) == "yo"


def test_prompt_and_answer_are_the_rendered_conversation():
    coder = encoder(letters(CHATML, eos_token="</s>"))
    whole = coder.tokenizer.apply_chat_template([*TALK, {"role": "assistant", "content": "ok"}], tokenize=False)
    assert spelled(coder, coder.prompt(TALK) + coder.answer(TALK, "ok")[0]) + "\n" == whole


def test_llama2_answer_begins_with_the_template_s_space_and_ends_with_eos():
    coder = encoder(letters(LLAMA2, bos=True, bos_token="<s>", eos_token="</s>"))
    assert spelled(coder, coder.prompt(HI)) == "<s>[INST] hi [/INST]"  # BOS once, not twice
    assert spelled(coder, coder.answer(HI, "yo")[0]) == " yo</s>"


def test_plain_template():
    coder = encoder(letters(eos_token="</s>"))
    assert coder.text(TALK) == "System: s\n\nUser: hi\n\nAssistant: yo\n\nUser: ?\n\nAssistant:"
    assert spelled(coder, coder.answer(TALK, "ok")[0]) == " ok</s>"
    assert coder.end == coder.pad == coder.tokenizer.eos_token_id
    with_bos = encoder(letters(bos=True, bos_token="<s>", eos_token="</s>"))
    assert spelled(with_bos, with_bos.prompt(HI)) == "<s>User: hi\n\nAssistant:"


def test_a_template_that_needs_eos_without_special_tokens_falls_back():
    template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    assert encoder(letters(template, eos_token="</s>")).end == encoder(letters(eos_token="</s>")).end


def test_template_that_drops_answers_falls_back_to_eos():
    coder = encoder(letters("{{ messages[0]['content'] }}", eos_token="</s>"))
    assert coder.end == coder.tokenizer.eos_token_id
    assert spelled(coder, coder.answer(HI, "yo")[0]) == "yo</s>"


def test_unknown_words_after_the_answer_are_no_end():
    """Word-level: the '.' after the answer maps to the unknown token, which is special but ends nothing."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "yo": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    coder = encoder(tokenizer)
    assert coder.end == 1
    assert coder.answer(HI, "yo what") == ([2, 0, 1], True)


def test_no_end_token_is_an_error():
    with pytest.raises(ValueError, match="set eos_token.*--data.chat_template"):
        encoder(letters())
    assert encoder(letters(CHATML)).pad == encoder(letters(CHATML)).end  # the template's end is enough


def test_load_template(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[-1]['content'] }}")
    assert load_template(letters(CHATML), Files()) == CHATML
    tokenizer = letters(CHATML, eos_token="</s>")
    assert load_template(tokenizer, Files(chat_template=str(file))) == file.read_text() == tokenizer.chat_template
    assert encoder(tokenizer).text(HI) == "hi"
    tokenizer = letters(eos_token="</s>")
    before = encoder(tokenizer).prompt(TALK)
    assert load_template(tokenizer, Files()) == PLAIN_TEMPLATE == tokenizer.chat_template  # saved with the model
    assert encoder(tokenizer).prompt(TALK) == before
    with pytest.raises(ValueError, match="data.chat_template: file not found: .*none.jinja"):
        load_template(tokenizer, Files(chat_template=str(tmp_path / "none.jinja")))


@pytest.mark.parametrize(("content", "said"), [(b"\xff\xfe{", "not UTF-8"), (b" \n", "is empty")])
def test_a_template_file_that_cannot_be_read_is_named(content, said, tmp_path):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(ValueError, match=f"data.chat_template = '.*t.jinja': {said}"):
        load_template(letters(CHATML), Files(chat_template=str(tmp_path / "t.jinja")))
    with pytest.raises(ValueError, match="data.chat_template: file not found: "):
        load_template(letters(CHATML), Files(chat_template="~nobody/t.jinja"))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": ', b"\xff", b"[" * 9000], ids=range(5))
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_damaged_tokenizer_is_told(name, content, tmp_path):
    letters(eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    config = build({"model": {"name": str(tmp_path)}, "data": {"pairs": "p.jsonl"}})
    with pytest.raises(ValueError, match=f"model.name = '{tmp_path}': its tokenizer cannot be read .*: fetch it again"):
        make_tokenizer(config, str(tmp_path))


@pytest.mark.parametrize("fault", ["1 + 'a'", "1 // 0", "messages[9].content", "{}['a'].b", "range(10 ** 9)", "%"])
def test_a_template_with_a_fault_is_refused(fault):
    with pytest.raises(ValueError, match="the chat template fails on a conversation of user: .*--data.chat_template"):
        encoder(letters("{{ " + fault + " }}", eos_token="</s>"))


def test_a_conversation_that_the_template_refuses_names_file_and_row():
    coder = encoder(letters(LLAMA2, bos_token="<s>", eos_token="</s>"))
    loaded = Loaded("p.jsonl", [TextPrompt(1, HI), TextPrompt(2, TALK)])
    with pytest.raises(ValueError, match="p.jsonl, row 2: .*system, user, assistant, user: no system here"):
        encode_prompts(coder, loaded)


# --- plain text ----------------------------------------------------------------------------------------


def test_plain_text_gets_no_template_and_one_bos():
    coder = encoder(letters(CHATML, bos=True, bos_token="<s>", eos_token="</s>"))
    assert spelled(coder, coder.prompt("once")) == "<s>once"
    assert spelled(coder, coder.prompt("<s>once")) == "<s>once"
    assert spelled(coder, coder.answer("once", " upon")[0]) == " upon<|im_end|>"
    bare = encoder(letters(bos_token="<s>", eos_token="</s>"))  # a tokenizer that adds none
    assert spelled(bare, bare.prompt("once")) == "once"


def test_an_end_that_the_tokenizer_adds_to_every_text_is_taken_off_a_prompt():
    coder = encoder(letters(bos=True, also_eos=True, bos_token="<s>", eos_token="</s>"))
    assert spelled(coder, coder.prompt("once")) == "<s>once"


# --- limits --------------------------------------------------------------------------------------------


def test_long_prompts_lose_their_beginning_but_keep_bos():
    bare = letters(eos_token="</s>")
    assert [spelled(c, c.prompt("abcd")) for c in (encoder(bare, 4), encoder(bare, 3), encoder(bare, 1))] == [
        "abcd",
        "bcd",
        "d",
    ]
    bos = letters(bos=True, bos_token="<s>", eos_token="</s>")
    assert [spelled(c, c.prompt("abcd")) for c in (encoder(bos, 5), encoder(bos, 3), encoder(bos, 1))] == [
        "<s>abcd",
        "<s>cd",
        "d",
    ]


def test_a_turn_mark_that_is_called_bos_is_cut_with_its_turn():
    coder = encoder(letters(CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>"), 13)
    assert spelled(coder, coder.prompt(HI)) == "<|im_end|>\n<|im_start|>assistant\n"  # 1 + 1 + 1 + 9 + 1 tokens


def test_a_cut_answer_has_no_end():
    """The end token counts: three letters need max_response = 4."""
    tokenizer = letters(eos_token="</s>")
    for limit, wanted in ((4, ("abc</s>", True)), (3, ("abc", False)), (1, ("a", False))):
        coder = encoder(tokenizer, response=limit)
        ids, finished = coder.answer("p", "abc")
        assert (spelled(coder, ids), finished) == wanted


def test_an_end_token_in_the_text_ends_the_answer():
    coder = encoder(letters(eos_token="</s>"))
    ids, finished = coder.answer("p", "ab</s>cd</s>")
    assert spelled(coder, ids) == "ab</s>" and finished


# --- rows ----------------------------------------------------------------------------------------------

PAIR = TextPair(1, "p", "abc", "ab", 0.5)
EARLIER = RejectedRow("f", 9, "missing_field", "chosen")


def test_encode_pairs():
    coder = encoder(letters(eos_token="</s>"), response=3)
    out = encode_pairs(coder, Loaded("f", [PAIR, replace(PAIR, row=2, prompt=HI)], [EARLIER]))
    row = out.rows[0]
    assert (row.row, row.prompt_text, row.margin) == (1, "p", 0.5)
    assert [spelled(coder, ids) for ids in (row.prompt, row.chosen, row.rejected)] == ["p", "abc", "ab</s>"]
    assert (row.chosen_finished, row.rejected_finished) == (False, True)
    assert out.rows[1:] == [] and (out.cut_prompts, out.cut_answers) == (0, 1)
    # Row 2 is a chat: its answers begin with a space, and " abc" and " ab" cut at three tokens are both " ab".
    assert out.rejected == [EARLIER, RejectedRow("f", 2, "same_answers", "chosen and rejected are the same 3 tokens")]


def test_equal_tokens_with_and_without_an_end_differ():
    coder = encoder(letters(eos_token="</s>"), response=3)
    out = encode_pairs(coder, Loaded("f", [PAIR]))
    assert out.rows[0].chosen[:2] == out.rows[0].rejected[:2] and not out.rejected


def test_over_long_rows_are_cut_and_counted_or_rejected():
    rows = [
        TextAnswer(1, "pppp", "a"),
        TextAnswer(2, "ppp", "a"),
        TextAnswer(3, "ppp", "aaa"),
        TextAnswer(4, "pppp", "aaa"),
    ]
    tokenizer = letters(eos_token="</s>")
    out = encode_answers(encoder(tokenizer, 3, 3), Loaded("f", rows))
    assert [len(row.prompt) for row in out.rows] == [3] * 4
    assert [(len(row.answer), row.finished) for row in out.rows] == [(2, True), (2, True), (3, False), (3, False)]
    assert (out.cut_prompts, out.cut_answers, out.rejected) == (2, 2, [])
    out = encode_answers(encoder(tokenizer, 3, 3, "reject"), Loaded("f", rows))
    assert [row.row for row in out.rows] == [2] and (out.cut_prompts, out.cut_answers) == (0, 0)
    assert [(bad.row, bad.reason, bad.detail) for bad in out.rejected] == [
        (1, "over_long", "prompt of 4 tokens"),
        (3, "over_long", "answer of over 3 tokens"),
        (4, "over_long", "prompt of 4 tokens"),
    ]
    with pytest.raises(ValueError, match="no row is left after encoding \\(over_long\\): raise data.max_prompt"):
        encode_prompts(encoder(tokenizer, 3, 3, "reject"), Loaded("f", [TextPrompt(1, "pppp")]))


def test_answers_without_tokens_are_rejected():
    coder = encoder(letters(eos_token="</s>"))
    out = encode_answers(coder, Loaded("f", [TextAnswer(1, "p", "</s>"), TextAnswer(2, "p", "a")]))
    assert [row.row for row in out.rows] == [2]
    assert [(bad.row, bad.reason) for bad in out.rejected] == [(1, "empty_answer")]


def test_a_prompt_is_rendered_once(monkeypatch):
    tokenizer = letters(CHATML, eos_token="<|im_end|>")
    coder, rendered = encoder(tokenizer), []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(1) or plain(*a, **k))
    (row,) = encode_pairs(coder, Loaded("f", [TextPair(1, TALK, "a", "b", 0.0)])).rows
    assert len(rendered) == 1
    assert row.prompt == coder.prompt(TALK) and spelled(coder, row.prompt) == row.prompt_text == coder.text(TALK)
