"""A recipe with every option spelled out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rto import rewards
from rto.advantages import ADVANTAGES
from rto.config import Config, Policy, Prefer, Section, Spec, Trained
from rto.policy import LOSSES, is_pairwise
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.preferences.objectives import check_cacheable
from rto.recipe import complete, nearest


def resolve(config: Config) -> Config:
    """Check every loss, term, estimator and local checkpoint of the recipe and fill in the defaults of its options.

    Raises:
        ValueError: naming the key, the nearest valid one and what is known.
    """
    trained: dict[str, Trained] = {**config.preferences(), **config.rewards()}
    for stage, section in trained.items():
        key, folder = f"{_where(stage)}.checkpoint", section.checkpoint
        # One slash alone is a hub name (owner/name); anything else is meant as a path.
        local = folder is not None and (folder.startswith(("/", ".", "~")) or folder.count("/") > 1)
        if folder is not None and local and not Path(folder).is_dir():
            raise ValueError(f"{key} = {folder!r}: no such folder (looked for {Path(folder).absolute()})")
    guide_names(config)
    for name, policy in reversed(config.policies().items()):  # baselines last: they inherit the mistakes of [policy]
        where = "policy" if name == config.policy.method else f"baselines.{name}"
        check_policy(config, policy, terms_of(policy, where), where)
        _completed(policy, where)
    for stage, guide in config.preferences().items():
        _cacheable(guide, _where(stage))
    guides = {name: _trained(config.preferences()[f"prefer/{name}"], "prefer", name) for name in config.guides}
    scorers = {name: _trained(config.rewards()[f"reward/{name}"], "reward", name) for name in config.scorers}
    return config.model_copy(
        update={
            "prefer": config.prefer.model_copy(
                update={"loss": _complete(config.prefer, "loss", PREFERENCE_LOSSES, "prefer")}
            ),
            "reward": config.reward.model_copy(
                update={"loss": _complete(config.reward, "loss", REWARD_LOSSES, "reward")}
            ),
            "guides": {name: config.guides[name] | {"loss": loss} for name, loss in guides.items()},
            "scorers": {name: config.scorers[name] | {"loss": loss} for name, loss in scorers.items()},
            "policy": _completed(config.policy),
        }
    )


def check_stages(config: Config, stages: Sequence[str]) -> None:
    """Refuse stages that the recipe cannot do, before anything is done.

    Raises:
        ValueError: naming the key and the remedy.
    """
    if "sft" in stages and "sft" not in config.stages:
        raise ValueError("the recipe's stages leave sft out, so its model is the reference: add 'sft' to stages first")
    oracle, data = config.evaluation.oracle, config.data
    if "evaluate" in stages and oracle.type == "heldout" and data.type == "files" and data.oracle == 0:
        raise ValueError(
            "evaluation.oracle.type = 'heldout' needs pairs of its own, and data.oracle is 0: set data.oracle, say to "
            "0.2, choose another evaluation.oracle, or leave evaluate out of stages"
        )


def _where(stage: str) -> str:
    """The table of the recipe that a stage is told in."""
    kind, _, name = stage.partition("/")
    return kind if not name else f"{'guides' if kind == 'prefer' else 'scorers'}.{name}"


def _cacheable(section: Prefer, where: str) -> None:
    loss = PREFERENCE_LOSSES.get(section.loss.get("type", "dpo"))
    if section.cache_reference and loss is not None:
        try:
            check_cacheable(loss)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _trained(section: Section, kind: str, name: str) -> Spec:
    table = PREFERENCE_LOSSES if kind == "prefer" else REWARD_LOSSES
    return _complete(section, "loss", table, _where(f"{kind}/{name}"))


def guide_names(config: Config) -> dict[str, str]:
    """The guides' names in tables, and their stages: that of [prefer] has the name of its loss.

    Raises:
        ValueError: two policies of the recipe have the same name.
    """
    names = {str(config.prefer.loss.get("type", "dpo")): "prefer"}  # it may not be known yet whether that is a loss
    for name in config.policies():
        if name in names or name == "sft":
            other = "the reference" if name == "sft" else "the guide of [prefer], after its loss,"
            raise ValueError(f"baselines.{name}: {other} has this name: give it another")
    for name in config.guides:
        if name in names or name in config.policies() or name == "sft":
            raise ValueError(f"guides.{name}: another policy of the recipe has this name: give it another")
        names[name] = f"prefer/{name}"
    return names


def check_policy(config: Config, policy: Policy, terms: list[Spec], where: str) -> None:
    """Refuse a policy whose parts do not go together, before anything is trained.

    Raises:
        ValueError: naming the key and the remedy.
    """
    for key, chosen, known in (("guide", policy.guide, config.guides), ("scorer", policy.scorer, config.scorers)):
        if chosen is not None and chosen not in known:
            there = ", ".join(known) or f"none: add [{key}s.{chosen}]"
            raise ValueError(f"{where}.{key} = {chosen!r} is not in [{key}s]{nearest(chosen, known)}; known: {there}")
    kinds = [term["type"] for term in rewards.live(terms)]
    for kind in ("function", "http", "attention"):
        if kinds.count(kind) > 1:
            raise ValueError(f"{where}.rewards has {kinds.count(kind)} {kind} terms: there can be one")
    for term in rewards.live(terms):
        for kind, key, like in (("function", "function", "my_module:reward"), ("http", "url", "http://127.0.0.1:8000")):
            if term["type"] == kind and not term[key]:
                raise ValueError(f"{where}.rewards: the term {kind} has no {key}: set it, for example to {like!r}")
        if policy.method == "opd":
            kl = policy.kl
            if (kl.coef, kl.controller, kl.estimator, kl.ema) != (term["scale"], "fixed", "k1", None):
                raise ValueError(
                    f"{where}.method = 'opd' has the teacher as its optimum only where {where}.kl is fixed, k1, has no "
                    f"ema and coef = {term['scale']:g}, the scale of its term; or write your own: method = 'custom'"
                )
    stage = scorer_stage(policy)
    cutoff = config.rewards()[stage].cutoff
    if policy.method in rewards.CUTOFFS:
        wanted = rewards.CUTOFFS[policy.method]
        fits = bool(cutoff) if wanted == "positive" else cutoff == wanted
        if not fits:
            said = "a number of nats above 0" if wanted == "positive" else "none" if wanted is None else "0"
            raise ValueError(
                f"{where}.method = {policy.method!r} needs a scorer with cutoff = {said}; {_where(stage)}.cutoff is "
                f"{'none' if cutoff is None else cutoff}: set it, or name another of [scorers] in {where}.scorer"
            )
    loss = LOSSES.get(policy.loss.get("type", "ppo"))
    if loss is not None and is_pairwise(loss):
        if policy.group != 2:
            raise ValueError(f"{where}.loss compares two answers to a prompt: set {where}.group = 2")
        if policy.kl.place == "loss":
            raise ValueError(f"{where}.loss has the KL inside: set {where}.kl.place = 'reward'")
        if policy.kl.estimator != "k1":
            raise ValueError(f"{where}.loss has the KL of the log-ratio inside: set {where}.kl.estimator = 'k1'")
        for key in ("whiten", "advantage_clip"):
            if getattr(policy, key) is not None:
                remedy = "leave it out, or set it to 'none' where it is inherited"
                raise ValueError(f"{where}.loss compares two answers and has no advantages for {where}.{key}: {remedy}")
    estimator = ADVANTAGES.get(policy.advantage.get("type", "gae"))
    if policy.advantage.get("type") == "remax" and (
        policy.reward_scaling is not None or policy.reward_clip is not None
    ):
        raise ValueError(
            f"{where}.advantage remax compares rewards with the greedy answer's, which are not scaled: leave out "
            f"{where}.reward_scaling and {where}.reward_clip"
        )
    if estimator is not None and policy.group < estimator.group:
        named = policy.advantage["type"]
        raise ValueError(f"{where}.advantage {named} compares answers to the same prompt: set {where}.group = 4, say")


def _completed(policy: Policy, where: str = "policy") -> Policy:
    changes = {
        "loss": _complete(policy, "loss", LOSSES, where),
        "advantage": _complete(policy, "advantage", {n: e.function for n, e in ADVANTAGES.items()}, where),
    }
    return policy.model_copy(update=changes)


def _complete(section: Section, key: str, table: Mapping[str, Callable[..., Any]], where: str) -> Spec:
    """``--prefer.loss.beta 0.2`` alone changes an option of the default loss, so the type may be left out."""
    usual = type(section).model_fields[key].default["type"]
    spec = complete({"type": usual, **getattr(section, key)}, table, f"{where}.{key}")
    if key == "loss":
        _try(table[spec["type"]], {name: value for name, value in spec.items() if name != "type"}, f"{where}.{key}")
    return spec


def _try(loss: Callable[..., Any], options: Spec, where: str) -> None:
    """Options that do not go together are refused by the loss itself: ask it before anything is trained."""
    names = [p.name for p in inspect.signature(loss).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    pairwise = is_pairwise(loss) or not {"there", "old"} & set(names)
    kinds = {"there": torch.ones(1, 1, dtype=torch.bool), "baseline": torch.zeros(1), "kl_coef": torch.tensor(0.0)}
    inputs = [kinds.get(name, torch.zeros(1) if pairwise else torch.zeros(1, 1)) for name in names]
    try:
        loss(*inputs, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def terms_of(policy: Policy, where: str = "policy") -> list[Spec]:
    """The reward terms of a policy, complete: its method's, or its own list."""
    if policy.rewards is None and policy.method not in rewards.METHODS:
        known = ", ".join([*rewards.METHODS, "custom"])
        hint = nearest(policy.method, rewards.METHODS)
        raise ValueError(f"{where}.method = {policy.method!r} is unknown{hint}; known: {known}")
    listed = rewards.METHODS[policy.method] if policy.rewards is None else policy.rewards
    return [complete(term, term_functions(), f"{where}.rewards[{i}]") for i, term in enumerate(listed)]


def term_functions() -> dict[str, Callable[..., Any]]:
    return {name: term.function for name, term in rewards.TERMS.items()}


def guide_stage(policy: Policy) -> str:
    return "prefer" if policy.guide is None else f"prefer/{policy.guide}"


def scorer_stage(policy: Policy) -> str:
    return "reward" if policy.scorer is None else f"reward/{policy.scorer}"


def segment_scorers(config: Config) -> list[str]:
    """The stages of the scorers whose segments a policy of the recipe reads, normalised."""
    found = []
    for policy in config.policies().values():
        stage = scorer_stage(policy)
        settings = config.rewards()[stage]
        read = "segments" in rewards.needs(terms_of(policy)) and settings.normalize
        if read and settings.cutoff is not None and stage not in found:
            found.append(stage)
    return found
