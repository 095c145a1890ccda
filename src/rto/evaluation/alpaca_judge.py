"""AlpacaEval 2 with a judge of your own: annotations of a model's outputs against the baseline's, one game each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rto.evaluation.alpaca import (
    judge_messages,
    order_switched,
    preference_from_text,
    preference_from_top,
    preference_without_judge,
)
from rto.evaluation.answers import Answer
from rto.evaluation.endpoint import Endpoint, Task, ask_all


def annotate(
    model: Sequence[Answer],
    baseline: Sequence[Answer],
    endpoint: Endpoint,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of ``annotations.json`` in the order of the baseline's file; replies are kept in ``folder/replies.jsonl``.

    The judge sees each instruction once, in the seeded order. Its first token's log-probs give a weighted
    ``preference``; without them the verdict itself does (``discrete`` is true). None: no verdict, or a failed request.

    Raises:
        ValueError: instructions of the two files differ, with the count and the first one.
    """
    outputs = {answer.id: answer for answer in model}
    known = {answer.id for answer in baseline}
    lacking = [answer.prompt for answer in baseline if answer.id not in outputs]
    unknown = [answer.prompt for answer in model if answer.id not in known]
    for rows, what in ((lacking, "have no output of the model"), (unknown, "are not in the reference file")):
        if rows:
            raise ValueError(f"{len(rows)} instructions {what}, first {rows[0][:60]!r}: they must be equal, once each")
    tasks = []
    for theirs in baseline:
        ours = outputs[theirs.id]
        if preference_without_judge(theirs.answer, ours.answer) is None:
            switched = order_switched(theirs.prompt)
            messages = judge_messages(theirs.prompt, theirs.answer, ours.answer, switched)
            tasks.append(Task(theirs.id, messages, {"model": ours.model, "switched": switched}))
    folder.mkdir(parents=True, exist_ok=True)
    replies = {row["key"]: row for row in ask_all(tasks, endpoint, folder / "replies.jsonl", progress)}
    return [_annotation(theirs, outputs[theirs.id], replies.get(theirs.id), endpoint.model) for theirs in baseline]


def _annotation(baseline: Answer, model: Answer, reply: dict[str, Any] | None, judge: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    preference = preference_without_judge(baseline.answer, model.answer)
    if reply is not None:
        weighted = bool(reply["top"])
        if weighted:
            value = preference_from_top(reply["top"], reply["switched"])
        else:
            value = preference_from_text(reply["reply"], reply["switched"])
        preference = None if math.isnan(value) else value
        found = {"raw_completion": reply["reply"], "error": reply["error"], "discrete": not weighted}
    return {
        "instruction": baseline.prompt,
        "dataset": baseline.category,
        "output_1": baseline.answer,
        "generator_1": baseline.model,
        "output_2": model.answer,
        "generator_2": model.model,
        "annotator": judge,
        "preference": preference,
        **found,
    }
