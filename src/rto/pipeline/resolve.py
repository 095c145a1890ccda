"""A recipe with every option spelled out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rto import rewards
from rto.advantages import ADVANTAGES
from rto.config import Config, Policy, Section, Spec
from rto.policy import LOSSES
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.recipe import complete, nearest


def resolve(config: Config) -> Config:
    """Check every loss, term, estimator and local checkpoint of the recipe and fill in the defaults of its options.

    Raises:
        ValueError: naming the key, the nearest valid one and what is known.
    """
    given = {"prefer.checkpoint": config.prefer.checkpoint, "reward.checkpoint": config.reward.checkpoint}
    for key, folder in given.items():
        # One slash alone is a hub name (owner/name); anything else is meant as a path.
        local = folder is not None and (folder.startswith(("/", ".", "~")) or folder.count("/") > 1)
        if folder is not None and local and not Path(folder).is_dir():
            raise ValueError(f"{key} = {folder!r}: no such folder (looked for {Path(folder).absolute()})")
    for name, policy in reversed(config.policies().items()):  # baselines last: they inherit the mistakes of [policy]
        where = "policy" if name == config.policy.method else f"baselines.{name}"
        terms_of(policy, where)
        _completed(policy, where)
    return config.model_copy(
        update={
            "prefer": config.prefer.model_copy(
                update={"loss": _complete(config.prefer, "loss", PREFERENCE_LOSSES, "prefer")}
            ),
            "reward": config.reward.model_copy(
                update={"loss": _complete(config.reward, "loss", REWARD_LOSSES, "reward")}
            ),
            "policy": _completed(config.policy),
        }
    )


def _completed(policy: Policy, where: str = "policy") -> Policy:
    changes = {
        "loss": _complete(policy, "loss", LOSSES, where),
        "advantage": _complete(policy, "advantage", ADVANTAGES, where),
    }
    return policy.model_copy(update=changes)


def _complete(section: Section, key: str, table: Mapping[str, Callable[..., Any]], where: str) -> Spec:
    """``--prefer.loss.beta 0.2`` alone changes an option of the default loss, so the type may be left out."""
    usual = type(section).model_fields[key].default["type"]
    return complete({"type": usual, **getattr(section, key)}, table, f"{where}.{key}")


def terms_of(policy: Policy, where: str = "policy") -> list[Spec]:
    """The reward terms of a policy, complete: its method's, or its own list."""
    if policy.rewards is None and policy.method not in rewards.METHODS:
        known = ", ".join([*rewards.METHODS, "custom"])
        hint = nearest(policy.method, rewards.METHODS)
        raise ValueError(f"{where}.method = {policy.method!r} is unknown{hint}; known: {known}")
    listed = rewards.METHODS[policy.method] if policy.rewards is None else policy.rewards
    functions = {name: term.function for name, term in rewards.TERMS.items()}
    return [complete(term, functions, f"{where}.rewards[{i}]") for i, term in enumerate(listed)]
