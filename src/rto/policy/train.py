"""The one RL loop:

prompts -> rollouts -> signals -> token rewards -> advantages -> policy and critic updates
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rto import rewards
from rto.advantages import ADVANTAGES
from rto.batch import Completions, Signals, _Rows
from rto.config import Policy, Spec
from rto.data.chat import Encoder, PromptRow
from rto.data.collate import collate_prompts, micro_batches, trim
from rto.models.checkpoint import ScorerNotes
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.numerics import masked_sum, reduce, whiten
from rto.optim import Optimizer
from rto.policy import LOSSES
from rto.policy.kl import KlController
from rto.policy.ppo import ratios
from rto.policy.value import explained_variance, value_loss
from rto.report.log import RunLog
from rto.rollouts.generate import generate
from rto.rollouts.score import sentence_scores, state_values, token_logprobs
from rto.seeds import shuffled


@dataclass
class Roles:
    """Who takes part. ``guide`` and ``scorer`` are None when no reward term needs them.

    ``notes`` normalises the scorer: (score - mean) / std; None leaves scores as they are.
    """

    policy: Role
    reference: Role
    critic: Role
    guide: Role | None = None
    scorer: Role | None = None
    notes: ScorerNotes | None = None


@dataclass
class RlState:
    """Everything that moves while RL trains."""

    policy: Optimizer
    critic: Optimizer
    controller: KlController
    iteration: int = 0


@dataclass(frozen=True)
class Buffer(_Rows):
    """One iteration's rollouts, ready for updates; [N, T] on the CPU, the same on every process."""

    completions: Completions
    logprobs: Float[Tensor, "N T"]
    values: Float[Tensor, "N T"]
    advantages: Float[Tensor, "N T"]
    returns: Float[Tensor, "N T"]


def train(
    stage: str,
    roles: Roles,
    prompts: Sequence[PromptRow],
    config: Policy,
    terms: list[Spec],
    *,
    encoder: Encoder,
    seed: int,
    runtime: Runtime,
    log: RunLog,
    progress: Any,
    oracle: Callable[[Sequence[PromptRow], Completions], list[float]] | None = None,
) -> RlState:
    """Train ``roles.policy`` and ``roles.critic`` with the token rewards ``terms``.

    ``oracle`` scores answers only to be logged. Prompts, sampling noise and minibatches depend on ``seed`` and
    not on the method, so that methods are compared on the same draws.
    """
    iterations = max(1, math.ceil(config.epochs * len(prompts) / config.rollouts))
    if config.max_steps:
        iterations = min(iterations, config.max_steps)
    steps = iterations * config.updates * (config.rollouts // config.batch)
    state = RlState(
        Optimizer(roles.policy.parameters(), config, config.lr, steps),
        Optimizer(roles.critic.parameters(), config, config.critic.lr, steps),
        KlController(config.kl.coef, config.kl.target, config.kl.horizon),
    )
    progress.start(stage, iterations)
    while state.iteration < iterations:
        begun = time.perf_counter()
        asked = _prompts_of(prompts, config.rollouts, state.iteration, seed)
        completions, signals, values = rollout(roles, asked, config, terms, state.iteration, encoder, seed, runtime)
        total, parts = rewards.total(terms, signals, state.controller.coef)
        advantages, returns = _advantages(config, total, values, signals)
        metrics = _reward_metrics(terms, signals, total, parts)
        buffer = Buffer(completions, signals.logprobs, values, advantages, returns)
        metrics |= update(roles, buffer, config, state, seed, runtime)
        kl = metrics["kl" if config.kl.unit == "sequence" else "kl_per_token"]
        metrics["kl_coef"] = state.controller.coef
        state.controller.update(kl, config.rollouts)
        state.iteration += 1

        if oracle is not None:
            truth = oracle(asked, completions)
            metrics["oracle"] = sum(truth) / len(truth)
        metrics["tokens_per_second"] = signals.mask.sum().item() / (time.perf_counter() - begun)
        log.metrics(stage, state.iteration, metrics)
        runtime.track({f"{stage}/{key}": value for key, value in metrics.items()}, state.iteration)
        if state.iteration % config.samples_every == 1 or config.samples_every == 1 or state.iteration == iterations:
            for i in range(min(2, len(asked))):
                answer = encoder.decode(completions.ids[i][completions.mask[i]].tolist())
                record: dict[str, Any] = {"prompt": asked[i].text, "answer": answer}
                record |= {"score": masked_sum(total[i : i + 1], signals.mask[i : i + 1]).item()}
                log.sample(stage, state.iteration, record | {"finished": completions.finished[i].item()})
        progress.update(state.iteration, metrics)
    return state


def rollout(
    roles: Roles,
    asked: Sequence[PromptRow],
    config: Policy,
    terms: list[Spec],
    iteration: int,
    encoder: Encoder,
    seed: int,
    runtime: Runtime,
) -> tuple[Completions, Signals, Float[Tensor, "N T"]]:
    """One answer a prompt, what the roles say of it, and the critic's values. Each process does its share."""
    mine = runtime.share(list(range(len(asked))))
    budget, temperature = config.reading_tokens, config.temperature
    own = generate(
        roles.policy,
        [asked[i].ids for i in mine],
        [("rollouts", iteration, i) for i in mine],
        seed=seed,
        limit=encoder.max_response,
        end=encoder.end,
        pad=encoder.pad,
        temperature=temperature,
        budget=budget,
    )
    c = own.completions
    parts = {"ids": c.ids, "mask": c.mask, "finished": c.finished, "logprobs": own.logprobs}
    parts["reference"] = token_logprobs(roles.reference, c, budget, temperature)
    if roles.guide is not None:
        parts["guide"] = token_logprobs(roles.guide, c, budget, temperature)
    if roles.scorer is not None:
        scores = sentence_scores(roles.scorer, c, budget)
        parts["scores"] = scores if roles.notes is None else (scores - roles.notes.mean) / roles.notes.std
    parts["values"] = state_values(roles.critic, c, budget)
    for name, part in parts.items():
        if part.dtype.is_floating_point and not part.isfinite().all():
            row = (~part.isfinite()).nonzero()[0, 0].item()
            prompt = mine[int(row)]
            raise FloatingPointError(
                f"{name} of rollout {prompt} in iteration {iteration + 1} (prompt of data row {asked[prompt].row}) "
                "is not finite"
            )
    parts = runtime.gather_rows(parts)
    values = parts.pop("values")
    ids = parts.pop("ids")
    prompts = collate_prompts([row.ids for row in asked], encoder.pad)
    completions = Completions(prompts, ids, parts["mask"], parts["finished"])
    return completions, Signals(**parts), values


def update(
    roles: Roles, buffer: Buffer, config: Policy, state: RlState, seed: int, runtime: Runtime
) -> dict[str, float]:
    """Passes over the buffer in minibatches: one optimiser step of policy and critic each."""
    kept: dict[str, list[float]] = {}
    for epoch in range(config.updates):
        order = shuffled(len(buffer), seed, "minibatches", state.iteration, epoch)
        for start in range(0, len(order), config.batch):
            rows = buffer.rows(torch.tensor(order[start : start + config.batch]))
            fresh = epoch == 0 and start == 0
            metrics = _policy_step(roles.policy, rows, config, state.policy, runtime, fresh)
            metrics |= _critic_step(roles.critic, rows, config, state.critic, runtime)
            for key, value in metrics.items():
                kept.setdefault(key, []).append(value)
    gap = kept.pop("policy/sampler_gap")[0]  # later minibatches see a policy that has moved on
    means = {key: sum(values) / len(values) for key, values in kept.items()}
    explained = explained_variance(buffer.values, buffer.returns, buffer.completions.mask).item()
    return means | {"policy/sampler_gap": gap, "value/explained_variance": explained}


def _policy_step(
    policy: Role, rows: Buffer, config: Policy, optimizer: Optimizer, runtime: Runtime, fresh: bool
) -> dict[str, float]:
    """``fresh``: the policy still is the one that sampled, so its ratio is 1 and its log-probs are the old ones.

    The sampler's log-probs differ from these by rounding; ``policy/sampler_gap`` is the mean difference (nats).
    """
    loss_of = LOSSES[config.loss["type"]]
    options = {key: value for key, value in config.loss.items() if key != "type"}

    def loss(part: Buffer, total: float) -> tuple[Tensor, dict[str, float]]:
        mask = part.completions.mask
        logprobs, entropy = policy.logprobs(part.completions, config.temperature)
        old = logprobs.detach() if fresh else part.logprobs
        share = reduce(loss_of(logprobs, old, part.advantages, **options), mask, config.reduction, total)
        with torch.no_grad():
            moved = (ratios(logprobs, old) - 1).abs() > options.get("clip", math.inf)
            sums = {"entropy": entropy.sum(), "policy/clip_share": (moved & mask).sum()}
            sums |= {"policy/moved": torch.where(mask, old - logprobs, 0.0).sum()}
            sums |= {"policy/sampler_gap": torch.where(mask, logprobs - part.logprobs, 0.0).abs().sum()}
        return share, {key: value.item() for key, value in sums.items()}

    sums = _accumulate(policy, rows, loss, config, runtime)
    tokens = rows.completions.mask.sum().item()
    norm, rate = optimizer.step()
    metrics = {key: value / tokens for key, value in sums.items() if key != "loss"}
    return metrics | {"policy/loss": sums["loss"], "policy/grad_norm": norm, "policy/lr": rate}


def _critic_step(
    critic: Role, rows: Buffer, config: Policy, optimizer: Optimizer, runtime: Runtime
) -> dict[str, float]:
    def loss(part: Buffer, total: float) -> tuple[Tensor, dict[str, float]]:
        values = critic.values(part.completions)
        losses = value_loss(values, part.values, part.returns, clip=config.critic.clip)
        return reduce(losses, part.completions.mask, config.reduction, total), {}

    sums = _accumulate(critic, rows, loss, config, runtime)
    norm, _ = optimizer.step()
    return {"value/loss": sums["loss"], "value/grad_norm": norm}


def _accumulate(
    role: Role,
    rows: Buffer,
    loss: Callable[[Buffer, float], tuple[Tensor, dict[str, float]]],
    config: Policy,
    runtime: Runtime,
) -> dict[str, float]:
    """Leave the minibatch's gradient on the role. Returns the loss and the sums of its metrics over processes."""
    c = rows.completions
    total = float(c.mask.sum() if config.reduction == "token" else len(rows))
    lengths = (c.prompt.mask.sum(-1) + c.lengths).tolist()
    mine = runtime.share(list(range(len(rows))))
    sums: dict[str, float] = {}
    for index in micro_batches([lengths[i] for i in mine], config.micro_tokens):
        part = _trim(rows.rows(torch.tensor([mine[i] for i in index]))).to(role.backbone.device)
        value, measured = loss(part, total)
        value.backward()
        for key, number in {"loss": value.item(), **measured}.items():
            sums[key] = sums.get(key, 0.0) + number
    sums = runtime.sum(sums)
    runtime.sum_gradients(role.parameters())
    return sums


def _trim(rows: Buffer) -> Buffer:
    completions = trim(rows.completions)
    width = completions.ids.shape[1]
    names = ("logprobs", "values", "advantages", "returns")
    return replace(rows, completions=completions, **{name: getattr(rows, name)[:, :width] for name in names})


def _prompts_of(prompts: Sequence[PromptRow], count: int, iteration: int, seed: int) -> list[PromptRow]:
    """The iteration's prompts: the next ``count`` of an endless stream of shuffled epochs."""
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = shuffled(len(prompts), seed, "prompts", epoch)
        chosen.append(prompts[orders[epoch][place]])
    return chosen


def _advantages(
    config: Policy, total: Float[Tensor, "N T"], values: Float[Tensor, "N T"], signals: Signals
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    options = {key: value for key, value in config.advantage.items() if key != "type"}
    advantages, returns = ADVANTAGES[config.advantage["type"]](total, values, signals.mask, **options)
    return (whiten(advantages, signals.mask) if config.whiten else advantages), returns


def _reward_metrics(
    terms: list[Spec], signals: Signals, total: Float[Tensor, "N T"], parts: dict[str, Float[Tensor, "N T"]]
) -> dict[str, float]:
    """Per answer: the reward and each term's sum, share of the absolute reward, clip rate, correlation with length;
    the KL to the reference (k1, nats) and the length."""
    mask, lengths = signals.mask, signals.mask.sum(-1).float()
    gap = torch.where(mask, signals.logprobs - signals.reference, 0.0)
    metrics = {
        "reward/total": masked_sum(total, mask).mean().item(),
        "kl": gap.sum(-1).mean().item(),
        "kl_per_token": (gap.sum() / mask.sum()).item(),
        "length": lengths.mean().item(),
        "finished": signals.finished.float().mean().item(),
    }
    mass = sum(part.abs().sum().item() for part in parts.values())
    named = rewards.named(terms)
    for name, part in parts.items():
        sums = masked_sum(part, mask)
        metrics[f"reward/{name}"] = sums.mean().item()
        metrics[f"reward_share/{name}"] = part.abs().sum().item() / mass if mass else 0.0
        metrics[f"reward_length_correlation/{name}"] = _correlation(sums, lengths)
        if named.get(name, {}).get("clip") is not None:
            free = rewards.evaluate(named[name], signals, clip=None)
            metrics[f"reward_clip_share/{name}"] = (free != part).sum().item() / max(1, int((free != 0).sum()))
    return metrics


def _correlation(a: Float[Tensor, " N"], b: Float[Tensor, " N"]) -> float:
    """Pearson; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale > 1e-4 else 0.0  # less is rounding: the KL of an untrained policy
