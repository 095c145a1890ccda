"""The stages of a recipe in order. A finished stage is skipped; what it was made from is checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rto import config as recipe
from rto import rewards
from rto.config import Config
from rto.data.sources import Loaded, TextPrompt, read_prompts
from rto.evaluation.policies import answer
from rto.pipeline import contest, normalise, training
from rto.pipeline.answers import encode_all, pass_budget, policy_stage, sampling
from rto.pipeline.job import Job, Step
from rto.pipeline.lock import RunLock
from rto.pipeline.readers import open_policy
from rto.pipeline.resolve import check_stages, guide_stage, resolve, scorer_stage, segment_scorers, terms_of
from rto.recipe import nearest
from rto.report.html import write_report
from rto.rollouts.search import Score, Search, beam_search

logger = logging.getLogger(__name__)


def run(
    config: Config,
    stages: Sequence[str] | None = None,
    quiet: bool = False,
    fit_normaliser: bool = False,
    allow_changed: Sequence[str] = (),
) -> Path:
    """Run the stages of a recipe, or only ``stages``. Returns the run folder.

    The normaliser of a segment scorer is fitted where a policy reads it; ``fit_normaliser``: of every segment scorer.
    A stage that was cut goes on from its newest checkpoint. ``allow_changed`` are dotted keys of the recipe that may
    differ from those that a stage was begun with.

    Raises:
        ValueError: the recipe or the data are refused, or the folder holds the run of another recipe.
        FloatingPointError: a loss, a reward or a gradient is not finite.
        Stopped: SIGTERM or Ctrl-C; everything is saved, and the same call goes on.
    """
    config = resolve(config)
    wanted = list(stages or config.stages)
    check_stages(config, wanted)
    job = Job(config, quiet, tuple(allow_changed))
    if wanted == ["report"] and not (job.folder / "config.json").exists():
        raise ValueError(f"{job.folder}: there is no run to report: do `rto run` first, or name its --output")
    with RunLock(job.folder) if job.runtime.main else nullcontext(), job.stop:
        job.start(steps_of(config, config.stages + [stage for stage in wanted if stage not in config.stages]))
        with job.progress:
            for step in steps_of(config, wanted, fit_normaliser):
                job.do(step)
            if "report" in wanted and job.runtime.main:
                write_report(job.folder)
        job.runtime.close()
    return job.folder


def _dumped(section: BaseModel) -> dict[str, Any]:
    return section.model_dump(mode="json")


def steps_of(config: Config, stages: Sequence[str], fit_normaliser: bool = False) -> list[Step]:
    """What is to be done, with everything that each step is made from. ``fit_normaliser``: see :func:`run`."""
    dumped = json.loads(config.model_dump_json())

    def inputs(*sections: str, **more: Any) -> dict[str, Any]:
        chosen = {key: dumped[key] for key in ("seed", "model", "data", *sections)}
        if "sft" in sections and "sft" not in config.stages:
            chosen["sft"] = None
        return chosen | more

    steps = []
    if "sft" in stages:
        steps.append(Step("sft", inputs("sft"), training.sft))
    guides, scorers = config.preferences(), config.rewards()
    if "prefer" in stages:
        for stage, guide in guides.items():
            if guide.checkpoint is None:
                made_from = inputs("sft", prefer=_dumped(guide))
                steps.append(Step(stage, made_from, partial(training.prefer, stage=stage, settings=guide)))
    if "reward" in stages:
        for stage, scorer in scorers.items():
            if scorer.checkpoint is None:
                made_from = inputs("sft", reward=_dumped(scorer) | {"normaliser": None})  # fitted in a step of its own
                steps.append(Step(stage, made_from, partial(training.scorer, stage=stage, settings=scorer)))
    if "reward" in stages:
        wanted = segment_scorers(config)
        if fit_normaliser:
            wanted = [stage for stage, scorer in scorers.items() if scorer.cutoff is not None]
            if not wanted:
                raise ValueError(
                    "--fit-normaliser is for segment scorers: set reward.cutoff (0: tokens), or add one to [scorers]"
                )
        for stage in wanted:
            made_from = inputs("sft", reward=_dumped(scorers[stage]))
            work = partial(normalise.fit_normaliser, stage=stage, settings=scorers[stage])
            steps.append(Step(f"{stage}/normaliser", made_from, work))
    if "rl" in stages:
        for name, policy in config.policies().items():
            terms = terms_of(policy)
            made_from = inputs("sft", reward=_dumped(scorers[scorer_stage(policy)]))
            if "guide" in rewards.needs(terms):
                made_from["prefer"] = _dumped(guides[guide_stage(policy)])
            made_from |= {"policy": _dumped(policy), "terms": terms}
            work = partial(training.rl, name=name, policy=policy, terms=terms)
            steps.append(Step(f"rl/{name}", json.loads(json.dumps(made_from)), work))
    if "evaluate" in stages:
        if isinstance(config.evaluation.oracle, recipe.HeldoutOracle):
            steps.append(Step("oracle", inputs("sft", "reward"), training.oracle))
        whole = inputs("sft", "prefer", "reward", "guides", "scorers", "policy", "baselines", "evaluation")
        steps.append(Step("evaluate", whole, contest.evaluate, redo=True))
    return steps


def sft(config: Config) -> Path:
    """Only the sft stage: train the reference on demonstrations."""
    return run(config, ["sft"])


def prefer(config: Config) -> Path:
    """Only the prefer stage: train the guide on pairs."""
    return run(config, ["prefer"])


def reward(config: Config) -> Path:
    """Only the reward stage: train the scorer on pairs."""
    return run(config, ["reward"])


def rl(config: Config) -> Path:
    """Only the rl stage: train every policy of the recipe."""
    return run(config, ["rl"])


def evaluate(config: Config) -> Path:
    """Only the evaluate stage: win rates of all policies under the oracle."""
    return run(config, ["evaluate"])


def report(config: Config) -> Path:
    """Only the report, from what the run has so far."""
    return run(config, ["report"])


def generate(
    config: Config,
    policy: str | None = None,
    *,
    prompts: Sequence[str] | None = None,
    file: str | None = None,
    limit: int | None = None,
    search: Search = "sample",
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    beams: int | None = None,
    score: Score | None = None,
    length_norm: bool = False,
    batch_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Answers of one policy of a run: to ``prompts``, to the prompts of a file, or to the held-out ones.

    ``prompts`` are asked as the run was trained: as chats, or as they are where its own prompts are plain strings.
    ``policy`` is "sft", the guide's loss ("dpo"), or a policy of the recipe (default: its method).
    Sampling takes ``temperature`` 1, ``top_p`` 1 and ``seed`` 0 where they are None. A beam search takes 5 ``beams``
    and the ``score`` "policy"; the reference of "implicit" is the run's. Its rows tell their ``search_score`` (nats).
    ``batch_tokens`` bounds rows x tokens of one pass and changes no answer; default: four times policy.micro_tokens.
    Files of benchmarks: :func:`rto.pipeline.answers.write_answers`.

    Raises:
        ValueError: the run has no such policy, the file is refused, or options do not go together.
    """
    drawn = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sought = {"beams": beams, "score": score, "length_norm": length_norm or None}
    _check_search(search, {"sample": drawn, "beams": sought})
    if policy == "sft" and score == "implicit":
        raise ValueError("score = 'implicit' is 0 for every answer of sft, the reference itself: name another policy")
    if prompts and file:
        raise ValueError(f"--prompt and --prompts {file} do not go together: leave one of them out")
    settings = sampling(temperature, top_p)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: at least 1 prompt (given: {limit})")
    job = Job(resolve(config.model_copy(update={"trackers": []})), quiet=True)  # they may not be installed here
    name, stage = policy_stage(job, policy)
    budget = pass_budget(job, batch_tokens, logger.warning)
    shop = job.workshop()
    role = shop.reference() if name == "sft" else open_policy(job, shop, stage, "generated")
    encoder = job.rows.encoder
    if prompts:
        chat = not all(isinstance(row.prompt, str) for row in job.rows.test_prompts)
        texts = [TextPrompt(i, [{"role": "user", "content": t}] if chat else t) for i, t in enumerate(prompts, 1)]
        asked = encode_all(encoder, Loaded("--prompt", texts[:limit])).rows
    elif file:
        texts = read_prompts(recipe.Files(prompts=file)).rows
        asked = encode_all(encoder, Loaded(file, texts[:limit])).rows
    else:
        asked = job.rows.test_prompts[:limit]
    if search == "beams":
        found, scores = beam_search(
            role,
            [row.ids for row in asked],
            beams=5 if beams is None else beams,
            score=score or "policy",
            reference=shop.reference() if score == "implicit" else None,
            length_norm=length_norm,
            limit=encoder.max_response,
            end=encoder.end,
            pad=encoder.pad,
            budget=budget.tokens,
        )
        said = [encoder.decode(ids[mask].tolist()) for ids, mask in zip(found.ids, found.mask, strict=True)]
        notes: list[dict[str, Any]] = [{"search": "beams", "search_score": value} for value in scores.tolist()]
    else:
        made = answer(role, asked, settings, encoder, seed or 0, budget, job.runtime)
        found, said = made.completions, made.texts
        notes = [{} for _ in asked]
    return [
        {"prompt": row.text, "answer": text, "finished": done, "policy": name, **note}
        for row, text, done, note in zip(asked, said, found.finished.tolist(), notes, strict=True)
    ]


def _check_search(search: str, options: dict[str, dict[str, Any]]) -> None:
    """Refuse an unknown way to find an answer, and options (None: not given) of another one."""
    if search not in options:
        raise ValueError(f"search = {search!r} is unknown{nearest(search, options)}; known: {', '.join(options)}")
    for way, given in options.items():
        for key, value in given.items():
            if way != search and value is not None:
                raise ValueError(f"{key} goes with search = {way!r} (given: search = {search!r})")
    beams = options["beams"]["beams"]
    if beams is not None and beams < 1:
        raise ValueError(f"beams: at least 1 (given: {beams})")


__all__ = ["evaluate", "generate", "prefer", "report", "resolve", "reward", "rl", "run", "sft", "steps_of", "terms_of"]
