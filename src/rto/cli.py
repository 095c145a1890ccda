"""``rto``: one verb a stage, and ``run`` for all of them. Keys of the recipe are overridden by ``--a.b value``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

VERBS = {
    "run": "all stages of a recipe; finished ones are skipped",
    "sft": "train the reference on demonstrations",
    "prefer": "train the guides on preference data (DPO and others)",
    "reward": "train the scorers on preference pairs: sentence, segment, token",
    "rl": "train the policies with token rewards (RTO, PPO and others)",
    "evaluate": "win rates of all policies under the oracle",
    "report": "write report.html from what the run has so far",
}
RESUME = "go on with a run that was cut: the same as `rto run` on its folder"
# Verbs with a module of their own, rto.commands.NAME with HELP, add(parser) and run(known).
COMMANDS = (
    *("plan", "compare", "judge", "alpaca", "arena", "mtbench", "rewardbench"),
    *("doctor", "resume-check", "serve-scorer"),
)
GENERATE = "answers of a policy of a run"
# Every other --word of a stage, and of plan, is a key of the recipe.
FLAGS = ("--dry-run", "--quiet", "--fit-normaliser", "--json", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed on the way, 2 wrong input, 3 a plan that does not fit, 75 and 130 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _do(arguments)
        sys.stdout.flush()  # a closed pipe shows here, not when Python exits
        _leave_group()
        return code
    except ValueError as error:
        print(f"rto: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has gone, as in `rto generate RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"rto: {error}", file=sys.stderr)
        return 1
    except FloatingPointError as error:
        print(f"rto: training stopped: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # Named by its module, so that --help and wrong input need not import the pipeline.
        stopped = sys.modules.get("rto.pipeline.stop")
        if stopped is None or not isinstance(error, stopped.Stopped):
            raise
        print(f"rto: {error}", file=sys.stderr)
        _leave_group()
        return int(error.code)
    except KeyboardInterrupt:
        print("rto: interrupted; the same command goes on with the first stage that is not finished", file=sys.stderr)
        return 130


def end(code: int) -> NoReturn:
    """The end of a process that began with :func:`main`. One of several goes without Python's own way out: under load
    gloo's threads can abort it there (SIGABRT) although all work is done, rarely even when the group was left."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        os._exit(code)
    sys.exit(code)


def _leave_group() -> None:
    """At the end of what all processes end alike; one that failed goes at once, as the others may wait for it."""
    runtime = sys.modules.get("rto.models.runtime")
    if runtime is not None:
        runtime.leave_group()


def _do(arguments: list[str]) -> int:
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    verb = arguments[0]
    known_verbs = (*VERBS, "resume", "generate", *COMMANDS)
    if not verb.startswith("-") and verb not in known_verbs:
        from rto.recipe import nearest

        raise ValueError(f"unknown verb {verb!r}{nearest(verb, known_verbs)}; known: {', '.join(known_verbs)}")
    if verb == "generate":
        return _generate(parser.parse_args(arguments))
    if verb in COMMANDS and verb != "plan":  # which takes overrides
        _calm()
        return int(_command(verb).run(parser.parse_args(arguments)))
    words, changes = overrides(arguments)
    if changes and all(word in FLAGS for word in words[1:]):
        key, value = changes[-1]
        raise ValueError(f"rto {verb} needs a recipe or the folder of a run; --{key} took {value!r} as its value")
    known, rest = parser.parse_known_args(words)
    if rest:
        raise ValueError(f"{rest[0]!r} is no override: write --key value, for example --policy.kl.coef 0.02")
    if verb == "plan":
        config = _read(known.recipe, changes)
        _calm()
        return int(_command(verb).show(config, json=known.json))
    allowed = [value for key, value in changes if key == "allow-changed"]
    return _stages(known, [change for change in changes if change[0] != "allow-changed"], allowed)


def _command(verb: str) -> ModuleType:
    return import_module(f"rto.commands.{verb.replace('-', '_')}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rto", description="Dense-reward RLHF: SFT, DPO guide, reward model, RTO and PPO, win rates, report."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in {**VERBS, "resume": RESUME}.items():
        verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        verb.add_argument("recipe", help="a recipe (TOML) or the folder of a run")
        verb.add_argument("--dry-run", action="store_true", help="what `rto plan` prints")
        verb.add_argument("--quiet", action="store_true", help="no progress")
        if name == "reward":
            text = "fit the location-aware normaliser of every segment scorer"
            verb.add_argument("--fit-normaliser", action="store_true", help=text)
        verb.epilog = (
            "Any key of the recipe can be overridden: --policy.kl.coef 0.02 --output runs/mine --seed 1. A stage that "
            "was begun with other values of a key is refused, unless --allow-changed KEY names it."
        )
    verb = verbs.add_parser("generate", help=GENERATE, description=GENERATE, allow_abbrev=False)
    verb.add_argument("run", help="the folder of a run")
    verb.add_argument("--policy", help="sft, the guide's loss (dpo), or a trained method; default: the run's method")
    verb.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    verb.add_argument("--prompts", help="a file of prompts; default: the held-out prompts of the run")
    verb.add_argument("--out", help="a JSONL file; default: standard output")
    verb.add_argument(
        "--format",
        choices=("jsonl", "alpaca", "arena", "arena-classic", "mtbench"),
        help="answer a question file (--prompts) into --out, resumably, as this benchmark's programs read it",
    )
    verb.add_argument("--model-name", help="the model's name in that file; default: the policy's")
    verb.add_argument("--batch-tokens", type=int, help="rows x tokens of one pass; it changes no answer")
    verb.add_argument("--limit", type=int, help="at most so many prompts")
    verb.add_argument("--search", choices=("sample", "beams"), default="sample", help="default: sample")
    verb.add_argument("--temperature", type=float, help="of sampling; default: 1, 0 is greedy")
    verb.add_argument("--top-p", type=float, help="of sampling; default: 1")
    verb.add_argument("--seed", type=int, help="of sampling; default: 0")
    verb.add_argument("--beams", type=int, help="width of a beam search; default: 5")
    verb.add_argument(
        "--score",
        choices=("policy", "implicit"),
        help="what a beam search sums: log pi of the policy (default), or its log-ratio to the reference",
    )
    verb.add_argument("--length-norm", action="store_true", help="a beam search divides the sum by the length")
    for name in COMMANDS:
        command = _command(name)
        command.add(verbs.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False))
    return parser


def overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The words that are not overrides, and ``--a.b value`` or ``--a.b=value`` as (key, value), wherever they stand.

    Raises:
        ValueError: a key has no value.
    """
    others: list[str] = []
    found: list[tuple[str, str]] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or word in FLAGS:
            others.append(word)
            continue
        key, given, value = word[2:].partition("=")
        if not given:
            value = next(words, "")
        if value == "" or (not given and value.startswith("--")):
            raise ValueError(f"--{key} has no value: write --{key} VALUE")
        found.append((key, value))
    return others, found


def _read(path: str, changes: list[tuple[str, str]]) -> Any:
    """A recipe, or the resolved recipe of a run folder."""
    from rto import recipe

    if not os.path.isdir(path):  # not Path.is_dir, which raises for a name that is too long
        return recipe.load(path, changes)
    folder = Path(path)
    saved = folder / "config.json"
    if not saved.exists():
        raise ValueError(f"{folder}: no config.json there: not a run folder")
    try:
        table = json.loads(saved.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{saved} is damaged ({type(error).__name__}): give the recipe and --output {folder}"
        ) from error
    if not isinstance(table, dict):
        raise ValueError(f"{saved} is no recipe: give the recipe and --output {folder}")
    table["output"] = str(folder)
    for key, value in changes:
        recipe.put(table, key, value)
    return recipe.build(table, path)


def _stages(known: argparse.Namespace, changes: list[tuple[str, str]], allowed: list[str]) -> int:
    config = _read(known.recipe, changes)
    _calm()
    from rto import pipeline
    from rto.report import tables

    stages = None if known.verb in ("run", "resume") else [known.verb]
    if known.dry_run:
        return int(_command("plan").show(config, stages))
    folder = pipeline.run(config, stages, known.quiet, getattr(known, "fit_normaliser", False), allowed)
    summary = tables.summary(folder)
    if summary and os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(summary)
    return 0


def _generate(known: argparse.Namespace) -> int:
    config = _read(known.run, [])
    if known.batch_tokens is not None and known.batch_tokens < 1:
        raise ValueError(f"--batch-tokens: at least 1 (given: {known.batch_tokens})")
    if known.format is not None:
        return _answer_file(known, config)
    if known.model_name is not None:
        raise ValueError("--model-name goes with --format")
    _calm()
    from rto import pipeline

    lines = pipeline.generate(
        config,
        known.policy,
        prompts=known.prompt,
        file=known.prompts,
        limit=known.limit,
        search=known.search,
        temperature=known.temperature,
        top_p=known.top_p,
        seed=known.seed,
        beams=known.beams,
        score=known.score,
        length_norm=known.length_norm,
        batch_tokens=known.batch_tokens,
    )
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks
        return 0
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if known.out:
        Path(known.out).parent.mkdir(parents=True, exist_ok=True)
        Path(known.out).write_text(text, encoding="utf-8")
        print(f"{len(lines)} answers in {known.out}", file=sys.stderr)
    else:
        print(text, end="")
    return 0


def _answer_file(known: argparse.Namespace, config: Any) -> int:
    """``rto generate --format``."""
    if not known.prompts or not known.out:
        raise ValueError(f"--format {known.format} answers a file into a file: give --prompts FILE and --out FILE")
    other = {"--prompt": known.prompt, "--beams": known.beams, "--score": known.score}
    other |= {"--length-norm": known.length_norm, "--search beams": known.search == "beams"}
    if wrong := [flag for flag, given in other.items() if given]:
        raise ValueError(f"{wrong[0]} goes without --format")
    _calm()
    from rto.pipeline.answers import write_answers

    done = write_answers(
        config,
        known.format,
        known.prompts,
        known.out,
        known.policy,
        model=known.model_name,
        limit=known.limit,
        temperature=known.temperature,
        top_p=known.top_p,
        seed=known.seed,
        batch_tokens=known.batch_tokens,
    )
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        counts = {"kept from before": done.kept, "cut at the token limit": done.cut, "empty": done.empty}
        counts["prompts that lost their beginning"] = done.cut_prompts
        told = "".join(f", {count} {what}" for what, count in counts.items() if count)
        print(f"{done.made} answers made{told}; {known.out}", *done.notes, sep="\n", file=sys.stderr)
    return 0


def _calm() -> None:
    """Third parties' progress bars and advice are not ours to show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def command() -> NoReturn:
    """``rto`` in a shell."""
    end(main())


if __name__ == "__main__":
    command()
