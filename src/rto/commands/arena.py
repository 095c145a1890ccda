"""``rto arena``: the numbers of Arena-Hard, WR and SC, from stored judgments or from a judge that is asked now."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rto.commands.asking import add_judge, endpoint_of

if TYPE_CHECKING:  # imported when the verb runs: `rto --help` must be quick
    from rto.evaluation.arena import Judgment, Rate, Rows, StyleControl
    from rto.evaluation.winrate import Interval

HELP = "Arena-Hard: win rate, and the style-controlled one in a pool of other models; from judgments, or ask a judge"
ASKED = "arena"  # the folder of --out when a judge is asked
ORDER = "two games a question: the baseline is shown first in game 1, the model in game 2"
SCORED_OTHERWISE = {
    "current": "SC is fitted to convergence on all rows (released code: 50 optimiser steps, median of 100 resamples); "
    "WR is the exact mean (released code: mean of 100 unseeded resamples)",
    "classic": "the same objectives as the released code, solved exactly",
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("judgments", nargs="*", help="files or folders of judgments: either official layout, or ours")
    parser.add_argument(
        "--scoring",
        choices=("classic", "current"),
        default="current",
        help="classic: v0.1, papers up to March 2025; current: v2.0. Default: current",
    )
    parser.add_argument("--answers", help="a folder of MODEL.jsonl; default: model_answer beside model_judgment")
    parser.add_argument("--pool", help="judgments of other models, with model_judgment and model_answer, for SC")
    parser.add_argument("--baseline", help="only judgments against it; needed where files hold several or none")
    parser.add_argument("--category", help="only questions of it: the published numbers are of one category")
    parser.add_argument("--out", help="a folder for report.json and report.md; when asking: arena")
    parser.add_argument("--bootstrap", type=int, default=500, help="resamples of each interval; default: 500")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: 0")
    asking = parser.add_argument_group("instead of JUDGMENTS, ask a judge (with --answers and --baseline)")
    asking.add_argument("--questions", help="question.jsonl of either layout")
    add_judge(asking, max_tokens=4096)
    asking.add_argument("--candidates", nargs="+", help="models to judge; default: all of --answers but the baseline")


def run(known: argparse.Namespace) -> int:
    """0: there are scores, 1: every game failed. ValueError: wrong input."""
    from rto.evaluation import arena
    from rto.evaluation.alpaca_files import write_json
    from rto.evaluation.endpoint import utc
    from rto.evaluation.winrate import without_nan

    if known.bootstrap < 1:
        raise ValueError(f"--bootstrap {known.bootstrap}: one round or more is needed")
    if bool(known.judgments) == bool(known.questions):
        raise ValueError("give judgments, or --questions FILE --answers DIR --baseline NAME --model JUDGE to make them")
    judgments = _ask(known) if known.questions else _read(known)
    if all(game is None for j in judgments for game in j.games):
        print("rto arena: every game failed: the same command asks them again", file=sys.stderr)
        return 1
    judged = list(dict.fromkeys(j.model for j in judgments))
    notes = [SCORED_OTHERWISE[known.scoring]]
    _check_one(judgments)
    judgments += _pool(known, judgments, notes)
    _check_one(judgments)
    rows = arena.score_rows(judgments, known.scoring)
    wins = arena.win_rates(rows, known.scoring, known.bootstrap, known.seed)
    notes += _counts(rows)

    controlled, uncentred, tokens = _style(known, rows, judgments[0].baseline, notes)

    first = judgments[0]
    report: dict[str, Any] = {
        "benchmark": "arena-hard",
        "scoring": known.scoring,
        "unit": "percent",
        "judge": first.judge,
        "endpoints": sorted({j.endpoint for j in judgments if j.endpoint}),
        "judged": [f([j.time for j in judgments if j.time], default=None) for f in (min, max)],
        "scored": utc(),
        "order": ORDER,
        "baseline": first.baseline,
        "categories": sorted({j.category for j in judgments if j.category}),
        "questions": len(rows.questions),
        "pool": {"size": len(rows.models), "models": list(rows.models)},
        "tokens": tokens,
        "bootstrap": {"rounds": known.bootstrap, "seed": known.seed},
        "notes": notes,
        "models": {
            name: {
                "win_rate": _percent(wins[name]),
                "style_controlled": _percent(controlled.rates[name]) if controlled else None,
                "uncentred_style_control": 100 * uncentred.rates[name].estimate if uncentred else None,
                "games": _tally(rows, name),
            }
            for name in judged
        },
    }
    if controlled:
        report["style_coefficients"] = controlled.coefficients
        report["style_controlled_matrix"] = {"models": list(rows.models), "rates": (100 * controlled.matrix).tolist()}
    report = without_nan(report)
    text = _markdown(report)
    print(text)
    out = known.out or (ASKED if known.questions else None)
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", report)
        (folder / "report.md").write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten: {folder / 'report.json'}, {folder / 'report.md'}")
    return 0


def _read(known: argparse.Namespace) -> list[Judgment]:
    from rto.evaluation import arena_files

    files = [file for path in known.judgments for file in arena_files.judgment_files(path)]
    found = [j for file in files for j in arena_files.read_judgments(file, known.scoring, known.baseline)]
    kept = [j for j in found if known.category in (None, j.category)]
    if not kept:
        there = ", ".join(sorted({j.category for j in found if j.category})) or "none (classic files do not name them)"
        raise ValueError(f"--category {known.category}: the categories of these judgments are {there}")
    return kept


def _ask(known: argparse.Namespace) -> list[Judgment]:
    """Two games a question and model; replies and official files in the folder of ``--out``."""
    from rto.evaluation import arena_files
    from rto.evaluation.arena_judge import arena_tasks, judgments_of_replies
    from rto.evaluation.endpoint import ask_all
    from rto.evaluation.formats import read_questions
    from rto.report.log import Progress

    if not (known.answers and known.baseline and known.model):
        raise ValueError("--questions needs --answers DIR, --baseline NAME and --model JUDGE")
    questions = [
        question
        for question in read_questions(known.questions, "arena")
        if known.category in (None, question.record.get("category"))
    ]
    if not questions:
        raise ValueError(f"{known.questions}: no question of --category {known.category}")
    there = sorted(path.stem for path in Path(known.answers).glob("*.jsonl"))
    models = known.candidates or [name for name in there if name != known.baseline]
    if not models:
        raise ValueError(f"--answers {known.answers}: no MODEL.jsonl there but the baseline's")
    texts = {
        name: {uid: answer.text for uid, answer in arena_files.answers_of(name, [known.answers]).items()}
        for name in (known.baseline, *models)
    }
    tasks = [
        task
        for name in models
        for task in arena_tasks(questions, texts[known.baseline], texts[name], model=name, baseline=known.baseline)
    ]
    endpoint = endpoint_of(known)
    folder = Path(known.out or ASKED)
    with Progress(enabled=not known.quiet) as progress:
        progress.start("judge", len(tasks))
        rows = ask_all(tasks, endpoint, folder / "judgments.jsonl", lambda done, total: progress.update(done, {}))
    judgments = judgments_of_replies(rows, known.scoring, str(folder / "judgments.jsonl"))
    for name in models:
        file = folder / "model_judgment" / arena_files.judge_folder(known.model) / f"{name}.jsonl"
        arena_files.write_judgments(file, [j for j in judgments if j.model == name], known.scoring)
    return judgments


def _pool(known: argparse.Namespace, judgments: list[Judgment], notes: list[str]) -> list[Judgment]:
    """The judgments of the other models of the pool against the same baseline."""
    from rto.evaluation import arena_files

    if not known.pool:
        return []
    mine, judge, baseline = {j.model for j in judgments}, judgments[0].judge, judgments[0].baseline
    files = arena_files.judgment_files(known.pool, judge)
    found = [j for file in files for j in arena_files.read_judgments(file, known.scoring, known.baseline)]
    found = [j for j in found if j.baseline == baseline]
    for names, why in (
        ({j.model for j in found if j.model in mine}, "its judgments in the pool are left out, the given ones count"),
        ({j.model for j in found if j.model == judge} - mine, "is the judge: its judgments are left out"),
    ):
        notes += [f"{name}: {why}" for name in sorted(names)]
    found = [j for j in found if j.model not in mine | {judge}]
    wanted = {j.uid for j in judgments}  # of one category where one was chosen
    kept = [j for j in found if j.uid in wanted]
    if len(kept) < len(found):
        notes.append(f"{len(found) - len(kept)} judgments of the pool are on other questions and were left out")
    if not kept:
        raise ValueError(f"--pool {known.pool}: no judgment of another model against {baseline} on these questions")
    return kept


def _style(
    known: argparse.Namespace, rows: Rows, baseline: str, notes: list[str]
) -> tuple[StyleControl | None, StyleControl | None, str | None]:
    """SC, its un-centred variant and the counter of tokens; nothing where the answers are not at hand."""
    from rto.evaluation import arena, arena_files
    from rto.evaluation.arena_style import APPROXIMATE

    beside = [arena_files.answer_folder(path) for path in (*known.judgments, *([known.pool] if known.pool else []))]
    folders = [Path(known.answers)] if known.answers else []
    folders += [folder for folder in dict.fromkeys(beside) if folder]
    if not folders:
        notes.append("no style-controlled win rate without the answers: --answers DIR")
        return None, None, None
    answers = {name: arena_files.answers_of(name, folders) for name in dict.fromkeys((baseline, *rows.models))}
    features, tokens = arena_files.style_features(answers, known.scoring)
    if tokens == APPROXIMATE:
        notes.append(
            "tokens are counted approximately: SC is near the one with the official tokenizer, not equal to it"
        )
    if warning := arena.pool_warning(len(rows.models)):
        notes.append(f"warning: {warning}")
    own = {(name, uid): row for name in rows.models for uid, row in features[name].items()}
    inputs = (rows, own, features[baseline], known.scoring)
    controlled = arena.style_controlled(*inputs, known.bootstrap, known.seed)
    return controlled, arena.style_controlled(*inputs, rounds=0, centred=False), tokens


def _check_one(judgments: list[Judgment]) -> None:
    baselines = sorted({j.baseline for j in judgments})
    if len(baselines) > 1:
        raise ValueError(f"judgments against {', '.join(baselines)}: choose one with --baseline")
    judges = sorted({j.judge for j in judgments})
    if len(judges) > 1:
        raise ValueError(f"judgments of {', '.join(judges)}: give those of one judge, judges are not comparable")


def _counts(rows: Rows) -> list[str]:
    """What was not counted, a line a model that lost something."""
    notes = []
    for name, tally in rows.tallies.items():
        if tally.null or tally.unknown or tally.dropped:
            notes.append(
                f"{name}: {tally.null} games without a verdict, {tally.unknown} with a string that is no label (taken "
                "as none; the released current code stops there), "
                f"{tally.dropped} of {tally.questions} questions without a row"
            )
    return notes


def _percent(rate: Rate) -> dict[str, Any]:
    def interval(found: Interval) -> dict[str, float]:
        return {"low": 100 * found.low, "high": 100 * found.high}

    return {"estimate": 100 * rate.estimate, "rows": interval(rate.rows), "questions": interval(rate.questions)}


def _tally(rows: Rows, name: str) -> dict[str, Any]:
    tally = rows.tallies[name]
    labels = {key: tally.labels[key] for key in ("strong win", "win", "tie", "loss", "strong loss")}
    return {
        "questions": tally.questions,
        "counted": tally.counted,
        "null": tally.null,
        "unknown": tally.unknown,
        "questions_without_a_row": tally.dropped,
        "verdicts": labels,
    }


def _markdown(report: Mapping[str, Any]) -> str:
    from rto.evaluation.arena import PUBLISHED_LEVEL

    scoring = report["scoring"]
    level = f"{100 * PUBLISHED_LEVEL[scoring]:.0f} %"
    size = report["pool"]["size"]
    lines = [
        f"# Arena-Hard ({scoring} scoring) against {report['baseline']}",
        "",
        f"Judge {report['judge']}, {report['questions']} questions, {report['order']}. "
        f"Pool: {size} model{'s' * (size != 1)}. Tokens: {report['tokens'] or 'not counted'}.",
        "",
        f"| model | WR % | rows, {level} | questions, 95 % | SC % | rows, {level} | questions, 95 % | games |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in report["models"].items():
        cells = [name, *_cells(model["win_rate"]), *_cells(model["style_controlled"]), str(model["games"]["counted"])]
        lines.append("| " + " | ".join(cells) + " |")
    other = {name: model["uncentred_style_control"] for name, model in report["models"].items()}
    if any(rate is not None for rate in other.values()):
        lines += ["", "Style measured from the baseline's own instead of the pool's mean, in % (not SC):"]
        lines += [f"- {name}: {'-' if rate is None else f'{rate:.1f}'}" for name, rate in other.items()]
    return "\n".join([*lines, "", *(f"- {note}" for note in report["notes"])])


def _cells(rate: Mapping[str, Any] | None) -> list[str]:
    if rate is None or rate["estimate"] is None:
        return ["-"] * 3
    spans = [rate["rows"], rate["questions"]]
    return [f"{rate['estimate']:.1f}"] + [
        "-" if span["low"] is None else f"[{span['low']:.1f}, {span['high']:.1f}]" for span in spans
    ]
