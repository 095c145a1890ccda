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
        runs.append(json.loads((folder / "evaluation.json").read_text())["comparison"])
    print(table(runs, known.seeds))


def table(runs: list[dict], seeds: list[int]) -> str:
    """Markdown: each policy's oracle score, KL and length by seed, then every pair's difference."""
    names = runs[0]["names"]
    lines = [f"| policy | {' | '.join(f'seed {seed}' for seed in seeds)} | mean [95 %] | KL | tokens |"]
    lines.append("| --- |" + " --- |" * (len(seeds) + 3))
    scores = {name: [run["policies"][name]["score"] for run in runs] for name in names}
    for name in names:
        mean = seed_interval(scores[name])
        rest = [sum(run["policies"][name][key] for run in runs) / len(runs) for key in ("kl", "length")]
        cells = " | ".join(f"{score:.2f}" for score in scores[name])
        interval = f"{mean.estimate:.2f} [{mean.low:.2f}, {mean.high:.2f}]"
        lines.append(f"| {name} | {cells} | {interval} | {rest[0]:.2f} | {rest[1]:.1f} |")
    lines += ["", "| difference in oracle score | mean [95 %] | seeds won | win rate |", "| --- | --- | --- | --- |"]
    for b, a in combinations(names, 2):
        gap = across_seeds(scores[a], scores[b])
        won = sum(x > y for x, y in zip(scores[a], scores[b], strict=True))
        i, j = names.index(a), names.index(b)
        rate = sum(run["matrix"][i][j] for run in runs) / len(runs)
        said = f"{gap.estimate:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"
        lines.append(f"| {a} - {b} | {said} | {won}/{len(runs)} | {100 * rate:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
