"""``rto mtbench``: MT-Bench scores from stored judgments, or from a judge that is asked now."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rto.commands.asking import add_judge, endpoint_of

HELP = "MT-Bench: grade two-turn answers with a judge, or read judgments; turns, categories, average"
ORDER = {
    "single": "each answer is graded alone",
    "pair": "two games a question and turn: the first model is shown first in game 1, the second in game 2",
}
REPLIES = {"single": "replies.jsonl", "pair": "replies_pair.jsonl"}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("judgments", nargs="?", help="JUDGE_single.jsonl or JUDGE_pair.jsonl, read instead of asking")
    parser.add_argument("--answers", nargs="+", help="answer files to be judged (rto generate --format mtbench)")
    parser.add_argument("--questions", help="question.jsonl: to ask, or for the categories of other questions")
    parser.add_argument("--references", help="reference_answer/gpt-4.jsonl: for math, reasoning and coding")
    parser.add_argument("--pairwise", action="store_true", help="compare the first model with every other one")
    add_judge(parser, max_tokens=2048)
    parser.add_argument("--out", help="a folder for report.json and the official file; when asking: mtbench")


def run(known: argparse.Namespace) -> int:
    """0: there are scores, 1: every judgment failed. ValueError: wrong input."""
    from rto.evaluation import mtbench
    from rto.evaluation.endpoint import asked_of, utc
    from rto.evaluation.formats import read_questions
    from rto.pipeline.job import write_json

    if (known.judgments is None) == (known.answers is None):
        raise ValueError("give a file of judgments, or --answers FILE --questions FILE --model JUDGE to make them")
    questions = read_questions(known.questions, "mtbench") if known.questions else []
    categories = {int(question.key): str(question.record["category"]) for question in questions}
    if known.answers:
        replies = _ask(known, questions)
        kind = "pair" if known.pairwise else "single"
        rows = mtbench.pair_judgments(replies) if known.pairwise else mtbench.single_judgments(replies)
    else:
        kind, rows = mtbench.read_judgments(known.judgments)
        replies = mtbench.read_replies(known.judgments)
    report: dict[str, Any] = {"kind": kind, "failed": sum(reply["error"] is not None for reply in replies)}
    report |= {"order": ORDER[kind], "scored": utc(), "judged": mtbench.judged(rows)}
    if kind == "pair":
        judges = sorted({row["judge"][0] for row in rows})
        report["judges"] = {j: mtbench.summarise_pairs([r for r in rows if r["judge"][0] == j]) for j in judges}
    else:
        judges = sorted({row["judge"] for row in rows})
        report["judges"] = {j: mtbench.summarise([r for r in rows if r["judge"] == j], categories) for j in judges}
    print("\n\n".join(f"judge: {judge}\n{_shown(kind, report['judges'][judge])}" for judge in judges))
    if replies:
        report |= asked_of(replies)
    out = known.out or ("mtbench" if known.answers else None)
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        for judge in judges:
            file = folder / f"{judge.replace('/', '_')}_{kind}.jsonl"
            if kind == "pair":
                mtbench.write_pairs(file, [row for row in rows if row["judge"][0] == judge])
            else:
                mtbench.write_single(file, [row for row in rows if row["judge"] == judge])
        write_json(folder / "report.json", report)
    if report["failed"]:
        again = ": the same command asks them again" if known.answers else ""
        print(f"rto mtbench: {report['failed']} of {len(replies)} failed{again}", file=sys.stderr)
    return 1 if replies and report["failed"] == len(replies) else 0


def _ask(known: argparse.Namespace, questions: list[Any]) -> list[dict[str, Any]]:
    from rto.evaluation import mtbench
    from rto.evaluation.endpoint import ask_all
    from rto.evaluation.mtbench_prompts import pair_tasks, single_tasks

    if not (known.model and questions):
        raise ValueError("--answers needs --model JUDGE and --questions FILE")
    answers: dict[str, Any] = {}
    for path in known.answers:
        for model, turns in mtbench.read_answers(path).items():
            if model in answers:
                raise ValueError(f"{path}: answers of {model} are in another file too: give each model once")
            answers[model] = turns
    references = None
    if known.references:
        references = next(iter(mtbench.read_answers(known.references).values()))
    models = list(answers)
    if known.pairwise:
        if len(models) < 2:
            raise ValueError(f"--pairwise needs the answers of two models or more (found: {', '.join(models)})")
        pairs = [(models[0], other) for other in models[1:]]
        tasks = [task for pair in pairs for task in pair_tasks(questions, pair, answers, references)]
    else:
        tasks = [task for model in models for task in single_tasks(questions, model, answers[model], references)]
    endpoint = endpoint_of(known)
    from rto.report.log import Progress

    path = Path(known.out or "mtbench") / REPLIES["pair" if known.pairwise else "single"]
    with Progress(enabled=not known.quiet) as progress:
        progress.start("judge", len(tasks))
        return ask_all(tasks, endpoint, path, lambda finished, total: progress.update(finished, {}))


def _shown(kind: str, found: Any) -> str:
    """A Markdown table; of grades one more with the categories."""
    from rto.evaluation.mtbench import CATEGORIES

    if kind == "pair":
        heads = ["model 1", "model 2", "win", "tie", "loss", "dropped", "win rate, ties half", "95 %"]
        lines = [
            [row["model_1"], row["model_2"], *(str(row[key]) for key in ("win", "tie", "loss", "dropped"))]
            + [_number(row["win_rate_adjusted"], 3), f"{_number(row['low'], 3)} to {_number(row['high'], 3)}"]
            for row in found
        ]
        return _table(heads, lines)
    heads = ["model", "average", "SE", "turn 1", "turn 2", "rated", "dropped", "outside 1 to 10"]
    keys = ("rows", "dropped", "out_of_range")
    lines = [
        [model, *(_number(row[key]) for key in ("average", "se", "turn_1", "turn_2")), *(str(row[key]) for key in keys)]
        for model, row in found.items()
    ]
    names = list(dict.fromkeys(name for row in found.values() for name in row["categories"]))
    names.sort(key=lambda name: CATEGORIES.index(name) if name in CATEGORIES else len(CATEGORIES))
    by_category = [
        [model, *(_number(row["categories"].get(name, {}).get("average")) for name in names)]
        for model, row in found.items()
    ]
    return _table(heads, lines) + "\n\n" + _table(["model", *names], by_category)


def _number(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _table(heads: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])
