"""``rto doctor RUN``: what the metrics of a run say is going wrong."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from pathlib import Path

HELP = "what the metrics of a run say is going wrong: evidence, likely cause, what to change"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the folder of a run, finished or not")
    parser.add_argument("--json", action="store_true", help="findings as JSON")


def run(known: argparse.Namespace) -> int:
    """0 whatever is found. Raises ValueError when the folder is no run, or its metrics are broken."""
    from rto.report.doctor import diagnose
    from rto.report.log import METRICS, read_metrics

    folder = Path(known.run)
    if not (folder / METRICS).is_file():
        raise ValueError(f"{folder}: no {METRICS} there: not the folder of a run, or nothing has been trained yet")
    rows = read_metrics(folder)
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    findings = diagnose(rows)
    if known.json:
        print(json.dumps({"stages": stages, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return 0
    number = f"{len(stages)} stage" + "s" * (len(stages) != 1)
    if not findings:
        print(f"{folder}: nothing found in {number}")
        return 0
    print(f"{folder}: {len(findings)} finding{'s' * (len(findings) != 1)} in {number}")
    for finding in findings:
        print(f"\n{finding.severity.upper()}  {finding.rule}  in {finding.stage}, {finding.steps}")
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in finding.evidence.items())
        for head, text in (("evidence", numbers), ("cause", finding.cause), ("change", finding.remedy)):
            print(textwrap.fill(f"{head:<10}{text}", 110, initial_indent="  ", subsequent_indent=" " * 12))
    return 0
