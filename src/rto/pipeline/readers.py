"""Opens what the reward terms of a policy read: guide, scorer, and what normalises it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rto import rewards
from rto.config import Policy, Spec
from rto.models.checkpoint import fingerprint, read_notes
from rto.models.load import has_vocabulary, opened_as, same_vocabulary, tokenizer_at
from rto.models.role import Role
from rto.models.workshop import Workshop
from rto.pipeline.job import Job
from rto.pipeline.resolve import guide_stage, scorer_stage
from rto.rewards.normaliser import Normaliser
from rto.rollouts.foreign import ForeignScorer
from rto.rollouts.signals import Reader, Scorer

NORMALISER = "normaliser.json"


def make_reader(
    job: Job, shop: Workshop, policy: Policy, terms: list[Spec], opened: dict[str, Any] | None = None
) -> Reader:
    """Everything that these terms read. ``opened`` keeps guides and scorers by stage for the next reader."""
    needed = rewards.needs(terms)
    opened = {} if opened is None else opened
    if "reference" not in opened:
        opened["reference"] = shop.reference()
    at_guide, at_scorer = guide_stage(policy), scorer_stage(policy)
    if "guide" in needed and at_guide not in opened:
        opened[at_guide] = open_policy(job, shop, at_guide, adapter_name(at_guide))
    attended = any(term["type"] == "attention" and term["reader"] == "scorer" for term in rewards.live(terms))
    scored = needed & {"scores", "segments"} or attended
    key = f"{at_scorer} segments" if "segments" in needed else at_scorer
    if scored and key not in opened:
        other = opened.get(at_scorer) or opened.get(f"{at_scorer} segments")
        opened[key] = open_scorer(job, shop, at_scorer, "segments" in needed, other.role if other else None)
    return Reader(
        terms,
        opened["reference"],
        job.rows.encoder,
        policy.reading_tokens,
        temperature=policy.temperature,
        guide=opened[at_guide] if "guide" in needed else None,
        scorer=opened[key] if scored else None,
    )


def adapter_name(stage: str) -> str:
    """The name of a stage's adapter on the backbone."""
    return stage.replace("/", "_")


def open_policy(job: Job, shop: Workshop, stage: str, name: str) -> Role:
    """The finished guide or policy of a stage, frozen, as the adapter ``name``.

    Raises:
        ValueError: a checkpoint has another tokenizer than the policy.
    """
    folder, guide = job.path(stage), job.config.preferences().get(stage)
    if guide is not None and guide.checkpoint is not None:
        same_vocabulary(job.tokenizer, tokenizer_at(folder, job.config.model), f"guide {stage}", folder)
    return shop.open_policy(folder, name)


def open_scorer(
    job: Job, shop: Workshop, stage: str, segments: bool, opened: Role | ForeignScorer | None = None
) -> Scorer:
    """A finished scorer (``opened``: its role is there) with what normalises its sentence scores, or with ``segments``
    its segments too.

    Raises:
        ValueError: a checkpoint was trained with another cutoff, or the normaliser is missing or of another scorer.
    """
    settings, folder = job.config.rewards()[stage], job.path(stage)
    notes = read_notes(folder) if settings.normalize else None
    if notes is not None and notes.cutoff != settings.cutoff:
        raise ValueError(
            f"{folder} was trained with cutoff {notes.cutoff}, but {stage.replace('/', '.')}.cutoff is "
            f"{settings.cutoff}: give the same"
        )
    role = opened or open_role(job, shop, stage)
    normaliser = None
    if segments and settings.cutoff is not None and settings.normalize:
        normaliser = read_normaliser(job, stage, folder)
    return Scorer(role, settings.cutoff, notes, normaliser)


def open_role(job: Job, shop: Workshop, stage: str) -> Role | ForeignScorer:
    """A finished scorer, frozen; a checkpoint may have another tokenizer than the policy."""
    settings, folder = job.config.rewards()[stage], job.path(stage)
    if settings.checkpoint is not None:
        model = settings.model or job.config.model
        theirs = tokenizer_at(folder, model)
        if not has_vocabulary(job.tokenizer, theirs):
            return ForeignScorer.open(opened_as(folder, model), theirs, job.rows.encoder, job.runtime)
    return shop.open_scorer(folder, adapter_name(stage), settings.model, trained=False)


def read_normaliser(job: Job, stage: str, folder: str) -> Normaliser:
    """The normaliser of the scorer in ``folder``.

    Raises:
        ValueError: it is missing, or of another scorer or cutoff.
    """
    name = stage.replace("/", ".")
    places = [path for path in (job.folder / stage / NORMALISER, Path(folder) / NORMALISER) if path.exists()]
    if not places:
        raise ValueError(
            f"{Path(folder) / NORMALISER} is missing, and a segment reward is never taken as normalised: fit it with "
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
