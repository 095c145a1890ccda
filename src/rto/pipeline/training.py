"""The work of the training stages: which roles, which rows, which loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rto import config as recipe
from rto import rewards
from rto.config import Policy, Spec
from rto.data.chat import PairRow
from rto.data.worlds import token_rewards
from rto.evaluation.policies import judge_by_truth
from rto.models.checkpoint import ScorerNotes, merged, read_notes, save_notes
from rto.models.load import load_tokenizer, locate, same_vocabulary, scratch_network
from rto.models.role import Role
from rto.models.workshop import Workshop, verify
from rto.pipeline.job import Job
from rto.policy import train as rl_loop
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.preferences.train import PairObjective, SftObjective, fit


def sft(job: Job) -> str:
    """Train the reference on demonstrations; with LoRA the adapter is merged, so that the reference is one model."""
    config, rows, model = job.config, job.rows, job.config.model
    if isinstance(model, recipe.Scratch):
        network = scratch_network(model, job.tokenizer, rows.encoder.end, config.seed)
        role = Workshop(model, "", job.tokenizer, job.runtime, config.seed).new_policy("sft", network)
    else:
        role = Workshop(model, locate(model), job.tokenizer, job.runtime, config.seed).new_policy("sft")
    verify(role, rows.encoder.end)
    _fit(job, "sft", SftObjective(role, rows.encoder.pad), rows.answers, config.sft)
    if role.adapter is not None:
        role = merged(role)
    job.save(role, "sft")
    return "sft"


def prefer(job: Job) -> str:
    """Train the guide on pairs."""
    config, rows, shop = job.config, job.rows, job.workshop()
    role, reference = shop.new_policy("guide"), shop.reference()
    verify(reference, rows.encoder.end)
    loss = PREFERENCE_LOSSES[config.prefer.loss["type"]]
    objective = PairObjective(role, loss, _options(config.prefer.loss), rows.encoder.pad, reference)
    _fit(job, "prefer", objective, rows.pairs, config.prefer, rows.test_pairs)
    job.save(role, "prefer")
    return "prefer"


def reward(job: Job) -> str:
    """Train the scorer on pairs."""
    return _scorer(job, "reward", job.rows.pairs, job.config.seed)


def oracle(job: Job) -> str:
    """Train the held-out oracle: a scorer of its own on pairs that no other stage sees."""
    if not job.rows.oracle_pairs:
        raise ValueError("evaluation.oracle.type = 'heldout' needs pairs of its own: set data.oracle above 0, say 0.2")
    return _scorer(job, "oracle", job.rows.oracle_pairs, job.config.seed + 1_000_003)


def _scorer(job: Job, stage: str, pairs: Sequence[PairRow], seed: int) -> str:
    """Its mean and std over the held-out answers are stored with it."""
    config, rows = job.config, job.rows
    role = job.workshop(seed).new_scorer(stage, config.reward.model)
    loss = REWARD_LOSSES[config.reward.loss["type"]]
    objective = PairObjective(role, loss, _options(config.reward.loss), rows.encoder.pad)
    _fit(job, stage, objective, pairs, config.reward, rows.test_pairs, seed)
    chosen, rejected = objective.scores(rows.test_pairs, config.reward.reading_tokens)
    scores = torch.cat([chosen, rejected]).double()
    accuracy = ((chosen > rejected).double() + 0.5 * (chosen == rejected)).mean().item()
    job.save(role, stage)
    if job.runtime.main:
        notes = ScorerNotes(scores.mean().item(), max(scores.std().item(), 1e-8), accuracy, len(rows.test_pairs))
        save_notes(job.folder / stage, notes)
    return stage


def rl(job: Job, name: str, policy: Policy, terms: list[Spec]) -> str:
    """Train one policy on token rewards."""
    config, rows, shop = job.config, job.rows, job.workshop()
    if policy.critic.init == "scorer":
        critic = shop.open_scorer(job.path("reward"), "critic", config.reward.model, trained=True)
    else:
        critic = shop.new_scorer("critic", None)
    guide, scorer, notes = readers(job, shop, terms)
    roles = rl_loop.Roles(shop.new_policy("policy"), shop.reference(), critic, guide, scorer, notes)
    verify(roles.reference, rows.encoder.end)
    rl_loop.train(
        f"rl/{name}",
        roles,
        rows.prompts,
        policy,
        terms,
        encoder=rows.encoder,
        seed=config.seed,
        runtime=job.runtime,
        log=job.log,
        progress=job.progress,
        oracle=judge_by_truth(token_rewards, rows.encoder) if isinstance(config.data, recipe.World) else None,
    )
    job.save(roles.policy, f"rl/{name}")
    return f"rl/{name}"


def readers(job: Job, shop: Workshop, terms: list[Spec]) -> tuple[Role | None, Role | None, ScorerNotes | None]:
    """Guide, scorer and its normaliser, where these terms read them."""
    needed, config = rewards.needs(terms), job.config
    guide = shop.open_policy(job.path("prefer"), "guide") if "guide" in needed else None
    if "scores" not in needed:
        return guide, None, None
    folder = job.path("reward")
    if config.reward.checkpoint is not None:
        same_vocabulary(job.tokenizer, load_tokenizer(folder), "scorer", folder)
    scorer = shop.open_scorer(folder, "scorer", config.reward.model, trained=False)
    return guide, scorer, read_notes(folder) if config.reward.normalize else None


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
    )
