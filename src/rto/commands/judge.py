"""``rto judge``: answers of two or more systems before a judge behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rto.commands.asking import add_judge, endpoint_of

HELP = "pairwise win rates under a judge, any OpenAI-compatible endpoint"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "answers", nargs="+", help="two or more files of answers; each is judged against each later one"
    )
    add_judge(parser, required=True, max_tokens=2048)
    parser.add_argument("--template", default="helpful", help="helpful (default), quality, or a TOML file")
    parser.add_argument("--order", choices=("both", "single"), default="both", help="games a prompt; default: both")
    parser.add_argument("--out", default="judged", help="folder of judgments and report; default: judged")
    parser.add_argument("--limit", type=int, help="at most so many prompts a pair")
    parser.add_argument("--on-missing", choices=("error", "skip"), default="error", help="prompts that one file lacks")
    parser.add_argument("--seed", type=int, default=0, help="of order, judge and bootstrap; default: 0")


def run(known: argparse.Namespace) -> int:
    """0: there are verdicts (failures are told on standard error), 1: every game failed. ValueError: wrong input."""
    from rto.evaluation.answers import read_answers
    from rto.evaluation.judge import JUDGMENTS, judge, markdown
    from rto.evaluation.judge_templates import load_template

    endpoint = endpoint_of(known, known.seed)
    report = judge(
        [read_answers(path) for path in known.answers],
        load_template(known.template),
        endpoint,
        Path(known.out),
        order=known.order,
        limit=known.limit,
        on_missing=known.on_missing,
        seed=known.seed,
        progress=None if known.quiet else _Progress(),
    )
    print(markdown(report), end="")
    counts, path = report["games"], Path(known.out) / JUDGMENTS
    without = counts["failed"] + counts["invalid"]
    if without:
        print(
            f"rto judge: {without} of {counts['played']} games have NO VERDICT: {counts['failed']} failed (the same "
            f"command asks them again), {counts['invalid']} replies were invalid (kept in {path})",
            file=sys.stderr,
        )
    return 1 if without and without == counts["played"] else 0


class _Progress:
    """A line every ten seconds, and at the end."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, finished: int, total: int) -> None:
        if finished == total or time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            print(f"{finished} of {total} games", file=sys.stderr, flush=True)
