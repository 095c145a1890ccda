"""``rto alpaca``: the numbers of AlpacaEval 2 from annotations that a judge has made."""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rto.commands.asking import add_judge, endpoint_of

ORDER = "one game an instruction, whose text draws which answer is shown first"
HELP = "AlpacaEval 2 from annotations, or from a judge: win rate, and with the official difficulty file the LC one"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("annotations", nargs="?", help="the official annotations.json, or a CSV of numbers alone")
    parser.add_argument("--difficulty", help="df_gamed.csv; without it there is no length-controlled win rate")
    parser.add_argument("--reference", help="the baseline's outputs (JSON), which number the instructions")
    parser.add_argument("--name", help="the evaluated model (generator_2); default: as the file says")
    parser.add_argument("--out", help="a folder for report.json and leaderboard.csv")
    parser.add_argument(
        "--bootstrap", type=int, default=200, help="rounds of the bootstrap error; default: 200, 0: none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: 0")
    asking = parser.add_argument_group("instead of ANNOTATIONS, ask a judge (with --reference and --out)")
    add_judge(asking, max_tokens=None)
    asking.add_argument("--outputs", help="the model's outputs: model_outputs.json, or answers of rto generate")


def run(known: argparse.Namespace) -> int:
    from rto.evaluation import alpaca, alpaca_files
    from rto.evaluation.endpoint import utc
    from rto.evaluation.winrate import without_nan

    if known.bootstrap < 0 or known.bootstrap == 1:
        raise ValueError(f"--bootstrap {known.bootstrap}: write 0 for none, or two or more rounds")
    if bool(known.annotations) == bool(known.outputs):
        raise ValueError("give annotations, or --outputs FILE --reference FILE --model JUDGE --out FOLDER to make them")
    path, asked = _ask(known) if known.outputs else (known.annotations, {})
    annotations = alpaca_files.read_annotations(path, known.name, known.reference)
    name = annotations.name or Path(path).stem
    raw = alpaca.win_rates(annotations)
    report: dict[str, Any] = {
        "name": name,
        "baseline": annotations.baseline,
        "judge": annotations.annotator,
        **asked,
        "scored": utc(),
        "indexed_by": annotations.indexed_by,
        **asdict(raw),
    }
    lines = [
        ("judge", annotations.annotator or "not named by the file"),
        ("WR", f"{raw.win_rate:.2f} %"),
        ("SE", f"{raw.standard_error:.2f}"),
        ("wins, losses, draws", f"{raw.n_wins}, {raw.n_wins_base}, {raw.n_draws}"),
        ("n", f"{raw.n_total}" + (f", {raw.n_missing} rows without a preference" if raw.n_missing else "")),
        ("discrete WR", f"{raw.discrete_win_rate:.2f} %"),
        ("average length", f"{raw.avg_length} characters"),
    ]
    if raw.verdicts == "discrete":
        lines.append(("note", "discrete verdicts: the judge gave no log-probs, so this is not the published metric"))
    lc = None
    if known.difficulty:
        import sklearn.linear_model  # noqa: F401  now, so that its loading does not count as fitting

        difficulty = alpaca_files.read_difficulty(known.difficulty)
        digest = hashlib.sha256(Path(known.difficulty).read_bytes()).hexdigest()
        file = {"path": known.difficulty, "sha256": digest}
        start = time.perf_counter()
        lc = alpaca.length_controlled(annotations, difficulty)
        seconds = time.perf_counter() - start
        report["length_controlled"] = {**asdict(lc), "difficulty_file": file, "fit_seconds": seconds}
        lines += [("LC", f"{lc.win_rate:.2f} %"), ("LC SE (published)", f"{lc.standard_error:.2f}")]
        if known.bootstrap:
            start = time.perf_counter()
            error = alpaca.bootstrap_error(annotations, difficulty, lc.c, known.bootstrap, known.seed)
            took = time.perf_counter() - start
            bootstrap = {"standard_error": error, "rounds": known.bootstrap, "seed": known.seed, "seconds": took}
            report["length_controlled"]["bootstrap"] = bootstrap
            lines.append(("LC SE (bootstrap)", f"{error:.2f} from {known.bootstrap} rounds"))
        lines.append(("fit", f"{seconds:.2f} s" + ("" if lc.c is None else f", C = {lc.c:.4g}")))
        if lc.suspicious:
            lines.append(("warning", "LC is far from WR: the fit may have failed"))
    else:
        lines.append(("note", "no length-controlled win rate without --difficulty df_gamed.csv"))
    print(f"{name} against {annotations.baseline or 'the baseline'}")
    print("\n".join(f"  {label:<20} {value}" for label, value in lines))
    if known.out:
        folder = Path(known.out)
        folder.mkdir(parents=True, exist_ok=True)
        alpaca_files.write_json(folder / "report.json", without_nan(report))
        alpaca_files.write_leaderboard(folder / "leaderboard.csv", {name: (raw, lc)})
        print(f"  {'written':<20} {folder / 'report.json'}, {folder / 'leaderboard.csv'}")
    return 0


def _ask(known: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Have every instruction judged; the path of the annotations, and for the report how they were made."""
    from rto.evaluation import alpaca, alpaca_files
    from rto.evaluation.alpaca_judge import annotate
    from rto.evaluation.answers import read_answers
    from rto.evaluation.endpoint import asked_of, digest, read_rows
    from rto.report.log import Progress

    for flag in ("reference", "model", "out"):
        if not getattr(known, flag):
            raise ValueError(f"--outputs asks a judge, which needs --{flag} too")
    endpoint = endpoint_of(
        known,
        temperature=alpaca.JUDGE_SAMPLING["temperature"],
        max_tokens=int(alpaca.JUDGE_SAMPLING["max_tokens"]),
        top_logprobs=int(alpaca.JUDGE_SAMPLING["top_logprobs"]),
    )
    folder = Path(known.out)
    model, baseline = read_answers(known.outputs), read_answers(known.reference)
    with Progress(enabled=not known.quiet) as progress:
        progress.start("alpaca", len(baseline))
        rows = annotate(model, baseline, endpoint, folder, lambda done, _: progress.update(done, {}))
    alpaca_files.write_json(folder / "annotations.json", rows)
    failed = sum(row.get("error") is not None for row in rows)
    if failed:
        print(f"rto alpaca: {failed} of {len(rows)} judgments failed: the same command asks for them again")
    prompt = digest([alpaca.JUDGE_SYSTEM, alpaca.JUDGE_USER])
    made = asked_of(read_rows(folder / "replies.jsonl"))
    return str(folder / "annotations.json"), {**made, "order": ORDER, "prompt_hash": prompt}
