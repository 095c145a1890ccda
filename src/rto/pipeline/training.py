"""The work of the training stages: which roles, which rows, which loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from rto import config as recipe
from rto.config import Policy, Prefer, Reward, Spec
from rto.data.chat import PairRow
from rto.data.rows import scored_from_pairs
from rto.data.worlds import token_rewards
from rto.evaluation.policies import judge_by_truth
from rto.models.checkpoint import ScorerNotes, merged, save_notes
from rto.models.load import locate, same_vocabulary, scratch_network, tokenizer_at
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.segment import SegmentScorer
from rto.models.trunk import TrunkCritic
from rto.models.workshop import Workshop, check_positions, verify
from rto.pipeline.job import Job
from rto.pipeline.readers import adapter_name, make_reader
from rto.pipeline.resolve import guide_stage, scorer_stage
from rto.policy import train as rl_loop
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES, rebel
from rto.preferences.cache import ReferenceCache, fingerprint
from rto.preferences.groups import pair_scores
from rto.preferences.objectives import PairObjective, SftObjective
from rto.preferences.rounds import copy_weights, fit_rounds
from rto.preferences.train import fit, objective_for, reads_groups


def sft(job: Job) -> str:
    """Train the reference on demonstrations; with LoRA the adapter is merged, so that the reference is one model."""
    config, rows, model = job.config, job.rows, job.config.model
    if isinstance(model, recipe.Scratch):
        network = scratch_network(model, job.tokenizer, rows.encoder.end, config.seed)
        role = Workshop(model, "", job.tokenizer, job.runtime, config.seed).new_policy("sft", network)
    else:
        role = Workshop(model, locate(model), job.tokenizer, job.runtime, config.seed).new_policy("sft")
    verify(role, rows.encoder.end)
    _fits(job, role)
    _fit(job, "sft", SftObjective(role, rows.encoder.pad), rows.answers, config.sft)
    if role.adapter is not None:
        role = merged(role)
    job.save(role, "sft")
    return "sft"


def prefer(job: Job, stage: str, settings: Prefer) -> str:
    """Train a guide on pairs, or on scored answers for a loss that reads them."""
    rows, shop = job.rows, job.workshop()
    role, reference = shop.new_policy("guide"), shop.reference()
    verify(reference, rows.encoder.end)
    loss = PREFERENCE_LOSSES[settings.loss["type"]]
    read: Sequence[Any] = rows.pairs
    held_out: Sequence[Any] = rows.test_pairs
    if reads_groups(loss):
        scores = pair_scores(loss, _options(settings.loss))
        read = rows.scored or scored_from_pairs(rows.pairs, *scores)
        held_out = scored_from_pairs(rows.test_pairs, *scores)
    elif loss is rebel or settings.loss.get("use_margin"):
        need_margins(rows.pairs, f"{stage}: the loss {settings.loss['type']}")
    _fits(job, role, reference)
    cache = None
    if settings.cache_reference:
        cache = ReferenceCache(job.folder / "reference_cache.safetensors", "")  # objective() names the reference

    def objective(against: Role) -> Any:
        if cache is not None:
            cache.fingerprint = fingerprint(against)
        return objective_for(role, loss, _options(settings.loss), rows.encoder.pad, against, cache)

    def follower() -> Role:
        return reference if role.adapter is None else shop.new_policy("follower")

    saver = job.saver(settings, {"reference": job.base})
    if cache is not None:
        saver.beside = partial(cache.save, job.runtime)
    fit_rounds(
        stage,
        role,
        reference,
        follower,
        objective,
        read,
        settings,
        settings.rounds,
        seed=job.config.seed,
        runtime=job.runtime,
        log=job.log,
        progress=job.progress,
        held_out=held_out,
        eval_every=settings.eval_every,
        saver=saver,
    )
    if cache is not None:
        cache.save(job.runtime)
    job.save(role, stage)
    return stage


def scorer(job: Job, stage: str, settings: Reward) -> str:
    """Train a scorer on pairs."""
    return _scorer(job, stage, settings, job.rows.pairs, job.config.seed)


def oracle(job: Job) -> str:
    """Train the held-out oracle: a sentence scorer of its own on pairs that no other stage sees."""
    if not job.rows.oracle_pairs:
        raise ValueError("evaluation.oracle.type = 'heldout' needs pairs of its own: set data.oracle above 0, say 0.2")
    settings = job.config.reward.model_copy(update={"cutoff": None})
    return _scorer(job, "oracle", settings, job.rows.oracle_pairs, job.config.seed + 1_000_003)


def _scorer(job: Job, stage: str, settings: Reward, pairs: Sequence[PairRow], seed: int) -> str:
    """Its mean and std over the held-out answers are stored with it."""
    rows, shop = job.rows, job.workshop(seed)
    if settings.loss.get("use_margin"):
        need_margins(pairs, f"{stage}: use_margin")
    role = shop.new_scorer(adapter_name(stage), settings.model)
    if settings.cutoff is not None:
        role = SegmentScorer(role, shop.reference() if settings.cutoff else None, settings.cutoff)
    _fits(job, role)
    loss = REWARD_LOSSES[settings.loss["type"]]
    objective = PairObjective(role, loss, _options(settings.loss), rows.encoder.pad)
    frozen = {"reference": job.base}
    _fit(job, stage, objective, pairs, settings, rows.test_pairs, seed, frozen, settings.eval_every)
    budget = Budget(settings.reading_tokens, job.progress.say, job.runtime.gather_all, "reading")
    chosen, rejected = objective.scores(rows.test_pairs, budget)
    scores = torch.cat([chosen, rejected]).double()
    accuracy = ((chosen > rejected).double() + 0.5 * (chosen == rejected)).mean().item()
    job.save(role, stage)
    if job.runtime.main:
        std = max(scores.std().item(), 1e-8)
        notes = ScorerNotes(scores.mean().item(), std, accuracy, len(rows.test_pairs), settings.cutoff)
        save_notes(job.folder / stage, notes)
    return stage


def need_margins(pairs: Sequence[PairRow], who: str) -> None:
    """Raises ValueError when no pair says how much better its chosen answer is."""
    if all(pair.margin == 0 for pair in pairs):
        raise ValueError(
            f"{who} reads how much better the chosen answers are, and no pair says so: give the data the fields "
            "score_chosen and score_rejected, or margin"
        )


def rl(job: Job, name: str, policy: Policy, terms: list[Spec]) -> str:
    """Train one policy on token rewards."""
    config, rows, shop = job.config, job.rows, job.workshop()
    reader = make_reader(job, shop, policy, terms)
    verify(reader.reference, rows.encoder.end)
    learner = shop.new_policy("policy")
    if policy.kl.ema is not None:
        reader.moving = shop.new_policy("moving")
        copy_weights(learner, reader.moving)
    frozen = {"reference": job.base}
    if reader.guide is not None:
        frozen["guide"] = job.path(guide_stage(policy))
    if reader.scorer is not None:
        frozen["scorer"] = job.path(scorer_stage(policy))
    critic = _critic(job, shop, policy, learner) if rl_loop.reads_values(policy) else None
    scorer = reader.scorer.role if reader.scorer is not None else None
    _fits(job, learner, critic, reader.guide, scorer if isinstance(scorer, Role) else None)
    rl_loop.train(
        f"rl/{name}",
        learner,
        critic,
        reader,
        rows.prompts,
        policy,
        seed=config.seed,
        runtime=job.runtime,
        log=job.log,
        progress=job.progress,
        demonstrations=rows.answers,
        oracle=judge_by_truth(token_rewards, rows.encoder) if isinstance(config.data, recipe.World) else None,
        saver=job.saver(policy, frozen),
    )
    job.save(learner, f"rl/{name}")
    return f"rl/{name}"


def _fits(job: Job, *roles: Role | None) -> None:
    """Raises ValueError where a role has fewer positions than the longest sequence of any stage of the recipe has
    tokens: the first stage tells, since other lengths would be other data, on which all stages begin again."""
    rows, stages = job.rows, set(job.config.stages)
    lengths = [row.longest for row in rows.answers]
    if stages & {"prefer", "reward"}:
        lengths += [row.longest for row in (*rows.pairs, *rows.test_pairs)] + [row.longest for row in rows.scored]
    if stages & {"rl", "evaluate"}:
        lengths += [len(row.ids) + rows.encoder.max_response for row in [*rows.prompts, *rows.test_prompts]]
    for role in roles:
        if role is not None:
            check_positions(role.backbone, max(lengths))


def _critic(job: Job, shop: Workshop, policy: Policy, learner: Role) -> Role:
    if policy.critic.trunk != "own":
        return TrunkCritic(learner, job.config.seed, detached=policy.critic.trunk == "detached")
    if policy.critic.init == "reference":
        return shop.new_scorer("critic", None)
    stage = scorer_stage(policy)
    folder, model = job.path(stage), job.config.rewards()[stage].model
    same_vocabulary(job.tokenizer, tokenizer_at(folder, model or job.config.model), "critic", folder)
    return shop.open_scorer(folder, "critic", model, trained=True)


def _options(spec: Spec) -> Spec:
    return {key: value for key, value in spec.items() if key != "type"}


def _fit(
    job: Job,
    stage: str,
    objective: Any,
    rows: Sequence[Any],
    training: Any,
    held_out: Any = (),
    seed: int | None = None,
    frozen: dict[str, str] | None = None,
    eval_every: int | None = None,
) -> None:
    fit(
        stage,
        objective,
        rows,
        training,
        seed=job.config.seed if seed is None else seed,
        runtime=job.runtime,
        log=job.log,
        progress=job.progress,
        held_out=held_out,
        eval_every=eval_every,
        saver=job.saver(training, frozen),
    )
