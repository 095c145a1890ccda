"""Prompts -> answers -> what the roles say of them. Each process does its share; all get the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rto import rewards
from rto.advantages import held, to_go
from rto.batch import Completions, Rollouts, Signals
from rto.config import Policy
from rto.data.chat import AnswerRow, Encoder, PromptRow
from rto.data.collate import collate_prompts
from rto.finite import NotFinite
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.trunk import TrunkCritic
from rto.rollouts.generate import SeedName, generate
from rto.rollouts.score import state_values
from rto.rollouts.signals import EXTERNAL, Reader, check_finite, missing
from rto.seeds import shuffled


@dataclass(frozen=True)
class Draw:
    """The answers of one iteration that got a reward, row for row. ``group`` numbers the prompts.

    ``values`` are the critic's, and ``greedy`` the reward-to-go of each prompt's greedy answer; zero without them.
    ``missing`` answers were dropped.
    """

    asked: list[PromptRow]
    completions: Completions
    signals: Signals
    values: Float[Tensor, "N T"]
    group: Int[Tensor, " N"]
    greedy: Float[Tensor, "N T"]
    missing: int

    @property
    def places(self) -> list[tuple[int, str]]:
        """Row and part of each answer (:func:`rto.finite.require_finite`)."""
        return [(i, "answer") for i in range(len(self.asked))]

    def answers(self) -> list[AnswerRow]:
        """What was written, as rows of data."""
        return answers(self.asked, self.completions)


def draw(
    policy: Role,
    critic: Role | None,
    reader: Reader,
    prompts: Sequence[PromptRow],
    config: Policy,
    iteration: int,
    seed: int,
    runtime: Runtime,
    greedy: bool,
    budget: Budget,
) -> Draw:
    """``config.rollouts`` answers, ``config.group`` to each prompt. Row i's noise depends on seed, iteration and i.
    ``budget`` bounds the passes without gradients.

    Raises:
        NotFinite: a signal is not finite.
        ValueError: more than ``config.max_missing`` of the answers have no reward, or none has one.
    """
    encoder = reader.encoder
    chosen = prompts_of(prompts, config.rollouts // config.group, iteration, seed)
    asked = [row for row in chosen for _ in range(config.group)]
    mine = runtime.share(list(range(len(asked))))
    own = [asked[i] for i in mine]
    names: list[SeedName] = [("rollouts", iteration, i) for i in mine]

    def work(tokens: int) -> dict[str, Tensor]:
        made = _answers(policy, own, names, config, encoder, seed, config.temperature, tokens, critic)
        parts = _read(reader, made, policy, own, critic, tokens)
        return parts | {"ids": made.completions.ids}

    parts = runtime.gather_rows(budget.within(work))

    shape = parts["ids"].shape
    baseline, gone = torch.zeros(shape), missing(parts)
    if greedy:
        found = _greedy(policy, chosen, reader, config, encoder, seed, runtime, budget)
        baseline = found["greedy"].repeat_interleave(config.group, 0)
        gone |= found["missing"].repeat_interleave(config.group)
    lost = int(gone.sum())
    if lost == len(gone) or lost / len(gone) > config.max_missing:
        failures = [failure for failure in runtime.gather_all(reader.failure) if failure]
        most = "not one is left" if lost == len(gone) else f"more than policy.max_missing = {config.max_missing} allows"
        raise ValueError(
            f"iteration {iteration + 1}: {lost} of {len(gone)} answers have no reward, {most}: see to what gives "
            f"the rewards ({', '.join(EXTERNAL)})" + "".join(f". {failure}" for failure in failures[:1])
        )
    keep = (~gone).nonzero().squeeze(-1)
    parts = {name: part[keep] for name, part in parts.items()}
    kept = [asked[i] for i in keep.tolist()]
    values, ids = parts.pop("values", torch.zeros(shape)[keep]), parts.pop("ids")
    asked_ids = collate_prompts([row.ids for row in kept], encoder.pad)
    completions = Completions(asked_ids, ids, parts["mask"], parts["finished"])
    group = torch.arange(len(asked))[keep] // config.group
    return Draw(kept, completions, Signals(**parts), values, group, baseline[keep], lost)


def _answers(
    policy: Role,
    asked: Sequence[PromptRow],
    names: Sequence[SeedName],
    config: Policy,
    encoder: Encoder,
    seed: int,
    temperature: float,
    tokens: int,
    critic: Role | None = None,
) -> Rollouts:
    """With values where the critic is a head on the policy's trunk."""
    return generate(
        policy,
        [row.ids for row in asked],
        names,
        seed=seed,
        limit=encoder.max_response,
        end=encoder.end,
        pad=encoder.pad,
        temperature=temperature,
        budget=tokens,
        head=critic.head if isinstance(critic, TrunkCritic) else None,
    )


def _greedy(
    policy: Role,
    asked: Sequence[PromptRow],
    reader: Reader,
    config: Policy,
    encoder: Encoder,
    seed: int,
    runtime: Runtime,
    budget: Budget,
) -> dict[str, Tensor]:
    """``greedy`` [P, T]: reward-to-go, without KL, of the greedy answer to each prompt. ``missing`` [P]."""
    mine = runtime.share(list(range(len(asked))))
    own = [asked[i] for i in mine]

    def work(tokens: int) -> dict[str, Tensor]:
        made = _answers(policy, own, [("greedy",)] * len(own), config, encoder, seed, 0.0, tokens)
        return _read(reader, made, policy, own, None, tokens)

    parts = budget.within(work)
    signals = Signals(**{name: part.nan_to_num() if name in EXTERNAL else part for name, part in parts.items()})
    total, _ = rewards.total(reader.terms, signals, 0.0)
    found = held(to_go(total, signals.mask), signals.mask, total.shape[1])
    return runtime.gather_rows({"greedy": found, "missing": missing(parts)})


def _read(
    reader: Reader, made: Rollouts, policy: Role, asked: Sequence[PromptRow], critic: Role | None, tokens: int
) -> dict[str, Tensor]:
    """What the roles say. Raises NotFinite with the answers as rows."""
    c = made.completions
    try:
        reader.budget = tokens
        parts = reader.read(c, made.logprobs, policy, asked)
        if made.values is not None:
            parts["values"] = made.values
        elif critic is not None:
            parts["values"] = state_values(critic, c, tokens)
        check_finite(parts)
    except NotFinite as error:
        rows = answers(asked, c)
        raise error.named([(i, "answer") for i in range(len(rows))]).among(rows, range(len(rows))) from None
    return parts


def answers(asked: Sequence[PromptRow], completions: Completions) -> list[AnswerRow]:
    """What was written, as rows of data."""
    c = completions
    ids = [row[mask].tolist() for row, mask in zip(c.ids, c.mask, strict=True)]
    return [
        AnswerRow(row.row, row.text, row.ids, answer, end)
        for row, answer, end in zip(asked, ids, c.finished.tolist(), strict=True)
    ]


def prompts_of(prompts: Sequence[PromptRow], count: int, iteration: int, seed: int) -> list[PromptRow]:
    """The iteration's prompts: the next ``count`` of an endless stream of shuffled epochs."""
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = shuffled(len(prompts), seed, "prompts", epoch)
        chosen.append(prompts[orders[epoch][place]])
    return chosen
