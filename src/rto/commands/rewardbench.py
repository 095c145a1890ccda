"""``rto rewardbench``: how often a scorer or a guide prefers the better answer, by subset and section."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rto.evaluation.rewardbench import Scored

HELP = "RewardBench-style accuracy of a scorer or guide on pairs with subsets"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="the folder of a run (with --pairs), or JSONL of subset, chosen, rejected (scores)"
    )
    parser.add_argument("--pairs", help="pairs with a column subset (JSON, JSONL, Parquet), scored by the run")
    parser.add_argument("--role", choices=("scorer", "guide"), help="what scores; default: scorer")
    parser.add_argument("--name", help="a further one of [scorers] or [guides]; default: that of [reward] or [prefer]")
    parser.add_argument(
        "--plain", action="store_true", help="prompts that are strings are no chats: they go in as they are"
    )
    parser.add_argument("--limit", type=int, help="at most so many pairs")
    parser.add_argument("--sections", help="a JSON object, subset -> section; default: RewardBench's four")
    parser.add_argument("--out", help="a folder for report.json and scores.jsonl")


def run(known: argparse.Namespace) -> int:
    from rto.evaluation import rewardbench
    from rto.pipeline.job import write_json

    sections = rewardbench.read_sections(known.sections) if known.sections else None
    if known.limit is not None and known.limit < 1:
        raise ValueError(f"--limit: at least 1 pair (given: {known.limit})")
    about: dict[str, Any] = {"source": known.source}
    if known.pairs:
        scored, more = _score(known)
        about |= more
    else:
        for flag, given in (("--role", known.role), ("--name", known.name), ("--plain", known.plain)):
            if given:
                raise ValueError(f"{flag} goes with a run and --pairs FILE")
        if Path(known.source).is_dir():
            raise ValueError(f"{known.source} is a folder: give --pairs FILE for its run to score")
        scored = rewardbench.read_scores(known.source)[: known.limit]
    report = about | rewardbench.accuracy(scored, sections)
    print(_shown(report))
    if known.out:
        folder = Path(known.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", report)
        rewardbench.write_scores(folder / "scores.jsonl", scored)
    return 0


def _score(known: argparse.Namespace) -> tuple[list[Scored], dict[str, Any]]:
    """The pairs scored by a role of the run, and what the report says of it."""
    folder = Path(known.source)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json there: not a run folder")
    from rto import recipe
    from rto.config import Files
    from rto.data.chat import encode_pairs
    from rto.evaluation.rewardbench import Scored, read_pairs
    from rto.pipeline.job import Job
    from rto.pipeline.pairs import Kind, score_pairs
    from rto.pipeline.resolve import resolve

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = resolve(recipe.build(stored | {"output": str(folder), "trackers": []}, known.source))
    job = Job(config, quiet=True)
    if job.runtime.world > 1:
        raise ValueError("rto rewardbench scores in one process")
    loaded, subsets = read_pairs(known.pairs, isinstance(config.data, Files) and not known.plain)
    loaded.rows[:] = loaded.rows[: known.limit]
    coded = encode_pairs(job.rows.encoder, loaded)
    if left_out := coded.rejected:
        print(
            f"rto rewardbench: {len(left_out)} pairs left out, the first is row {left_out[0].row}: "
            f"{left_out[0].reason} ({left_out[0].detail})",
            file=sys.stderr,
        )
    if coded.cut_prompts or coded.cut_answers:
        said = f"{coded.cut_prompts} prompts and {coded.cut_answers} answers are cut at the run's limits"
        print(f"rto rewardbench: {said}", file=sys.stderr)
    role: Kind = known.role or "scorer"
    prompts = {row.row: row.prompt for row in loaded.rows}
    chosen, rejected = score_pairs(job, coded.rows, prompts, role, known.name)
    texts = {row.row: (subset, row) for subset, row in zip(subsets, loaded.rows, strict=False)}
    scored = []
    for row, a, b in zip(coded.rows, chosen, rejected, strict=True):
        subset, text = texts[row.row]
        scored.append(Scored(subset, a, b, (len(text.chosen), len(text.rejected))))
    more = {"pairs": known.pairs, "role": role, "name": known.name, "left_out": len(left_out)}
    return scored, more | {"cut_prompts": coded.cut_prompts, "cut_answers": coded.cut_answers}


def _shown(report: dict[str, Any]) -> str:
    """A Markdown table: the whole, sections, subsets, with "longer wins" beside them."""
    longer = report["longer_wins"]
    lines = [["", "accuracy", "95 %", "n", "ties", "missing", "longer wins"], ["---"] * 7]

    def line(name: str, found: dict[str, Any], other: dict[str, Any] | None) -> None:
        counts = [str(found[key]) if key in found else "" for key in ("n", "ties", "missing")]
        interval = f"{_percent(found['low'])} to {_percent(found['high'])}"
        base = _percent(other["accuracy"]) if other else "unknown"
        lines.append([name, _percent(found["accuracy"]), interval, *counts, base])

    line("mean of sections", report["overall"], longer and longer["overall"])
    line("all pairs", report["pooled"], longer and longer["pooled"])
    for section, found in report["sections"].items():
        line(f"section {section}", found, longer and longer["sections"][section])
    for subset, found in report["subsets"].items():
        line(subset, found, longer and longer["subsets"][subset])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}"
