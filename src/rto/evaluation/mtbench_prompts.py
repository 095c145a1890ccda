"""What an MT-Bench judge is asked: one answer to grade, or two to compare, for either turn of a conversation.

The prompts have the structure of the released ones (FastChat ``llm_judge``) in our own words: numbers from another
wording are not those of a published table, and the templates' names say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rto.evaluation.endpoint import Task
from rto.evaluation.formats import Question

Turns = dict[int, list[str]]  # question_id -> the two answers of a model

REFERENCED = ("math", "reasoning", "coding", "arena-hard-200")  # categories graded beside a reference answer

_SYSTEM = "You are a helpful assistant."
_JUDGE = "Act as an impartial judge of "
_QUALITY = (
    "Weigh how helpful, relevant and accurate {it} is, and its depth, creativity and level of detail. "
    "Start with a short explanation."
)
_CORRECT = (
    "Weigh whether {it} is correct and helpful. A reference answer is given: start by comparing with it, and name and "
    "correct every mistake."
)
_RATE = (
    " Be as objective as you can. After the explanation give a rating from 1 to 10, in exactly this form: "
    '"[[rating]]", for example: "Rating: [[5]]".'
)
_CHOOSE = (
    " Neither the order in which the answers stand, nor their length, nor the assistants' names may influence you. "
    'Be as objective as you can. After the explanation give your verdict in exactly this form: "[[A]]" if assistant A '
    'is better, "[[B]]" if assistant B is better, "[[C]]" for a tie.'
)


def single_tasks(
    questions: Sequence[Question], model: str, answers: Turns, references: Turns | None = None
) -> list[Task]:
    """Two tasks a question: the first answer alone, and the second one with the whole conversation.

    Raises:
        ValueError: an answer is missing, or the reference of a question whose category needs one.
    """
    tasks = []
    for question in questions:
        given, reference = _given(question, model, answers), _reference(question, references)
        for turn in (1, 2):
            template = f"rto-single-{'math-v1' if reference else 'v1'}{'-multi-turn' if turn == 2 else ''}"
            rules = (_CORRECT if reference else _QUALITY).format(it="the answer") + _RATE
            if turn == 1:
                system = _SYSTEM
                parts = [f"[Instruction]\n{_JUDGE}the answer of an AI assistant to the question below. {rules}"]
                parts += [f"[Question]\n{question.turns[0]}", *_shown(question, reference, turn)]
                user = "\n\n".join([*parts, _block("Assistant's Answer", given[0])])
            else:
                system = f"{_JUDGE}an AI assistant's answer to the second question of the user. {rules}"
                user = "\n\n\n".join([*_shown(question, reference, turn), _talk("A", question, given)])
            about = _about(question, template, turn, user) | {"model": model}
            tasks.append(Task(f"{model}/{question.key}/{turn}", _messages(system, user), about))
    return tasks


def pair_tasks(
    questions: Sequence[Question],
    models: tuple[str, str],
    answers: Mapping[str, Turns],
    references: Turns | None = None,
) -> list[Task]:
    """Two games a turn of every question: the first model is A in game 1 and B in game 2. Raises as single_tasks."""
    tasks = []
    for question in questions:
        reference = _reference(question, references)
        for turn in (1, 2):
            template = f"rto-pair-{'math-v1' if reference else 'v2'}{'-multi-turn' if turn == 2 else ''}"
            what = "answers to the second question of the user" if turn == 2 else "answers to the question below"
            rules = (_CORRECT if reference else _QUALITY).format(it="each answer") + _CHOOSE
            system = f"{_JUDGE}the {what} by two AI assistants, and choose the better one. {rules}"
            for game, order in ((1, models), (2, models[::-1])):
                first, second = (_given(question, name, answers[name]) for name in order)
                if turn == 1:
                    parts = [f"[User Question]\n{question.turns[0]}", *_shown(question, reference, turn)]
                    parts += [_block("Assistant A's Answer", first[0]), _block("Assistant B's Answer", second[0])]
                    user = "\n\n".join(parts)
                else:
                    parts = [_talk("A", question, first), _talk("B", question, second)]
                    user = "\n\n\n".join([*_shown(question, reference, turn), *parts])
                about = _about(question, template, turn, user)
                about |= {"model_1": models[0], "model_2": models[1], "game": game}
                key = f"{models[0]}/{models[1]}/{question.key}/{turn}/{game}"
                tasks.append(Task(key, _messages(system, user), about))
    return tasks


def _given(question: Question, model: str, answers: Turns) -> list[str]:
    if question.key not in answers:
        raise ValueError(f"{model} has no answer to question {question.key}: complete its file with `rto generate`")
    return answers[int(question.key)]


def _reference(question: Question, references: Turns | None) -> list[str] | None:
    """The reference answers of a question that is graded with them. The question file's own are not used."""
    category = question.record["category"]
    if category not in REFERENCED:
        return None
    if references is None or question.key not in references:
        raise ValueError(
            f"question {question.key} ({category}) is graded beside a reference answer: give a file of them "
            "(--references reference_answer/gpt-4.jsonl), or leave the question out"
        )
    return references[int(question.key)]


def _shown(question: Question, reference: Sequence[str] | None, turn: int) -> list[str]:
    """The reference as the judge sees it; nothing without one."""
    if reference is None:
        return []
    if turn == 1:
        return [_block("Reference Answer", reference[0])]
    return [_conversation("Reference Answer", "Reference answer", question, reference)]


def _about(question: Question, template: str, turn: int, user: str) -> dict[str, Any]:
    known = {"question_id": question.key, "category": question.record["category"]}
    return known | {"turn": turn, "template": template, "user_prompt": user}


def _messages(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _block(name: str, text: str) -> str:
    return f"[The Start of {name}]\n{text}\n[The End of {name}]"


def _talk(letter: str, question: Question, given: Sequence[str]) -> str:
    return _conversation(f"Assistant {letter}'s Conversation with User", f"Assistant {letter}", question, given)


def _conversation(name: str, speaker: str, question: Question, given: Sequence[str]) -> str:
    turns = zip(question.turns, given, strict=True)
    said = [f"### User:\n{asked}\n\n### {speaker}:\n{answer}" for asked, answer in turns]
    return "\n\n".join([f"<|The Start of {name}|>", *said, f"<|The End of {name}|>"])
