"""The location-aware normaliser of a segment scorer: fitted on answers, stored with the scorer, never guessed."""

from __future__ import annotations

import dataclasses
from functools import partial

from rto.batch import Completions
from rto.config import Reward
from rto.data.chat import PromptRow
from rto.data.collate import collate_completions
from rto.models.checkpoint import fingerprint
from rto.models.memory import Budget
from rto.models.role import Role
from rto.pipeline.job import Job, write_json
from rto.pipeline.readers import NORMALISER, open_role
from rto.report.plots import normaliser_plot, save_png
from rto.rewards.normaliser import fit, locations
from rto.rollouts.foreign import ForeignScorer
from rto.rollouts.generate import generate
from rto.rollouts.score import logprobs_and_entropy, token_values
from rto.seeds import shuffled
from rto.segments import segment_ends


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
    budget = Budget(settings.reading_tokens, job.progress.say, job.runtime.gather_all, "reading")
    scorer = open_role(job, shop, stage)
    pairs = settings.normaliser.answers == "pairs"
    answers, prompts = _pairs(job, settings) if pairs else _sampled(job, settings, reference, budget)
    job.progress.say(f"{stage}: fitting the normaliser on {len(answers)} answers")
    _, entropy = budget.within(partial(logprobs_and_entropy, reference, answers))
    ends = segment_ends(entropy, answers.mask, answers.finished, settings.cutoff)
    if isinstance(scorer, ForeignScorer):
        values = budget.within(partial(scorer.token_scores, answers, prompts))
    else:
        values = budget.within(partial(token_values, scorer, answers))
    # The floor is a share: scorers differ in the scale of their values, and a young one's are all small.
    floor = max(settings.normaliser.floor * values[ends].std(correction=0).item(), 1e-8) if ends.any() else 1.0
    found = fit(values[ends], locations(ends, answers.mask)[ends], floor)
    found = dataclasses.replace(found, answers=len(answers))
    if found.floored:
        job.progress.say(f"{stage}: the std of {found.floored:.1%} of the segments is the floor, {found.floor:g}")
    if job.runtime.main:
        folder = job.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        made_for = {"scorer": fingerprint(job.path(stage)), "cutoff": settings.cutoff, "floored": found.floored}
        write_json(folder / NORMALISER, made_for | {"normaliser": dataclasses.asdict(found)})
        save_png(normaliser_plot(dataclasses.asdict(found)), folder / "normaliser.png")
    job.runtime.wait()
    return stage


def _pairs(job: Job, settings: Reward) -> tuple[Completions, list[PromptRow]]:
    """Chosen and rejected answers of the training pairs, a seeded choice of at most the limit."""
    known = {row.text: row for row in job.rows.prompts}  # with the conversations that they were rendered from
    rows = [
        (known.get(pair.prompt_text) or PromptRow(pair.row, pair.prompt_text, pair.prompt), *answer)
        for pair in job.rows.pairs
        for answer in ((pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished))
    ]
    chosen = shuffled(len(rows), job.config.seed, "normaliser")[: settings.normaliser.limit]
    prompts, answers, finished = zip(*(rows[i] for i in chosen), strict=True)
    asked = [row.ids for row in prompts]
    return collate_completions(asked, list(answers), list(finished), job.rows.encoder.pad), list(prompts)


def _sampled(job: Job, settings: Reward, reference: Role, budget: Budget) -> tuple[Completions, list[PromptRow]]:
    """Answers of the reference to the RL prompts."""
    rows, seed, limit = job.rows, job.config.seed, settings.normaliser.limit
    order = shuffled(len(rows.prompts), seed, "normaliser")
    asked = [(order[i % len(order)], i // len(order)) for i in range(min(limit, max(len(order), 256)))]
    prompts = [rows.prompts[row] for row, _ in asked]

    def work(tokens: int) -> Completions:
        return generate(
            reference,
            [row.ids for row in prompts],
            [("normaliser", row, k) for row, k in asked],
            seed=seed,
            limit=rows.encoder.max_response,
            end=rows.encoder.end,
            pad=rows.encoder.pad,
            budget=tokens,
        ).completions

    return budget.within(work), prompts
