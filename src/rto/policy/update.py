"""Passes over one iteration's buffer: optimiser steps of policy and critic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rto.batch import Completions, _Rows
from rto.config import Policy
from rto.data.chat import AnswerRow
from rto.data.collate import micro_batches, trim
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.numerics import masked_sum, reduce
from rto.optim import Optimizer
from rto.policy import LOSSES, is_pairwise
from rto.policy.kl_loss import kl_loss
from rto.policy.ppo import ratios
from rto.policy.value import explained_variance, value_loss
from rto.preferences.train import SftObjective
from rto.seeds import shuffled

Sums = dict[str, float]
First = Callable[[int], Sums] | None


@dataclass(frozen=True)
class Buffer(_Rows):
    """One iteration's answers, ready for updates; on the CPU, the same on every process.

    ``reference`` is what KL is taken against, ``rewards`` each answer's reward without KL.
    """

    completions: Completions
    logprobs: Float[Tensor, "N T"]
    reference: Float[Tensor, "N T"]
    values: Float[Tensor, "N T"]
    advantages: Float[Tensor, "N T"]
    returns: Float[Tensor, "N T"]
    rewards: Float[Tensor, " N"]
    group: Int[Tensor, " N"]


@dataclass
class Learner:
    """Who learns. ``critic`` None: the estimator needs no values."""

    policy: Role
    policy_optimizer: Optimizer
    critic: Role | None = None
    critic_optimizer: Optimizer | None = None
    demonstrations: Sequence[AnswerRow] = ()  # for the PTX mix
    budget: Budget | None = None  # of a pass with gradients; None: the recipe's, and no second try


def update(
    learner: Learner,
    buffer: Buffer,
    config: Policy,
    kl_coef: float,
    iteration: int,
    seed: int,
    runtime: Runtime,
) -> dict[str, float]:
    """``config.updates`` passes over the buffer in minibatches: one optimiser step of policy and critic each.

    In the first ``config.critic.warmup`` iterations only the critic learns, where there is one. A pairwise
    loss keeps the two answers of a prompt together.
    """
    kept: dict[str, list[float]] = {}
    pairwise = is_pairwise(LOSSES[config.loss["type"]])
    units = _pairs(buffer) if pairwise else [[i] for i in range(len(buffer))]
    size = config.batch // len(units[0]) if units else 1
    for epoch in range(config.updates):
        order = shuffled(len(units), seed, "minibatches", iteration, epoch)
        for start in range(0, len(order), size):
            index = [row for unit in order[start : start + size] for row in units[unit]]
            rows = buffer.rows(torch.tensor(index))
            metrics: dict[str, float] = {}
            if learner.critic is None or iteration >= config.critic.warmup:
                fresh = epoch == 0 and start == 0
                draw = partial(_ptx, learner, config, (seed, "ptx", iteration, epoch, start), runtime)
                step = _pairwise_step if pairwise else _tokenwise_step
                metrics |= step(learner, rows, config, kl_coef, runtime, fresh, draw if config.ptx else None)
            if learner.critic is not None:
                metrics |= _critic_step(learner, rows, config, runtime)
            for key, value in metrics.items():
                kept.setdefault(key, []).append(value)
    if gaps := kept.get("policy/sampler_gap"):
        kept["policy/sampler_gap"] = gaps[:1]  # later minibatches see a policy that has moved on
    means = {key: sum(values) / len(values) for key, values in kept.items()}
    if learner.critic is not None:
        found = explained_variance(buffer.values, buffer.returns, buffer.completions.mask)
        means["value/explained_variance"] = found.item()
    return means


def _tokenwise_step(
    learner: Learner, rows: Buffer, config: Policy, kl_coef: float, runtime: Runtime, fresh: bool, first: First
) -> Sums:
    """``fresh``: the policy still is the one that sampled, so its ratio is 1 and its log-probs are the old ones.

    The sampler's log-probs differ from these by rounding; ``policy/sampler_gap`` is the mean difference (nats).
    """
    loss_of, options = LOSSES[config.loss["type"]], _options(config)
    policy = learner.policy

    def loss(part: Buffer, total: float) -> tuple[Tensor, Sums]:
        mask = part.completions.mask
        logprobs, entropy = policy.logprobs(part.completions, config.temperature)
        old = logprobs.detach() if fresh else part.logprobs
        losses = loss_of(logprobs, old, part.advantages, **options)
        if config.kl.place == "loss":
            losses = losses + kl_coef * kl_loss(logprobs, part.reference, config.kl.estimator)
        with torch.no_grad():
            ratio, clip = ratios(logprobs, old), options.get("clip", math.inf)
            cut = (ratio > 1 + (options.get("clip_high") or clip)) | (ratio < 1 - clip)
            sums = {"entropy": entropy.sum(), "policy/clip_share": (cut & mask).sum()}
            sums |= {"policy/moved": torch.where(mask, old - logprobs, 0.0).sum()}
            sums |= {"policy/sampler_gap": torch.where(mask, logprobs - part.logprobs, 0.0).abs().sum()}
        return reduce(losses, mask, config.reduction, total), {key: value.item() for key, value in sums.items()}

    return _policy_metrics(learner, rows, _accumulate(learner, policy, rows, loss, config, runtime, first))


def _pairwise_step(
    learner: Learner, rows: Buffer, config: Policy, kl_coef: float, runtime: Runtime, fresh: bool, first: First
) -> Sums:
    """Rows 2i and 2i + 1 answer the same prompt."""
    loss_of, options = LOSSES[config.loss["type"]], _options(config)
    policy = learner.policy

    def loss(part: Buffer, total: float) -> tuple[Tensor, Sums]:
        mask = part.completions.mask
        logprobs, entropy = policy.logprobs(part.completions, config.temperature)
        now = masked_sum(logprobs, mask)
        old = now.detach() if fresh else masked_sum(part.logprobs, mask)
        frozen = masked_sum(part.reference, mask)
        first, second = slice(0, None, 2), slice(1, None, 2)
        losses = loss_of(
            *(x[side] for x in (now, old, frozen, part.rewards) for side in (first, second)),
            torch.tensor(kl_coef, device=now.device),
            **options,
        )
        with torch.no_grad():
            sums = {"entropy": entropy.sum()}
            sums |= {"policy/moved": (old - now).sum()}
            sums |= {"policy/sampler_gap": torch.where(mask, logprobs - part.logprobs, 0.0).abs().sum()}
        return losses.sum() / (total / 2), {key: value.item() for key, value in sums.items()}

    return _policy_metrics(learner, rows, _accumulate(learner, policy, rows, loss, config, runtime, first, unit=2))


def _policy_metrics(learner: Learner, rows: Buffer, sums: Sums) -> Sums:
    tokens = rows.completions.mask.sum().item()
    norm, rate = learner.policy_optimizer.step()
    whole = ("loss", "policy/ptx_loss")
    metrics = {key: value if key in whole else value / tokens for key, value in sums.items()}
    metrics.pop("loss")
    return metrics | {"policy/loss": sums["loss"], "policy/grad_norm": norm, "policy/lr": rate}


def _critic_step(learner: Learner, rows: Buffer, config: Policy, runtime: Runtime) -> Sums:
    critic, optimizer = learner.critic, learner.critic_optimizer
    assert critic is not None and optimizer is not None

    def loss(part: Buffer, total: float) -> tuple[Tensor, Sums]:
        losses = value_loss(critic.values(part.completions), part.values, part.returns, clip=config.critic.clip)
        return reduce(losses, part.completions.mask, config.reduction, total), {}

    sums = _accumulate(learner, critic, rows, loss, config, runtime)
    norm, _ = optimizer.step()
    return {"value/loss": sums["loss"], "value/grad_norm": norm}


def _ptx(learner: Learner, config: Policy, draw: tuple, runtime: Runtime, budget: int) -> Sums:
    """Leave this process's gradient of ptx * (SFT loss of a batch of demonstrations) on the policy (PPO-max)."""
    objective = SftObjective(learner.policy, pad=0)  # padding is masked: any id will do
    rows = learner.demonstrations
    batch = [rows[i] for i in shuffled(len(rows), *draw)[: config.batch]]
    total = float(sum(map(objective.weight, batch)))
    mine, sums = runtime.share(batch), {"policy/ptx_loss": 0.0}
    for index in micro_batches([objective.size(row) for row in mine], budget):
        loss, _ = objective.loss([mine[i] for i in index], total)
        (config.ptx * loss).backward()
        sums["policy/ptx_loss"] += loss.item()
    return sums


def _accumulate(
    learner: Learner,
    role: Role,
    rows: Buffer,
    loss: Callable[[Buffer, float], tuple[Tensor, Sums]],
    config: Policy,
    runtime: Runtime,
    first: First = None,
    unit: int = 1,
) -> Sums:
    """Leave the minibatch's gradient on the role. Returns the loss and the sums of its metrics over processes.

    ``first`` leaves another gradient there before. ``unit`` rows in a row stay in one micro-batch.
    """
    c = rows.completions
    token = config.reduction == "token" and unit == 1
    total = float(c.mask.sum() if token else len(rows))
    lengths = (c.prompt.mask.sum(-1) + c.lengths).view(-1, unit).amax(-1) * unit
    mine = runtime.share(list(range(len(lengths))))

    def work(budget: int) -> Sums:
        sums: Sums = {} if first is None else first(budget)
        for index in micro_batches([int(lengths[i]) for i in mine], budget):
            chosen = [unit * mine[i] + k for i in index for k in range(unit)]
            part = _trim(rows.rows(torch.tensor(chosen))).to(role.backbone.device)
            value, measured = loss(part, total)
            value.backward()
            for key, number in {"loss": value.item(), **measured}.items():
                sums[key] = sums.get(key, 0.0) + number
        return sums

    def undo() -> None:
        for p in role.parameters():
            p.grad = None

    budget = learner.budget
    sums = runtime.sum(work(config.micro_tokens) if budget is None else budget.within(work, undo))
    runtime.sum_gradients(role.parameters())
    return sums


def _pairs(buffer: Buffer) -> list[list[int]]:
    """The rows of each prompt that still has both answers."""
    rows: dict[int, list[int]] = {}
    for i, group in enumerate(buffer.group.tolist()):
        rows.setdefault(group, []).append(i)
    return [pair for pair in rows.values() if len(pair) == 2]


def _trim(rows: Buffer) -> Buffer:
    completions = trim(rows.completions)
    width = completions.ids.shape[1]
    names = ("logprobs", "reference", "values", "advantages", "returns")
    return replace(rows, completions=completions, **{name: getattr(rows, name)[:, :width] for name in names})


def _options(config: Policy) -> dict:
    return {key: value for key, value in config.loss.items() if key != "type"}
