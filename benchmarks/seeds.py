"""Which method wins over several seeds: run a recipe once a seed and print paired intervals over the seeds.

    python benchmarks/seeds.py recipes/tiny.toml --seeds 0 1 2 3 4 --output runs/seeds

Finished runs are not done again. A difference is paired by seed; its interval is Student's t over the seeds. The same
folders can be given to `rto compare`, which adds tests, plots and files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rto
from rto.commands.compare import cell, interval
from rto.evaluation.combine import Table, combine
from rto.evaluation.runs import group_runs, read_run
from rto.report.export import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", default="runs/seeds")
    known = parser.parse_args()
    folders = [Path(known.output) / f"seed{seed}" for seed in known.seeds]
    for seed, folder in zip(known.seeds, folders, strict=True):
        rto.run(rto.load_recipe(known.recipe, [("seed", str(seed)), ("output", json.dumps(str(folder)))]))
    runs = [read_run(folder) for folder in folders]
    print(tables(combine(group_runs(runs), next(iter(runs[0].policies)))))


def tables(found: Table) -> str:
    """Markdown: each policy's oracle score, KL, length, win rate against the first policy and token-credit AUC, as
    means over the seeds with intervals; then every pair's difference in score, if the policies are few."""
    (seeds,) = found.recipes.values()
    heads = ["policy", *(f"seed {seed}" for seed in seeds), "oracle score", "KL (nats)", "tokens"]
    heads += [f"wins against {found.against} (%)", "credit AUC"]
    rows = []
    for row in found.rows:
        cells = [row.name, *(f"{row.each['score'][seed]:.2f}" for seed in seeds), cell(row, "score"), cell(row, "kl")]
        rows.append([*cells, cell(row, "length", 2), cell(row, "win_rate"), cell(row, "auc")])
    # The run's own method against every other; of few policies, all pairs.
    own = [row.name for row in found.rows if row.method]
    pairs = [pair for pair in found.pairs if pair.a in own or len(found.rows) <= 5]
    gaps = [
        [
            f"{pair.a} - {pair.b}",
            interval(pair.difference, sign="+"),
            f"{pair.won}/{pair.n}",
            f"{100 * pair.win_rate.estimate:.1f} %",
        ]
        for pair in pairs
    ]
    won = f"{found.pairs[0].unit} won" if found.pairs else "won"
    heads_of_gaps = ["difference in oracle score", "mean [95 %]", won, "win rate"]
    return f"{markdown(heads, rows)}\n\n{markdown(heads_of_gaps, gaps)}"


if __name__ == "__main__":
    main()
