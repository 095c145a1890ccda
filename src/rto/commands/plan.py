"""``rto plan RECIPE``: what a recipe would do, and whether the machine can."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rto.config import Config

HELP = "look before you run: data, tokenizers and template, memory and disk of every stage; trains and writes nothing"
NOT_READY = 3


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe (TOML) or the folder of a run")
    parser.add_argument("--json", action="store_true", help="the plan for programs, in bytes")
    parser.epilog = (
        "Any key of the recipe can be overridden, as in `rto run`. Exit code 3: it does not fit, or a check failed."
    )


def show(config: Config, stages: Sequence[str] | None = None, json: bool = False) -> int:
    """0: ready, 3: it does not fit or a check has failed. ValueError: as a run would."""
    from rto.pipeline.plan import as_json, describe, make_plan

    plan = make_plan(config, stages)
    print(as_json(plan) if json else describe(plan))
    return 0 if plan.ready else NOT_READY
