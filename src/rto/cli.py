"""``rto``: one verb a stage, and ``run`` for all of them. Keys of the recipe are overridden by ``--a.b value``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERBS = {
    "run": "all stages of a recipe; finished ones are skipped",
    "sft": "train the reference on demonstrations",
    "prefer": "train the guide on preference pairs (DPO)",
    "reward": "train the scorer on preference pairs (Bradley-Terry)",
    "rl": "train the policies with token rewards (RTO, PPO)",
    "evaluate": "win rates of all policies under the oracle",
    "report": "write report.html from what the run has so far",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 wrong input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    try:
        if known.verb == "generate":
            return _generate(known, rest)
        return _stages(known, rest)
    except ValueError as error:
        print(f"rto: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"rto: training stopped, nothing was saved after it: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rto: interrupted; the same command goes on with the first stage that is not finished", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rto", description="Dense-reward RLHF: SFT, DPO guide, reward model, RTO and PPO, win rates, report."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        verb.add_argument("recipe", help="a recipe (TOML) or the folder of a run")
        verb.add_argument("--dry-run", action="store_true", help="print the resolved recipe, the plan and its memory")
        verb.add_argument("--quiet", action="store_true", help="no progress")
        verb.epilog = "Any key of the recipe can be overridden: --policy.kl.coef 0.02 --output runs/mine --seed 1"
    verb = verbs.add_parser("generate", help="answers of a policy of a run", allow_abbrev=False)
    verb.add_argument("run", help="the folder of a run")
    verb.add_argument("--policy", help="sft, the guide's loss (dpo), or a trained method; default: the run's method")
    verb.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    verb.add_argument("--prompts", help="a file of prompts; default: the held-out prompts of the run")
    verb.add_argument("--out", help="a JSONL file; default: standard output")
    verb.add_argument("--limit", type=int, help="at most so many prompts")
    verb.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--seed", type=int, default=0)
    return parser


def overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """``--a.b value`` and ``--a.b=value`` as (key, value).

    Raises:
        ValueError: something else stands there, or a key has no value.
    """
    found: list[tuple[str, str]] = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no override: write --key value, for example --policy.kl.coef 0.02")
        key, given, value = word[2:].partition("=")
        if not given:
            value = next(words, "")
            if value == "" or (value.startswith("--") and not value[2:3].isdigit()):
                raise ValueError(f"--{key} has no value")
        found.append((key, value))
    return found


def _read(path: str, changes: list[tuple[str, str]]) -> Any:
    """A recipe, or the resolved recipe of a run folder."""
    from rto import recipe

    folder = Path(path)
    if not folder.is_dir():
        return recipe.load(path, changes)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json there: not a run folder")
    table = json.loads((folder / "config.json").read_text())
    table["output"] = str(folder)
    for key, value in changes:
        recipe.put(table, key, value)
    return recipe.build(table, path)


def _stages(known: argparse.Namespace, rest: Sequence[str]) -> int:
    config = _read(known.recipe, overrides(rest))
    _calm()
    from rto import pipeline
    from rto.report import tables

    if known.dry_run:
        from rto.pipeline.plan import describe

        print(describe(config))
        return 0
    stages = None if known.verb == "run" else [known.verb]
    folder = pipeline.run(config, stages, known.quiet)
    summary = tables.summary(folder)
    if summary:
        print(summary)
    return 0


def _generate(known: argparse.Namespace, rest: Sequence[str]) -> int:
    if rest:
        raise ValueError(f"{rest[0]!r} is no option of rto generate; see rto generate --help")
    config = _read(known.run, [])
    _calm()
    from rto import pipeline

    lines = pipeline.generate(
        config,
        known.policy,
        prompts=known.prompt,
        file=known.prompts,
        limit=known.limit,
        temperature=known.temperature,
        top_p=known.top_p,
        seed=known.seed,
    )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if known.out:
        Path(known.out).write_text(text, encoding="utf-8")
        print(f"{len(lines)} answers in {known.out}", file=sys.stderr)
    else:
        print(text, end="")
    return 0


def _calm() -> None:
    """Third parties' progress bars and advice are not ours to show."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
