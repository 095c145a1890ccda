"""The one module that turns text into tokens.

What training sees is ``prompt ids + answer ids``, each tokenised on its own, and generation starts from the
same prompt ids. So a prompt is always a prefix of its completion, whatever the tokenizer would merge.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import jinja2

from rto.config import Files
from rto.data.layouts import Prompt, Reason, plain
from rto.data.sources import Loaded, RejectedRow, TextAnswer, TextPair, TextPrompt, TextScored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers without a template: "User: hi\n\nAssistant: hello\n\nUser: bye\n\nAssistant:", after the BOS token
# if there is one. The answer follows as " " + text + EOS; the space belongs to the answer's tokens, as byte-level
# BPE vocabularies have it.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# What a template raises: its own errors, and those of the expressions in it.
_TEMPLATE = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError)
_PROBE = "rto-probe"  # an answer that is looked for in the rendered conversation


def load_template(tokenizer: PreTrainedTokenizerBase, config: Files) -> str:
    """Give the tokenizer its template and return it: ``config.chat_template``, its own, or the plain one.

    It is set on the tokenizer so that a model saved with it chats as it was trained.
    Raises ValueError for a file that is missing, empty or not UTF-8.
    """
    if config.chat_template is not None:
        path = Path(os.path.expanduser(config.chat_template))
        if not os.path.isfile(path):
            raise ValueError(f"data.chat_template: file not found: {plain(str(path.absolute()))}. Name a Jinja file")
        try:
            given = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"data.chat_template = {str(path)!r}: not UTF-8 ({error}): save it as UTF-8") from None
        if not given.strip():
            raise ValueError(f"data.chat_template = {str(path)!r}: is empty: write one, or leave the key out")
        tokenizer.chat_template = given
    template = _template(tokenizer)
    tokenizer.chat_template = template
    return template


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE


class Encoder:
    """Prompts and answers to ids and back.

    ``end`` is the token that ends a response: the first special token that the template puts after an answer,
    else the tokenizer's EOS. ``pad`` is the tokenizer's padding token, else its EOS, else ``end``.
    ``max_prompt`` and ``max_response`` are in tokens. Raises ValueError when no end token can be found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt: int,
        max_response: int,
        on_over_long: Literal["truncate", "reject"] = "truncate",
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt = max_prompt
        self.max_response = max_response
        self.on_over_long = on_over_long
        self._chat_template = _template(tokenizer)
        self.lead, end = self._probe()
        if end is None:
            raise ValueError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: neither the chat template nor an EOS token says how a "
                "response ends: set eos_token in its tokenizer_config.json, or give --data.chat_template"
            )
        self.end: int = end
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, end)
        self.pad: int = next(token for token in pads if token is not None)

    def text(self, prompt: Prompt) -> str:
        """The prompt as the model reads it: a chat rendered by the template, a string as it is."""
        return prompt if isinstance(prompt, str) else self._render(prompt, generate=True)

    def prompt(self, prompt: Prompt) -> list[int]:
        """Prompt ids; over ``max_prompt`` they lose their beginning, all but a BOS token."""
        return self._cut_prompt(self._prompt(prompt, self.text(prompt)))

    def answer(self, prompt: Prompt, answer: str) -> tuple[list[int], bool]:
        """Answer ids with the end token and True; over ``max_response``, cut, without it, and False.

        An end token that is spelled out in the text ends the answer there: nothing is generated after it either.
        """
        lead = "" if isinstance(prompt, str) else self.lead
        ids = self._ids(lead + answer)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        if len(ids) < self.max_response:
            return [*ids, self.end], True
        return ids[: self.max_response], False

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens. Under the plain template an answer begins with its space."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _prompt(self, prompt: Prompt, text: str) -> list[int]:
        """Ids of a prompt whose :meth:`text` is known."""
        if not isinstance(prompt, str):
            return self._once(self._ids(text))  # the template has written the special tokens
        ids = list(self.tokenizer(prompt, verbose=False)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos and not prompt.endswith(str(self.tokenizer.eos_token)):
            ids = ids[:-1]  # some tokenizers end every text; a prompt goes on
        return self._once(ids)

    def _once(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_prompt:
            return ids
        # Models that were trained with BOS in front lose much without it. ChatML models may call the mark of every
        # turn their BOS: that one goes with its turn.
        bos = self.tokenizer.bos_token_id
        keep = 1 if ids[0] == bos and ids.count(bos) == 1 and self.max_prompt > 1 else 0
        return ids[:keep] + ids[len(ids) - self.max_prompt + keep :]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self._chat_template, add_generation_prompt=generate, tokenize=False
            )
        except _TEMPLATE as error:
            roles = plain(", ".join(message["role"] for message in messages))
            raise ValueError(
                f"the chat template fails on a conversation of {roles}: {plain(str(error))}. "
                "Leave such rows out, or give another --data.chat_template"
            ) from error
        return str(text)

    def _probe(self) -> tuple[str, int | None]:
        """What the template writes between generation prompt and answer, and the token after the answer."""
        question = [{"role": "user", "content": "?"}]
        before = self._render(question, generate=True)
        whole = self._render([*question, {"role": "assistant", "content": _PROBE}], generate=False)
        eos = self.tokenizer.eos_token_id
        found = whole.rfind(_PROBE)
        if found < 0:
            return "", eos
        lead = whole[len(before) : found] if whole.startswith(before) else ""
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        if self.tokenizer.unk_token_id != eos:
            special.discard(self.tokenizer.unk_token_id)
        after = self._ids(whole[found + len(_PROBE) :])
        return lead, next((token for token in after if token in special), eos)


# --- rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptRow:
    """``prompt`` is what ``text`` was rendered from: a scorer with another chat template renders it anew."""

    row: int
    text: str
    ids: list[int]
    prompt: Prompt | None = None


@dataclass(frozen=True)
class AnswerRow:
    """One demonstration. ``finished`` is False for an answer that was cut: it has no end token."""

    row: int
    prompt_text: str
    prompt: list[int]
    answer: list[int]
    finished: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prompt and answer."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class PairRow:
    row: int
    prompt_text: str
    prompt: list[int]
    chosen: list[int]
    chosen_finished: bool
    rejected: list[int]
    rejected_finished: bool
    margin: float

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prompt and answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class ScoredRow:
    """One prompt with one answer or more; ``finished`` and ``scores`` have an entry an answer."""

    row: int
    prompt_text: str
    prompt: list[int]
    answers: list[list[int]]
    finished: list[bool]
    scores: list[float]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prompt and answer."""
        return len(self.prompt) + max(map(len, self.answers))


Row = TypeVar("Row")


@dataclass
class Encoded(Generic[Row]):
    """Rows of ids, every bad row (of reading and of encoding) and how many prompts and answers were cut."""

    file: str
    rows: list[Row]
    rejected: list[RejectedRow]
    cut_prompts: int = 0
    cut_answers: int = 0


def encode_prompts(encoder: Encoder, loaded: Loaded[TextPrompt]) -> Encoded[PromptRow]:
    """Raises ValueError when no row is left, or when the template refuses one."""
    out: Encoded[PromptRow] = Encoded(loaded.file, [], list(loaded.rejected))
    for row in loaded.rows:
        coded = _encode(encoder, out, row.row, row.prompt, [])
        if coded is not None:
            out.rows.append(PromptRow(row.row, coded[0], coded[1], row.prompt))
    return _some(out)


def encode_answers(encoder: Encoder, loaded: Loaded[TextAnswer]) -> Encoded[AnswerRow]:
    """Raises as :func:`encode_prompts`."""
    out: Encoded[AnswerRow] = Encoded(loaded.file, [], list(loaded.rejected))
    for row in loaded.rows:
        coded = _encode(encoder, out, row.row, row.prompt, [row.answer])
        if coded is not None:
            text, prompt, answers = coded
            out.rows.append(AnswerRow(row.row, text, prompt, *answers[0]))
    return _some(out)


def encode_pairs(encoder: Encoder, loaded: Loaded[TextPair]) -> Encoded[PairRow]:
    """Pairs whose answers are equal once they are cut teach nothing: same_answers. Raises as :func:`encode_prompts`."""
    out: Encoded[PairRow] = Encoded(loaded.file, [], list(loaded.rejected))
    for row in loaded.rows:
        coded = _encode(encoder, out, row.row, row.prompt, [row.chosen, row.rejected], differ=True)
        if coded is not None:
            text, prompt, answers = coded
            out.rows.append(PairRow(row.row, text, prompt, *answers[0], *answers[1], row.margin))
    return _some(out)


def encode_scored(encoder: Encoder, loaded: Loaded[TextScored]) -> Encoded[ScoredRow]:
    """A row with one bad answer is rejected as a whole. Raises as :func:`encode_prompts`."""
    out: Encoded[ScoredRow] = Encoded(loaded.file, [], list(loaded.rejected))
    for row in loaded.rows:
        coded = _encode(encoder, out, row.row, row.prompt, row.answers)
        if coded is not None:
            text, prompt, answers = coded
            ids, finished = [ids for ids, _ in answers], [end for _, end in answers]
            out.rows.append(ScoredRow(row.row, text, prompt, ids, finished, row.scores))
    return _some(out)


def _encode(
    encoder: Encoder, out: Encoded[Row], row: int, prompt: Prompt, texts: list[str], differ: bool = False
) -> tuple[str, list[int], list[tuple[list[int], bool]]] | None:
    """Text and ids of the prompt and ids of the answers; None for a row that was rejected into ``out``."""
    try:
        text = encoder.text(prompt)
        whole = encoder._prompt(prompt, text)
    except ValueError as error:
        raise ValueError(f"{out.file}, row {row}: {error}") from error
    answers = [encoder.answer(prompt, answer) for answer in texts]
    long, cut = len(whole) > encoder.max_prompt, sum(not finished for _, finished in answers)
    bad: tuple[Reason, str] | None = None
    if (long or cut) and encoder.on_over_long == "reject":
        what = f"prompt of {len(whole)} tokens" if long else f"answer of over {encoder.max_response} tokens"
        bad = "over_long", what
    elif not whole:
        bad = "empty_prompt", "the prompt has no tokens"
    elif any(ids == [encoder.end] for ids, _ in answers):
        bad = "empty_answer", "an answer has no tokens before its end"
    elif differ and answers[0] == answers[1]:
        bad = "same_answers", f"chosen and rejected are the same {len(answers[0][0])} tokens"
    if bad is not None:
        out.rejected.append(RejectedRow(out.file, row, *bad))
        return None
    out.cut_prompts += long
    out.cut_answers += cut
    return text, encoder._cut_prompt(whole), answers


def _some(out: Encoded[Row]) -> Encoded[Row]:
    if not out.rows:
        reasons = sorted({bad.reason for bad in out.rejected})
        raise ValueError(
            f"{out.file}: no row is left after encoding ({', '.join(reasons)}): raise data.max_prompt and "
            "data.max_response, or set data.on_over_long = 'truncate'"
        )
    return out
