"""Judging for Arena-Hard: the prompt, two games a question, and the verdict in a judge's reply.

The prompt is written for this project. It has the structure of the published one (own answer first, then the
comparison, five labels in double brackets) and not its words, so its numbers are this prompt's numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rto.evaluation.arena import Game, Judgment
from rto.evaluation.arena_style import Scoring
from rto.evaluation.endpoint import Task
from rto.evaluation.formats import Question

_DOUBLE, _SINGLE = re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]")

_OWN_ANSWER = """\
Work in two steps. First write your own answer to the user's prompt, before you judge anything. Then use it to judge \
the two answers."""
_SYSTEM = """\
You are a fair judge of two AI assistants, A and B, who answered the same user prompt. Say which answer serves the \
user better.

{own}Compare the answers with each other and with what you know to be right. Name factual and logical mistakes and \
correct them. A good answer does what was asked (helpful), stays with it (relevant), and is clear without padding \
(concise). After that, weigh originality where it matters, and name what an answer leaves out that the user needs. \
The order in which the answers are shown and their length say nothing about their quality.

End with your verdict, exactly one of these five labels:
[[A>>B]] assistant A is much better
[[A>B]] assistant A is a little better
[[A=B]] both are about equally good
[[B>A]] assistant B is a little better
[[B>>A]] assistant B is much better

The last line of your reply looks like this: "Verdict: [[A=B]]"."""
WITHOUT_OWN_ANSWER = ("creative_writing",)  # categories where a judge's own answer would only anchor it


def judge_messages(prompt: str, a: str, b: str, category: str = "") -> list[dict[str, str]]:
    """System and user message of one game, the answer ``a`` shown first."""
    own = "" if category in WITHOUT_OWN_ANSWER else _OWN_ANSWER + "\n\n"
    blocks = (("user prompt", prompt), ("answer of assistant A", a), ("answer of assistant B", b))
    user = "\n\n".join(f"<|{name}|>\n{text}\n<|end of {name}|>" for name, text in blocks)
    return [{"role": "system", "content": _SYSTEM.replace("{own}", own)}, {"role": "user", "content": user}]


def arena_tasks(
    questions: Sequence[Question],
    baseline_answers: Mapping[str, str],
    model_answers: Mapping[str, str],
    *,
    model: str,
    baseline: str,
) -> list[Task]:
    """Two games a question: 1 shows the baseline as A, 2 the model. Answers are found by the question's key.

    Raises ValueError naming the questions without an answer.
    """
    for name, answers in ((baseline, baseline_answers), (model, model_answers)):
        missing = [str(question.key) for question in questions if question.key not in answers]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(f"{name} has no answer to {len(missing)} of {len(questions)} questions ({shown})")
    tasks = []
    for question in questions:
        uid, prompt, category = str(question.key), question.turns[0], str(question.record.get("category", ""))
        if not isinstance(prompt, str):
            raise ValueError(f"question {uid}: its prompt is a chat, Arena-Hard judges single prompts: give it as text")
        own, other = model_answers[uid], baseline_answers[uid]
        for game, (a, b) in enumerate([(other, own), (own, other)], start=1):
            messages = judge_messages(prompt, a, b, category)
            about = {"uid": uid, "category": category, "model": model, "baseline": baseline, "game": game}
            tasks.append(Task(f"arena/{model}/{baseline}/{uid}/{game}", messages, about))
    return tasks


def read_verdict(text: str, scoring: Scoring) -> str | None:
    """The string that a scoring reads as the verdict of a reply, None for none. It need not be a label.

    current: upper case, double brackets else single ones around A B < > =, the last match. classic: double brackets
    only, case kept, None when different strings were found.
    """
    if scoring == "current":
        found = _DOUBLE.findall(text.upper()) or _SINGLE.findall(text.upper())
        return found[-1] if found else None
    different = set(_DOUBLE.findall(text))
    return different.pop() if len(different) == 1 else None


def judgments_of_replies(
    rows: Sequence[Mapping[str, Any]], scoring: Scoring, source: str = "replies"
) -> list[Judgment]:
    """Judgments from the endpoint's rows (one game a row: ``uid``, ``game``, ``reply``, ``judge`` ...).

    A row without a reply (``error``) is a missing game. Raises ValueError naming ``source``, row and key.
    """
    games: dict[tuple[str, str, str, str], dict[int, Game | None]] = {}
    asked: dict[str, tuple[str, str, str]] = {}
    for number, row in enumerate(rows, start=1):
        for key, kind in (("uid", str), ("model", str), ("baseline", str), ("judge", str), ("game", int)):
            if not isinstance(row.get(key), kind):
                raise ValueError(f"{source}, row {number}: {key} = {row.get(key)!r} is no {kind.__name__}")
        if row["game"] not in (1, 2):
            raise ValueError(f"{source}, row {number}: game = {row['game']}: a question has games 1 and 2")
        uid, reply = row["uid"], row.get("reply")
        if reply is not None and not isinstance(reply, str):
            raise ValueError(f"{source}, row {number}: reply = {reply!r} is no text")
        of_question = games.setdefault((uid, row["model"], row["baseline"], row["judge"]), {})
        if row["game"] in of_question:
            raise ValueError(f"{source}, row {number}: game {row['game']} of question {uid} was judged in a row before")
        failed = reply is None or row.get("error") is not None
        of_question[row["game"]] = None if failed else Game(read_verdict(str(reply), scoring), str(reply))
        asked[uid] = (str(row.get("category") or ""), str(row.get("endpoint") or ""), str(row.get("time") or ""))
    judgments = []
    for (uid, model, baseline, judge), played in games.items():
        category, endpoint, time = asked[uid]
        both = (played.get(1), played.get(2))
        judgments.append(Judgment(uid, category, model, baseline, judge, both, endpoint, time))
    return judgments
