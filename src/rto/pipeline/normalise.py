"""The location-aware normaliser of a segment scorer: fitted on answers, stored with the scorer, never guessed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rto.batch import Completions
from rto.config import Reward
from rto.data.collate import collate_completions
from rto.models.checkpoint import fingerprint
from rto.models.role import Role
from rto.pipeline.job import Job, write_json
from rto.report.plots import normaliser_plot, save_png
from rto.rewards.normaliser import Normaliser, fit, locations
from rto.rollouts.generate import generate
from rto.rollouts.score import logprobs_and_entropy, token_values
from rto.seeds import shuffled
from rto.segments import segment_ends

FILE = "normaliser.json"


def fit_normaliser(job: Job, stage: str, settings: Reward) -> str:
    """Fit it on the answers that the recipe names; write ``normaliser.json`` and ``normaliser.png``.

    Raises:
        ValueError: the scorer reads whole answers, or there are too few segments.
    """
    if settings.cutoff is None:
        raise ValueError(
            f"{stage.replace('/', '.')}.cutoff is none: a scorer of whole answers is normalised by mean and std, "
            "which its training stores. A segment scorer has a cutoff in nats, a token scorer cutoff 0"
        )
    shop = job.workshop()
    reference = shop.reference()
    budget = settings.reading_tokens
    scorer = shop.open_scorer(job.path(stage), "scorer", settings.model, trained=False)
    answers = _pairs(job, settings) if settings.normaliser.answers == "pairs" else _sampled(job, settings, reference)
    job.progress.say(f"{stage}: fitting the normaliser on {len(answers)} answers")
    _, entropy = logprobs_and_entropy(reference, answers, budget)
    ends = segment_ends(entropy, answers.mask, answers.finished, settings.cutoff)
    values = token_values(scorer, answers, budget)
    found = fit(values[ends], locations(ends, answers.mask)[ends], settings.normaliser.floor)
    found = dataclasses.replace(found, answers=len(answers))
    if found.floored:
        job.progress.say(f"{stage}: the std of {found.floored:.1%} of the segments is the floor, {found.floor:g}")
    if job.runtime.main:
        folder = job.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        made_for = {"scorer": fingerprint(job.path(stage)), "cutoff": settings.cutoff, "floored": found.floored}
        write_json(folder / FILE, made_for | {"normaliser": dataclasses.asdict(found)})
        save_png(normaliser_plot(dataclasses.asdict(found)), folder / "normaliser.png")
    job.runtime.wait()
    return stage


def read_normaliser(job: Job, stage: str, folder: str) -> Normaliser:
    """The normaliser of the scorer in ``folder``.

    Raises:
        ValueError: it is missing, or of another scorer or cutoff.
    """
    name = stage.replace("/", ".")
    places = [path for path in (job.folder / stage / FILE, Path(folder) / FILE) if path.exists()]
    if not places:
        raise ValueError(
            f"{Path(folder) / FILE} is missing, and a segment reward is never taken as normalised: fit it with "
            "`rto reward RECIPE --fit-normaliser`"
        )
    stored = json.loads(places[0].read_text())
    cutoff = job.config.rewards()[stage].cutoff
    if stored["scorer"] != fingerprint(folder):
        raise ValueError(
            f"{places[0]} belongs to another scorer than {folder} (fingerprint {stored['scorer'][:12]}): fit it again "
            "with `rto reward RECIPE --fit-normaliser`"
        )
    if stored["cutoff"] != cutoff:
        raise ValueError(f"{places[0]} was fitted with cutoff {stored['cutoff']}, but {name}.cutoff is {cutoff}")
    return Normaliser(**stored["normaliser"])


def _pairs(job: Job, settings: Reward) -> Completions:
    """Chosen and rejected answers of the training pairs, a seeded choice of at most the limit."""
    rows = [
        (pair.prompt, *answer)
        for pair in job.rows.pairs
        for answer in ((pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished))
    ]
    chosen = shuffled(len(rows), job.config.seed, "normaliser")[: settings.normaliser.limit]
    prompts, answers, finished = zip(*(rows[i] for i in chosen), strict=True)
    return collate_completions(list(prompts), list(answers), list(finished), job.rows.encoder.pad)


def _sampled(job: Job, settings: Reward, reference: Role) -> Completions:
    """Answers of the reference to the RL prompts."""
    rows, seed, limit = job.rows, job.config.seed, settings.normaliser.limit
    order = shuffled(len(rows.prompts), seed, "normaliser")
    asked = [(order[i % len(order)], i // len(order)) for i in range(min(limit, max(len(order), 256)))]
    return generate(
        reference,
        [rows.prompts[row].ids for row, _ in asked],
        [("normaliser", row, k) for row, k in asked],
        seed=seed,
        limit=rows.encoder.max_response,
        end=rows.encoder.end,
        pad=rows.encoder.pad,
        budget=settings.reading_tokens,
    ).completions
