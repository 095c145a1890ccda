"""``rto compare``: finished runs, their methods and their seeds side by side."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rto.evaluation.combine import Pair, Row, Table
    from rto.evaluation.winrate import Interval

HELP = "methods, seeds and runs side by side: scores, win rates, verdicts, plots"

# Measure -> head, factor, digits.
COLUMNS = {
    "score": ("oracle score", 1, 2),
    "kl": ("KL (nats)", 1, 2),
    "length": ("tokens", 1, 1),
    "win_rate": ("wins against {} (%)", 100, 1),
    "length_controlled": ("the same, length-controlled (%)", 100, 1),
    "auc": ("credit AUC", 1, 2),
}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run that is evaluated")
    parser.add_argument(
        "--by",
        choices=("method", "run"),
        default="method",
        help="method (default): runs that differ only in the seed are seeds of one recipe; run: each run by itself",
    )
    parser.add_argument("--against", default="sft", metavar="NAME", help="the policy of the win rates; default: sft")
    parser.add_argument("--out", metavar="FOLDER", help="write table.md, table.tex, comparison.json and plots there")
    parser.add_argument("--format", choices=("text", "markdown", "latex"), default="text", help="default: text")


def run(known: argparse.Namespace) -> int:
    from rto.evaluation.combine import combine
    from rto.evaluation.runs import group_runs, read_run

    table = combine(group_runs([read_run(folder) for folder in known.runs], known.by), known.against)
    print(shown(table, known.format))
    if known.out:
        for path in write(table, Path(known.out)):
            print(f"wrote {path}")
    return 0


def shown(table: Table, form: Any) -> str:
    """The tables and what to know of them, in a format of :mod:`rto.report.export`."""
    from rto.report.export import escaped, render

    policies = render(form, *policy_table(table), caption="Policies")
    parts = [policies, render(form, *pair_table(table), caption="Pairs")] if table.pairs else [policies]
    facts = notes(table)
    if form == "markdown":
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in facts)])
    return "\n\n".join([*parts, "\n".join(facts if form == "text" else (f"% {escaped(note)}" for note in facts))])


def policy_table(table: Table) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a row a policy."""
    keys = [key for key in COLUMNS if any(key in row.measures for row in table.rows)]
    heads = ["policy", *(COLUMNS[key][0].format(table.against) for key in keys)]
    return heads, [[row.name, *(cell(row, key) for key in keys)] for row in table.rows]


def pair_table(table: Table) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a row a pair."""
    heads = ["pair", "difference in oracle score", "win rate (%)", "won/lost", "of", "p (Holm)", "verdict"]
    return heads, [_pair_cells(pair) for pair in table.pairs]


def notes(table: Table) -> list[str]:
    """What the numbers are, a sentence a line."""
    seeds = [f"{label}: seeds {', '.join(map(str, known))}" for label, known in table.recipes.items()]
    level = f"{100 * table.level:g} %"
    facts = [f"oracle: {oracle}" for oracle in table.oracles]
    facts += [f"WARNING: {flag}; a win under it may be over-optimisation" for flag in table.flags]
    facts.append(f"runs: {'; '.join(seeds)}; {' or '.join(map(str, table.prompts))} prompts a run")
    if any(len(known) > 1 for known in table.recipes.values()):
        facts.append(f"[low, high] over seeds: {level} of Student's t, pairs matched by seed; p: paired t-test")
    if any(len(known) == 1 for known in table.recipes.values()):
        facts.append(
            f"[low, high] of a single run: {level} of a bootstrap over its prompts, which knows nothing of the luck of "
            "training; p: exact sign test"
        )
    facts.append(
        f"verdict: p after Holm's correction over all {len(table.pairs)} pairs below {1 - table.level:.2g}, and the "
        "interval of the difference without 0"
    )
    return facts


def write(table: Table, folder: Path) -> list[Path]:
    """The files of ``--out``."""
    from rto.report import plots
    from rto.report.compared import score_against_kl, win_rates

    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.md": shown(table, "markdown") + "\n",
        "table.tex": shown(table, "latex") + "\n",
        "comparison.json": json.dumps(table.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    written = [folder / name for name in texts]
    points = {row.name: (_bar(row.measures["kl"]), _bar(row.measures["score"])) for row in table.rows}
    figures = {"score-against-kl.png": score_against_kl(points)}
    names = {"win_rate": "win rate", "length_controlled": "length-controlled"}
    rates = {
        row.name: {text: _bar(row.measures[key]) for key, text in names.items() if key in row.measures}
        for row in table.rows
        if "win_rate" in row.measures
    }
    if rates:
        figures["win-rates.png"] = win_rates(rates, f"wins against {table.against}")
    for name, figure in figures.items():
        plots.save_png(figure, folder / name)
    return [*written, *(folder / name for name in figures)]


def cell(row: Row, key: str, digits: int | None = None) -> str:
    """A measure with its interval; a dash where it is not defined."""
    if key not in row.measures:
        return "-"
    _, factor, usual = COLUMNS[key]
    return interval(row.measures[key], factor, usual if digits is None else digits)


def interval(found: Interval, factor: float = 1, digits: int = 2, sign: str = "") -> str:
    """``1.20 [1.00, 1.40]``; without brackets where there is no interval, a dash where there is no value."""
    if math.isnan(found.estimate):
        return "-"
    rounded = [round(factor * value, digits) + 0.0 for value in _bar(found)]  # + 0.0: never -0.00
    values = [format(value, f"{sign}.{digits}f") for value in rounded]
    return values[0] if math.isnan(found.low) else f"{values[0]} [{values[1]}, {values[2]}]"


def _pair_cells(pair: Pair) -> list[str]:
    p = "< 0.001" if pair.p_holm < 0.001 else f"{pair.p_holm:.3f}"
    rate = interval(pair.win_rate, 100, 1)
    counted = f"{pair.n} {pair.unit}"
    name = f"{pair.a} against {pair.b}"
    return [name, interval(pair.difference, sign="+"), rate, f"{pair.won}/{pair.lost}", counted, p, pair.verdict]


def _bar(found: Interval) -> tuple[float, float, float]:
    return found.estimate, found.low, found.high
