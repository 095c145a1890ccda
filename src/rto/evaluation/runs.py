"""Finished runs read from their folders, and put together: seeds of one recipe, recipes side by side.

Read: ``config.json``, ``evaluation.json``, ``evaluation/answers-NAME.jsonl``, and ``credit.json`` and
``stages.json`` where they are. Nothing is scored again. Shapes: N prompts, K answers a prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rto.evaluation.winrate import Interval

Floats = NDArray[np.float64]
By = Literal["method", "run"]

# Keys of config.json that say where and how far a run goes, not what it is.
PLACES = ("output", "seed", "device", "trackers", "stages")


@dataclass(frozen=True)
class Policy:
    """One policy of a run. ``scores`` and ``lengths`` (tokens) are [N, K]; a missing score is NaN.

    ``kls`` [N, K] (nats to the reference) is None where the answers do not tell it: then only the mean ``kl`` is known.
    ``auc``: token credit, None where it is not defined. ``answers`` is a digest of answers and scores.
    """

    scores: Floats
    lengths: Floats
    kls: Floats | None
    kl: float
    auc: Interval | None
    answers: str


@dataclass(frozen=True)
class Run:
    """A finished run.

    ``oracle``: what scored, in words; ``judge``: those words (of a server, its whole url) and, where the run trained
    its oracle itself, the settings that made it; ``flag``: why the oracle is none (it was used in training), else None.
    """

    folder: Path
    config: dict[str, Any]
    oracle: str
    judge: str
    flag: str | None
    prompts: tuple[str, ...]
    policies: dict[str, Policy]

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def rounds(self) -> int:
        return int(self.config["evaluation"]["bootstrap"])

    @property
    def method(self) -> str:
        """The policy that the run is about."""
        return str(self.config["policy"]["method"])


@dataclass(frozen=True)
class Recipe:
    """Runs that differ in nothing but the seed, by seed; at least one."""

    label: str
    runs: dict[int, Run]

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))


def read_run(folder: Path | str) -> Run:
    """A run with its answers.

    Raises:
        ValueError: the run has no evaluation, or its files are broken or do not fit together.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json there: not a run folder")
    if not (folder / "evaluation.json").exists():
        raise ValueError(f"{folder}: no evaluation.json there: make it with rto evaluate {folder}")
    config, found = _load(folder / "config.json"), _load(folder / "evaluation.json")
    try:
        comparison, oracle = found["comparison"], str(found["oracle"])
        names, known = list(comparison["names"]), comparison["policies"]
        samples = int(config["evaluation"]["samples"])
        settings = config["evaluation"]["oracle"]
        flag = used_in_training(config, settings)
    except KeyError as error:
        raise ValueError(
            f"{folder}: config.json or evaluation.json lacks {error}: run rto evaluate {folder}"
        ) from error
    credit = _load(folder / "credit.json") if (folder / "credit.json").exists() else {}
    aucs = credit.get("methods") or {}
    policies, asked = {}, {}
    for name in names:
        path = folder / "evaluation" / f"answers-{name}.jsonl"
        policies[name], asked[name] = _read_answers(path, samples, float(known[name]["kl"]), aucs.get(name))
        if asked[name] != asked[names[0]]:
            raise ValueError(f"{path}: other prompts than those of {names[0]}: run rto evaluate {folder}")
    judge = str(settings.get("url") or oracle) + _trained(folder)  # a server's words leave out the query of its url
    return Run(folder, config, oracle, judge, flag, asked[names[0]], policies)


def group_runs(runs: Sequence[Run], by: By = "method") -> list[Recipe]:
    """Runs of one recipe together as its seeds (``by`` "method"), or each run by itself ("run"), in the order given.

    Raises:
        ValueError: two runs of one recipe have the same seed, or other policies.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = recipe_key(run.config) if by == "method" else str(run.folder.resolve())
        group = groups.setdefault(key, [])
        for other in group:
            if other.seed == run.seed:
                raise ValueError(f"{other.folder} and {run.folder} are one recipe and seed: name one")
            if lacks := other.policies.keys() ^ run.policies.keys():
                raise ValueError(
                    f"{other.folder} or {run.folder} lacks {', '.join(sorted(lacks))}: finish it with rto run"
                )
        group.append(run)
    labels = _labels(list(groups.values()))
    return [Recipe(label, {run.seed: run for run in g}) for label, g in zip(labels, groups.values(), strict=True)]


def matched(one: Recipe, other: Recipe) -> list[tuple[Run, Run]]:
    """The runs of two recipes (or of one, with itself) that are compared with each other: those of the same seed, or,
    of a single run and a single run, these two.

    Raises:
        ValueError: nothing matches, or what matches has other prompts or another oracle.
    """
    pairs = [(run, other.runs[seed]) for seed, run in one.runs.items() if seed in other.runs]
    if len(one.runs) == len(other.runs) == 1:
        pairs = [(one.first, other.first)]
    if not pairs:
        seeds = " and ".join(", ".join(map(str, recipe.runs)) for recipe in (one, other))
        raise ValueError(f"{one.label} and {other.label} have no seed in common ({seeds})")
    for a, b in pairs:
        if a.judge != b.judge:
            told = f"{a.oracle}; {b.oracle}"
            if a.oracle == b.oracle:
                told = "their urls differ in the query" if a.judge.startswith("http") else "each trained its own"
            raise ValueError(f"{a.folder} and {b.folder} have different oracles: {told}")
        if a.prompts != b.prompts:
            raise ValueError(
                f"{a.folder} and {b.folder} answered different prompts ({len(a.prompts)} and {len(b.prompts)}): only "
                "seeds of one recipe, or runs with the same held-out prompts, stand in one table"
            )
    return pairs


def recipe_key(config: Mapping[str, Any]) -> str:
    """Equal for runs that differ in nothing but the seed and :data:`PLACES`. A key without a value is as good as none:
    runs of older versions lack the newest."""
    return json.dumps(_given({key: value for key, value in config.items() if key not in PLACES}), sort_keys=True)


def _given(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _given(part) for key, part in value.items() if part is not None}
    return [_given(part) for part in value] if isinstance(value, list) else value


def used_in_training(config: Mapping[str, Any], oracle: Mapping[str, Any]) -> str | None:
    """Which key of the recipe trains with the very scorer that judges, in words; None if none does.

    ``config``: a resolved recipe as a table; ``oracle``: a table with the scorer's ``name``, ``url`` or ``function``.
    Winning under such an oracle may be over-optimisation of it (Gao et al. 2023, arXiv 2210.10760).
    """
    judge = next((oracle[key] for key in ("name", "url", "function") if oracle.get(key)), None)
    if judge is None:  # the tiny world's truth, or a scorer trained on pairs that no other stage saw
        return None
    for key, name in _scorers(config):
        if os.path.realpath(name) == os.path.realpath(judge):
            shown = judge.partition("?")[0] if judge == oracle.get("url") else judge  # a query may hold a key
            return f"the oracle {shown} was used in training: it is {key}"
    return None


def _scorers(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and name of everything that a run's rewards may come from."""
    rewards = {"reward": config.get("reward") or {}}
    rewards |= {f"scorers.{name}": changed for name, changed in (config.get("scorers") or {}).items()}
    for key, section in rewards.items():
        if section.get("checkpoint"):
            yield f"{key}.checkpoint", section["checkpoint"]
        if (section.get("model") or {}).get("name"):
            yield f"{key}.model", section["model"]["name"]
    policies = {"policy": config.get("policy") or {}}
    policies |= {f"baselines.{name}": changed for name, changed in (config.get("baselines") or {}).items()}
    for key, section in policies.items():
        for term in section.get("rewards") or []:
            for part in ("url", "function"):
                if term.get(part):
                    yield f"{key}.rewards", term[part]


def _read_answers(path: Path, samples: int, kl: float, credit: Any) -> tuple[Policy, tuple[str, ...]]:
    """A policy and the prompts that it answered, each once."""
    if not path.exists():
        raise ValueError(f"{path}: no such file: run rto evaluate {path.parents[1]}")
    rows = []
    # Not splitlines: answers may hold U+2028, U+2029 and U+0085, which JSON leaves as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            score = math.nan if row["score"] is None else float(row["score"])
            nats = math.nan if row.get("kl") is None else float(row["kl"])
            rows.append((row["prompt"], score, len(row["answer_ids"]), nats, row["answer"]))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not readable as JSON ({error})") from error
        except KeyError as error:
            raise ValueError(f"{path}:{number}: no {error}: run rto evaluate {path.parents[1]} again") from error
    if not rows or len(rows) % samples:
        raise ValueError(f"{path}: {len(rows)} answers are not {samples} a prompt (evaluation.samples)")
    asked, scores, lengths, kls, texts = zip(*rows, strict=True)
    prompts = asked[::samples]
    if list(asked) != [prompt for prompt in prompts for _ in range(samples)]:
        raise ValueError(f"{path}: its rows are not {samples} answers a prompt, side by side (evaluation.samples)")
    digest = hashlib.sha256(json.dumps([texts, scores, lengths]).encode()).hexdigest()
    shape = (len(prompts), samples)
    all_kls = np.reshape(np.asarray(kls, dtype=np.float64), shape)
    auc = None
    if credit and credit["auc"] is not None:
        auc = Interval(*(math.nan if credit[key] is None else credit[key] for key in ("auc", "auc_low", "auc_high")))
    policy = Policy(
        np.reshape(np.asarray(scores, dtype=np.float64), shape),
        np.reshape(np.asarray(lengths, dtype=np.float64), shape),
        None if np.isnan(all_kls).any() else all_kls,
        kl,
        auc,
        digest,
    )
    return policy, tuple(prompts)


def _trained(folder: Path) -> str:
    """The settings behind an oracle that the run trained itself: two of them may look alike in words."""
    path = folder / "stages.json"
    stage = _load(path).get("oracle") if path.exists() else None
    return json.dumps(stage["inputs"], sort_keys=True) if stage else ""


def _labels(groups: list[list[Run]]) -> list[str]:
    """A short name for each group of runs: its folder, or what the names of its folders share; unique."""
    short = []
    for group in groups:
        names = [run.folder.resolve().name for run in group]
        shared = os.path.commonprefix(names).rstrip("-_. ").removesuffix("seed").rstrip("-_. ")
        short.append(names[0] if len(names) == 1 else shared or group[0].folder.resolve().parent.name)
    return [name if short.count(name) == 1 else str(g[0].folder) for name, g in zip(short, groups, strict=True)]


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
