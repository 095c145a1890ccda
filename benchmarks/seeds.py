"""Which method wins over several seeds: run a recipe once a seed and print paired intervals over the seeds.

    python benchmarks/seeds.py recipes/tiny.toml --seeds 0 1 2 3 4 --output runs/seeds

Finished runs are not done again. A difference is paired by seed; its interval is Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import rto
from rto.evaluation.winrate import across_seeds, seed_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", default="runs/seeds")
    known = parser.parse_args()
    runs = []
    for seed in known.seeds:
        folder = Path(known.output) / f"seed{seed}"
        recipe = rto.load_recipe(known.recipe, [("seed", str(seed)), ("output", json.dumps(str(folder)))])
        rto.run(recipe)
        found = json.loads((folder / "evaluation.json").read_text())["comparison"]
        credit = json.loads((folder / "credit.json").read_text())["methods"] or {}
        runs.append(found | {"auc": {name: row["auc"] for name, row in credit.items()}})
    print(table(runs, known.seeds))


def table(runs: list[dict], seeds: list[int]) -> str:
    """Markdown: each policy's oracle score, KL, length, win rate against the reference and token-credit AUC, as means
    over the seeds with intervals; then every pair's difference in score, if the policies are few."""
    names = runs[0]["names"]
    heads = ["policy", *(f"seed {seed}" for seed in seeds), "oracle score", "KL (nats)", "tokens"]
    heads += [f"wins against {names[0]} (%)", "credit AUC"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    scores = {name: [run["policies"][name]["score"] for run in runs] for name in names}
    for i, name in enumerate(names):
        cells = [name, *(f"{score:.2f}" for score in scores[name]), over(scores[name])]
        cells += [over([run["policies"][name][key] for run in runs]) for key in ("kl", "length")]
        cells.append("-" if i == 0 else over([100 * run["matrix"][i][0] for run in runs], 1))
        known = [run["auc"][name] for run in runs if run["auc"].get(name) is not None]
        cells.append(over(known) if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference in oracle score | mean [95 %] | seeds won | win rate |", "| --- | --- | --- | --- |"]
    own = names[-1]  # the run's own method against every other; of few policies, all pairs
    pairs = [(b, a) for b, a in combinations(names, 2) if a == own or len(names) <= 5]
    for b, a in pairs:
        gap = across_seeds(scores[a], scores[b])
        won = sum(x > y for x, y in zip(scores[a], scores[b], strict=True))
        i, j = names.index(a), names.index(b)
        rate = sum(run["matrix"][i][j] for run in runs) / len(runs)
        said = f"{gap.estimate:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"
        lines.append(f"| {a} - {b} | {said} | {won}/{len(runs)} | {100 * rate:.1f} % |")
    return "\n".join(lines)


def over(values: list[float], digits: int = 2) -> str:
    """Mean over the seeds with Student's 95 % interval."""
    found = seed_interval(values)
    return f"{found.estimate:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


if __name__ == "__main__":
    main()
