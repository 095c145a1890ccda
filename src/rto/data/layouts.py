"""From one record of a data set to text: the layouts that preference data comes in.

========== ======================================================================================
layout     a record
========== ======================================================================================
trl        ``prompt``, ``chosen``, ``rejected``: strings, or lists of ``{"role", "content"}``. Without
           ``prompt``, chosen and rejected are whole conversations that share all but the last message.
           A string prompt beside whole conversations (UltraFeedback) is their first user message.
hh         ``chosen``, ``rejected``: whole dialogues "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF)
sharegpt   ``conversations``, ``chosen``, ``rejected`` made of ``{"from", "value"}``, optional ``system``
prompts    ``prompt``, or ``messages`` that end with a user turn
messages   ``messages`` that end with an assistant turn, or ``prompt`` and ``completion`` / ``response``
scored     ``prompt``, ``completion`` / ``response`` and ``label`` (true: desirable), or ``prompt``, a list of
           ``answers`` / ``completions`` / ``responses`` and as many numbers in ``scores``. An answer is a
           string, an assistant message or a whole conversation.
========== ======================================================================================

A field that is null counts as missing. Messages keep their role and content and nothing else.
"""

from __future__ import annotations

import re
import sys
from typing import Any, Literal

Prompt = str | list[dict[str, str]]  # a list is a chat; a string is plain text, used as it is without a template
Record = dict[str, Any]
Reason = Literal[
    "undecodable",
    "not_an_object",
    "missing_field",
    "wrong_type",
    "roles_out_of_order",
    "empty_prompt",
    "empty_answer",
    "same_answers",
    "prompts_differ",
    "no_answers",
    "lengths_differ",
    "over_long",
]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_COMPLETIONS = ("completion", "response")
_ANSWERS = ("answers", "completions", "responses")


class BadRow(Exception):
    """A row that cannot be used, and why. ``detail`` is made :func:`plain`: it may quote the row."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason: Reason = reason
        self.detail = plain(detail)
        super().__init__(f"{reason}: {self.detail}")


def plain(text: str, most: int = 300) -> str:
    """``text`` from a data file as a message may quote it: on one line, without control characters, not too long."""
    short = text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return short if short.isprintable() else repr(short)[1:-1]


def has_pair(record: Record) -> bool:
    return _has(record, "chosen") and _has(record, "rejected")


def has_prompt(record: Record) -> bool:
    return has_pair(record) or any(_has(record, key) for key in ("messages", "conversations", "prompt"))


def has_answer(record: Record) -> bool:
    completed = _has(record, "prompt") and any(_has(record, key) for key in _COMPLETIONS)
    return has_pair(record) or completed or _has(record, "messages") or _has(record, "conversations")


def has_scored(record: Record) -> bool:
    labelled = any(_has(record, key) for key in _COMPLETIONS) and _has(record, "label")
    return labelled or (any(_has(record, key) for key in _ANSWERS) and _has(record, "scores"))


def pair(record: Record, layout: str | None = None) -> tuple[Prompt, str, str, float]:
    """Prompt, chosen answer, rejected answer and margin (0: unknown). Raises :class:`BadRow`."""
    prompt, chosen, rejected = _split_pair(record, layout)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        _not_empty(answer, side)
    if chosen == rejected:
        raise BadRow("same_answers", "chosen and rejected are the same text")
    return prompt, chosen, rejected, _margin(record)


def prompt_of(record: Record) -> Prompt:
    """The prompt of a pair, of a conversation (without its last answer) or alone. Raises :class:`BadRow`."""
    if has_pair(record):
        return _split_pair(record, None)[0]
    for key in ("messages", "conversations"):
        if _has(record, key):
            turns = _system(record) + _messages(record[key], key)
            if turns and turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            return _checked(turns)
    return _checked(_prompt(record))


def answer_of(record: Record) -> tuple[Prompt, str]:
    """A prompt and the answer to learn from it: a demonstration or a chosen answer. Raises :class:`BadRow`."""
    whole = next((key for key in ("messages", "conversations") if _has(record, key)), None)
    if whole == "messages" or (whole and not has_pair(record)):
        head, answer = _whole(_system(record) + _messages(record[whole], whole), whole)
        prompt = _checked(head)
    elif has_pair(record):
        prompt, answer, _ = _split_pair(record, None)
    else:
        key = next((key for key in _COMPLETIONS if _has(record, key)), _COMPLETIONS[0])
        given, answer = _continue(_prompt(record), _field(record, key), key)
        prompt = _checked(given)
    _not_empty(answer, "the answer")
    return prompt, answer


def scored_of(record: Record) -> tuple[Prompt, list[str], list[float]]:
    """A prompt, its answers and as many scores; a label counts as 1 or 0. Raises :class:`BadRow`."""
    key = next((key for key in _ANSWERS if _has(record, key)), None)
    if key is None:
        key = next((key for key in _COMPLETIONS if _has(record, key)), _COMPLETIONS[0])
        values, scores = [_field(record, key)], [_label(record)]
        names = [key]
    else:
        values, numbers = _list(record, key), _list(record, "scores")
        if not values:
            raise BadRow("no_answers", f"{key} is an empty list")
        if len(values) != len(numbers):
            raise BadRow("lengths_differ", f"{len(values)} {key} and {len(numbers)} scores")
        names = [f"number {count} of {key}" for count in range(1, len(values) + 1)]
        scores = [_number(number, f"number {count} of scores") for count, number in enumerate(numbers, 1)]
    given = _prompt(record) if _has(record, "prompt") else None
    parts = [_continue(given, value, name) for value, name in zip(values, names, strict=True)]
    prompt = _checked(parts[0][0])
    if any(other != parts[0][0] for other, _ in parts):
        raise BadRow("prompts_differ", f"the conversations in {key} do not share everything but the last answer")
    for (_, answer), name in zip(parts, names, strict=True):
        _not_empty(answer, name)
    return prompt, [answer for _, answer in parts], scores


def _split_pair(record: Record, layout: str | None) -> tuple[Prompt, str, str]:
    chosen, rejected = _field(record, "chosen"), _field(record, "rejected")
    if layout is None:
        hh = isinstance(chosen, str) and chosen.lstrip().startswith("Human:")
        layout = "sharegpt" if _has(record, "conversations") else "hh" if hh else "trl"
    prompt: Prompt
    other: Prompt
    if layout == "hh":
        prompt, good = _whole(_dialogue(chosen, "chosen"), "chosen")
        other, bad = _whole(_dialogue(rejected, "rejected"), "rejected")
    else:
        given: Prompt | None
        if layout == "sharegpt":
            given = _system(record) + _messages(_field(record, "conversations"), "conversations")
        else:
            given = _prompt(record) if _has(record, "prompt") else None
        prompt, good = _continue(given, chosen, "chosen")
        other, bad = _continue(given, rejected, "rejected")
    if prompt != other:
        raise BadRow("prompts_differ", "chosen and rejected do not share everything but the last answer")
    return _checked(prompt), good, bad


def _continue(given: Prompt | None, value: Any, field: str) -> tuple[Prompt, str]:
    """The prompt and the answer, where ``value`` is the answer alone or the whole conversation."""
    if isinstance(value, str):
        if given is None:
            raise BadRow("missing_field", f"prompt (only whole conversations go without; {field} is a string)")
        return given, text_of(value, field)
    turns = _messages([value] if isinstance(value, dict) else value, field)
    head, answer = _whole(turns, field)
    if not head and given is not None:
        return ([{"role": "user", "content": given}] if isinstance(given, str) else given), answer
    if not head:
        raise BadRow("missing_field", f"prompt ({field} is an answer alone)")
    first = next((turn["content"] for turn in head if turn["role"] == "user"), "")
    agrees = given is None or (first.strip() == given.strip() if isinstance(given, str) else head == given)
    if not agrees:
        raise BadRow("prompts_differ", f"the conversation in {field} does not begin with the prompt")
    return head, answer


def _whole(turns: list[dict[str, str]], field: str) -> tuple[list[dict[str, str]], str]:
    """All but the last message, and the last one, which must be an answer."""
    if not turns:
        raise BadRow("missing_field", f"{field} has no messages")
    if turns[-1]["role"] != "assistant":
        raise BadRow("roles_out_of_order", f"{field} ends with {turns[-1]['role']}, not with assistant")
    return turns[:-1], turns[-1]["content"]


def _messages(value: Any, field: str) -> list[dict[str, str]]:
    """Messages with the keys role / content or from / value."""
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{field} is {_kind(value)}, not text and not a list of messages")
    turns = []
    for number, message in enumerate(value, 1):
        where = f"{field}, message {number}"
        if not isinstance(message, dict):
            raise BadRow("wrong_type", f"{where} is {_kind(message)}, not an object")
        keys = ("from", "value") if _has(message, "from") else ("role", "content")
        for key in keys:
            if not _has(message, key):
                raise BadRow("missing_field", f"{key} of {where}")
        role = text_of(message[keys[0]], f"{keys[0]} of {where}")
        if role not in _ROLES:
            raise BadRow("roles_out_of_order", f"unknown role {role!r} in {where}")
        turns.append({"role": _ROLES[role], "content": text_of(message[keys[1]], f"{keys[1]} of {where}")})
    return turns


def _dialogue(value: Any, field: str) -> list[dict[str, str]]:
    """HH-RLHF's one string as messages."""
    before, *parts = _HH_TURN.split(text_of(value, field))
    if before.strip() or not parts:
        raise BadRow("wrong_type", f"{field} does not begin with 'Human:', as the hh layout asks")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[role], "content": text.strip()} for role, text in turns]


def _checked(prompt: Prompt) -> Prompt:
    """The prompt itself, if it is one: something is asked and the roles are in order."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow("empty_prompt", "the prompt is empty")
        return prompt
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if not turns:
        raise BadRow("empty_prompt", "the prompt has no user message")
    roles = [turn["role"] for turn in turns]
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(roles)) or roles[-1] != "user":
        raise BadRow("roles_out_of_order", "prompt roles: " + ", ".join(turn["role"] for turn in prompt))
    if not all(turn["content"].strip() for turn in turns if turn["role"] == "user"):
        raise BadRow("empty_prompt", "a user message is empty")
    return prompt


def _prompt(record: Record) -> Prompt:
    value = _field(record, "prompt")
    return text_of(value, "prompt") if isinstance(value, str) else _messages(value, "prompt")


def _system(record: Record) -> list[dict[str, str]]:
    """The system message that some ShareGPT files keep in a field of its own."""
    if not (_has(record, "conversations") and _has(record, "system")):
        return []
    text = text_of(record["system"], "system")
    return [{"role": "system", "content": text}] if text else []


def _margin(record: Record) -> float:
    if _has(record, "margin"):
        return _number(record["margin"], "margin")
    if _has(record, "score_chosen") and _has(record, "score_rejected"):
        chosen, rejected = (_number(record[key], key) for key in ("score_chosen", "score_rejected"))
        return _number(chosen - rejected, "score_chosen - score_rejected")  # two finite numbers may be too far apart
    return 0.0


def _label(record: Record) -> float:
    value = _field(record, "label")
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise BadRow("wrong_type", f"label is {_kind(value)}, not true or false")
    return float(value)


def _number(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and abs(value) <= sys.float_info.max):  # false for NaN too
        raise BadRow("wrong_type", f"{where} is {_kind(value)}, not a finite number")
    return float(value)


def _list(record: Record, key: str) -> list[Any]:
    value = _field(record, key)
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{key} is {_kind(value)}, not a list")
    return value


def _has(record: Record, key: str) -> bool:
    return record.get(key) is not None


def _field(record: Record, key: str) -> Any:
    if not _has(record, key):
        raise BadRow("missing_field", f"{key} (keys found: {', '.join(map(str, record)) or 'none'})")
    return record[key]


def text_of(value: Any, where: str) -> str:
    """``value``, which must be text that has a UTF-8 form. Raises :class:`BadRow`."""
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{where} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise BadRow("undecodable", f"{where}: {error.reason} at character {error.start}") from None
    return value


def _not_empty(answer: str, where: str) -> None:
    if not answer.strip():
        raise BadRow("empty_answer", f"{where} is empty")


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | None) else type(value).__name__
