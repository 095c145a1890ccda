"""The stages of a recipe in order. A finished stage is skipped; what it was made from is checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rto import config as recipe
from rto import rewards
from rto.config import Config, Evaluation
from rto.data.chat import encode_prompts
from rto.data.sources import Loaded, TextPrompt, read_prompts
from rto.evaluation.policies import answer
from rto.pipeline import contest, training
from rto.pipeline.job import Job, Step
from rto.pipeline.resolve import resolve, terms_of
from rto.recipe import explain, nearest
from rto.report.html import write_report


def run(config: Config, stages: Sequence[str] | None = None, quiet: bool = False) -> Path:
    """Run the stages of a recipe, or only ``stages``. Returns the run folder.

    Raises:
        ValueError: the recipe or the data are refused, or the folder holds the run of another recipe.
        FloatingPointError: a loss, a reward or a gradient is not finite.
    """
    config = resolve(config)
    wanted = list(stages or config.stages)
    if "sft" in wanted and "sft" not in config.stages:
        raise ValueError("the recipe's stages leave sft out, so its model is the reference: add 'sft' to stages first")
    job = Job(config, quiet)
    if wanted == ["report"] and not (job.folder / "config.json").exists():
        raise ValueError(f"{job.folder}: there is no run to report: do `rto run` first, or name its --output")
    job.start(steps_of(config, config.stages + [stage for stage in wanted if stage not in config.stages]))
    with job.progress:
        for step in steps_of(config, wanted):
            job.do(step)
        if "report" in wanted and job.runtime.main:
            write_report(job.folder)
    job.runtime.close()
    return job.folder


def steps_of(config: Config, stages: Sequence[str]) -> list[Step]:
    """What is to be done, with everything that each step is made from."""
    dumped = json.loads(config.model_dump_json())

    def inputs(*sections: str, **more: Any) -> dict[str, Any]:
        chosen = {key: dumped[key] for key in ("seed", "model", "data", *sections)}
        if "sft" in sections and "sft" not in config.stages:
            chosen["sft"] = None
        return chosen | more

    steps = []
    if "sft" in stages:
        steps.append(Step("sft", inputs("sft"), training.sft))
    if "prefer" in stages and config.prefer.checkpoint is None:
        steps.append(Step("prefer", inputs("sft", "prefer"), training.prefer))
    if "reward" in stages and config.reward.checkpoint is None:
        steps.append(Step("reward", inputs("sft", "reward"), training.reward))
    if "rl" in stages:
        for name, policy in config.policies().items():
            terms = terms_of(policy)
            read = ["sft", "reward"] + ["prefer"] * ("guide" in rewards.needs(terms))
            made_from = inputs(*read, policy=policy.model_dump(mode="json"), terms=terms)
            work = partial(training.rl, name=name, policy=policy, terms=terms)
            steps.append(Step(f"rl/{name}", json.loads(json.dumps(made_from)), work))
    if "evaluate" in stages:
        if isinstance(config.evaluation.oracle, recipe.HeldoutOracle):
            steps.append(Step("oracle", inputs("sft", "reward"), training.oracle))
        whole = inputs("sft", "prefer", "reward", "policy", "baselines", "evaluation")
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
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Answers of one policy of a run: to ``prompts``, to the prompts of a file, or to the held-out ones.

    ``policy`` is "sft", the guide's loss ("dpo"), or a policy of the recipe (default: its method).

    Raises:
        ValueError: the run has no such policy, or the file is refused.
    """
    try:
        settings = Evaluation(temperature=temperature, top_p=top_p)
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, Evaluation))) from None
    if limit is not None and limit < 1:
        raise ValueError(f"limit: at least 1 prompt (given: {limit})")
    job = Job(resolve(config), quiet=True)
    name = policy or config.policy.method
    known = {"sft": "sft", config.prefer.loss["type"]: "prefer"} | {name: f"rl/{name}" for name in config.policies()}
    if name not in known:
        hint = nearest(name, known)
        raise ValueError(f"{config.output}: no policy {name!r}{hint}; the recipe has {', '.join(known)}")
    shop = job.workshop()
    role = shop.reference() if name == "sft" else shop.open_policy(job.path(known[name]), "generated")
    encoder = job.rows.encoder
    if prompts:
        chat = isinstance(config.data, recipe.Files)
        texts = [TextPrompt(i, [{"role": "user", "content": t}] if chat else t) for i, t in enumerate(prompts, 1)]
        asked = encode_prompts(encoder, Loaded("--prompt", texts)).rows
    elif file:
        asked = encode_prompts(encoder, read_prompts(recipe.Files(prompts=file))).rows
    else:
        asked = job.rows.test_prompts
    asked = asked[:limit]
    made = answer(role, asked, settings, encoder, seed, config.policy.reading_tokens, job.runtime)
    return [
        {"prompt": row.text, "answer": text, "finished": done, "policy": name}
        for row, text, done in zip(asked, made.texts, made.completions.finished.tolist(), strict=True)
    ]


__all__ = ["evaluate", "generate", "prefer", "report", "resolve", "reward", "rl", "run", "sft", "steps_of", "terms_of"]
