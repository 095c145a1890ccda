"""``rto resume-check RECIPE``: kill a short run of this recipe, resume it, compare it with one that was never cut."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

HELP = "kill a short run of this recipe at random moments, resume it, and compare it with an uninterrupted one"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe (TOML)")
    parser.add_argument("--steps", type=int, default=4, help="steps or iterations a stage; default: 4")
    parser.add_argument("--kills", type=int, default=3, help="default: 3")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--folder", help="where both runs are kept; default: a temporary folder")


def run(known: argparse.Namespace) -> int:
    """0: equal to the bit, 1: not. ValueError: wrong input, or a run that fails by itself."""
    from rto import recipe
    from rto.pipeline.resume_check import resume_check

    if known.steps < 1 or known.kills < 1:
        raise ValueError("--steps and --kills are at least 1")
    if known.folder and any(Path(known.folder).glob("*")):
        raise ValueError(f"--folder {known.folder} is not empty")
    pairs = [tuple(text.split("=", 1)) for text in known.set]
    if odd := [text for text, pair in zip(known.set, pairs, strict=True) if len(pair) != 2]:
        raise ValueError(f"--set {odd[0]!r}: write KEY=VALUE")
    config = recipe.load(known.recipe, [(pair[0], pair[1]) for pair in pairs])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(known.folder or folder)
        equal = resume_check(
            config,
            place,
            steps=known.steps,
            kills=known.kills,
            seed=known.seed,
            say=lambda text: print(text, file=sys.stderr),
        )
    return 0 if equal else 1
