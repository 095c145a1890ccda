"""Passes over one iteration's buffer: optimiser steps of policy and critic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rto.batch import Completions, _Rows
from rto.config import Policy
from rto.data.chat import AnswerRow
from rto.data.collate import micro_batches, trim
from rto.finite import Culprit, NotFinite, require_finite
from rto.late import late_gradients
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.trunk import TrunkCritic
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
Loss = Callable[["Buffer", float], tuple[Tensor, Sums]]
Together = dict[str, Optimizer]  # by role: all of them take a step, or none
WHOLE = ("policy/loss", "policy/ptx_loss", "value/loss")  # shares of a minibatch; other sums are over its tokens
SKIPPED = "skipped"  # optimiser steps that were not finite, of an iteration


def refuse(error: NotFinite) -> None:
    """No step may be left out."""
    raise error


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
    number: Int[Tensor, " N"]  # of the answer in the iteration


@dataclass
class Learner:
    """Who learns. ``critic`` None: the estimator needs no values. ``budget`` bounds a pass with gradients."""

    policy: Role
    policy_optimizer: Optimizer
    budget: Budget
    critic: Role | None = None
    critic_optimizer: Optimizer | None = None
    demonstrations: Sequence[AnswerRow] = ()  # for the PTX mix

    @property
    def trunk_critic(self) -> TrunkCritic | None:
        """A critic whose values come from the policy's own pass."""
        return self.critic if isinstance(self.critic, TrunkCritic) else None

    @property
    def policy_step(self) -> Together:
        """What steps with the policy: a critic on its trunk too."""
        return {"policy": self.policy_optimizer} | (self.critic_step if self.trunk_critic is not None else {})

    @property
    def critic_step(self) -> Together:
        assert self.critic_optimizer is not None
        return {"critic": self.critic_optimizer}


def update(
    learner: Learner,
    buffer: Buffer,
    config: Policy,
    kl_coef: float,
    iteration: int,
    seed: int,
    runtime: Runtime,
    met: Callable[[NotFinite], None] = refuse,
) -> dict[str, float]:
    """``config.updates`` passes over the buffer in minibatches: one optimiser step of policy and critic each.

    ``met`` is told of a step that is not finite, whose row is the number of an answer; if it returns, the step is left
    out, and ``skipped`` counts it.

    In the first ``config.critic.warmup`` iterations only the critic learns, where there is one. After them a critic
    on the policy's trunk learns in the policy's pass, and both step or none. A pairwise loss keeps the two answers of a
    prompt together.
    """
    kept: dict[str, list[float]] = {}
    skipped = 0.0
    pairwise = is_pairwise(LOSSES[config.loss["type"]])
    units = _pairs(buffer) if pairwise else [[i] for i in range(len(buffer))]
    size = config.batch // len(units[0]) if units else 1
    learns = policy_learns(learner.critic, config, iteration)
    apart = learner.critic is not None and not (learns and learner.trunk_critic is not None)  # the critic's pass
    for epoch in range(config.updates):
        order = shuffled(len(units), seed, "minibatches", iteration, epoch)
        for start in range(0, len(order), size):
            index = [row for unit in order[start : start + size] for row in units[unit]]
            rows = buffer.rows(torch.tensor(index))
            metrics: dict[str, float] = {}
            if learns:
                fresh = epoch == 0 and start == 0
                draw = partial(_ptx, learner, config, (seed, "ptx", iteration, epoch, start), runtime)
                step = _pairwise_step if pairwise else _tokenwise_step
                work = partial(step, learner, rows, config, kl_coef, runtime, fresh, draw if config.ptx else None)
                metrics |= _tried(work, rows, learner.policy_step, met)
            skipped += metrics.pop(SKIPPED, 0.0)
            if apart:
                work = partial(_critic_step, learner, rows, config, runtime)
                metrics |= _tried(work, rows, learner.critic_step, met)
            skipped += metrics.pop(SKIPPED, 0.0)
            for key, value in metrics.items():
                kept.setdefault(key, []).append(value)
    if gaps := kept.get("policy/sampler_gap"):
        kept["policy/sampler_gap"] = gaps[:1]  # later minibatches see a policy that has moved on
    means = {key: sum(values) / len(values) for key, values in kept.items()}
    if skipped:
        means[SKIPPED] = skipped
    if learner.critic is not None:
        found = explained_variance(buffer.values, buffer.returns, buffer.completions.mask)
        means["value/explained_variance"] = found.item()
    return means


def policy_learns(critic: Role | None, config: Policy, iteration: int) -> bool:
    """Not in the first ``config.critic.warmup`` iterations, where there is a critic."""
    return critic is None or iteration >= config.critic.warmup


def _tried(work: Callable[[], Sums], rows: Buffer, together: Together, met: Callable[[NotFinite], None]) -> Sums:
    """What ``work`` measures, or one step that was left out."""
    try:
        return work()
    except NotFinite as error:
        _forget(together)
        met(error if error.rows else error.named([(int(n), "answer") for n in rows.number]))
        return {SKIPPED: 1.0}


def _tokenwise_step(
    learner: Learner, rows: Buffer, config: Policy, kl_coef: float, runtime: Runtime, fresh: bool, first: First
) -> Sums:
    """``fresh``: the policy still is the one that sampled, so its ratio is 1 and its log-probs are the old ones.

    The sampler's log-probs differ from these by rounding; ``policy/sampler_gap`` is the mean difference (nats).
    A critic on the policy's trunk has its loss added, and its values come from the same pass.
    """
    loss_of, options = LOSSES[config.loss["type"]], _options(config)
    policy, critic = learner.policy, learner.trunk_critic

    def loss(part: Buffer, total: float) -> tuple[Tensor, Sums]:
        c, mask, values = part.completions, part.completions.mask, None
        if critic is None:
            logprobs, entropy = policy.logprobs(c, config.temperature)
        else:
            logprobs, entropy, values = critic.logprobs_and_values(c, config.temperature)
        require_finite(logprobs, "policy", "log-prob")
        old = logprobs.detach() if fresh else part.logprobs
        losses = loss_of(logprobs, old, part.advantages, **options)
        if config.kl.place == "loss":
            losses = losses + kl_coef * kl_loss(logprobs, part.reference, config.kl.estimator)
        require_finite(torch.where(mask, losses, 0.0), "policy", "loss")
        with torch.no_grad():
            ratio, clip = ratios(logprobs, old), options.get("clip", math.inf)
            cut = (ratio > 1 + (options.get("clip_high") or clip)) | (ratio < 1 - clip)
            sums = {"entropy": entropy.sum(), "policy/clip_share": (cut & mask).sum()}
            sums |= {"policy/moved": torch.where(mask, old - logprobs, 0.0).sum()}
            sums |= {"policy/sampler_gap": torch.where(mask, logprobs - part.logprobs, 0.0).abs().sum()}
        whole = reduce(losses, mask, config.reduction, total)
        sums["policy/loss"] = whole
        if values is not None:
            sums["value/loss"] = _value_loss(values, part, config, total)
            whole = whole + config.critic.weight * sums["value/loss"]
        return whole, {key: value.item() for key, value in sums.items()}

    return _policy_metrics(learner, rows, loss, config, runtime, first)


def _pairwise_step(
    learner: Learner, rows: Buffer, config: Policy, kl_coef: float, runtime: Runtime, fresh: bool, first: First
) -> Sums:
    """Rows 2i and 2i + 1 answer the same prompt."""
    loss_of, options = LOSSES[config.loss["type"]], _options(config)
    policy = learner.policy

    def loss(part: Buffer, total: float) -> tuple[Tensor, Sums]:
        mask = part.completions.mask
        logprobs, entropy = policy.logprobs(part.completions, config.temperature)
        require_finite(logprobs, "policy", "log-prob")
        now = masked_sum(logprobs, mask)
        old = now.detach() if fresh else masked_sum(part.logprobs, mask)
        frozen = masked_sum(part.reference, mask)
        first, second = slice(0, None, 2), slice(1, None, 2)
        losses = loss_of(
            *(x[side] for x in (now, old, frozen, part.rewards) for side in (first, second)),
            torch.tensor(kl_coef, device=now.device),
            **options,
        )
        require_finite(losses, "policy", "loss", [(2 * i, "") for i in range(len(losses))])
        with torch.no_grad():
            sums = {"entropy": entropy.sum()}
            sums |= {"policy/moved": (old - now).sum()}
            sums |= {"policy/sampler_gap": torch.where(mask, logprobs - part.logprobs, 0.0).abs().sum()}
        whole = sums["policy/loss"] = losses.sum() / (total / 2)
        return whole, {key: value.item() for key, value in sums.items()}

    return _policy_metrics(learner, rows, loss, config, runtime, first, unit=2)


def _policy_metrics(
    learner: Learner, rows: Buffer, loss: Loss, config: Policy, runtime: Runtime, first: First, unit: int = 1
) -> Sums:
    tokens, together = rows.completions.mask.sum().item(), learner.policy_step
    sums = _accumulate(learner, together, rows, loss, config, runtime, first, unit)
    taken = _step(together, rows, loss, runtime, unit)
    metrics = {key: value if key in WHOLE else value / tokens for key, value in sums.items()}
    if "critic" in taken:
        metrics["value/grad_norm"], _ = taken["critic"]
    norm, rate = taken["policy"]
    return metrics | {"policy/grad_norm": norm, "policy/lr": rate}


def _critic_step(learner: Learner, rows: Buffer, config: Policy, runtime: Runtime) -> Sums:
    critic, together = learner.critic, learner.critic_step
    assert critic is not None

    def loss(part: Buffer, total: float) -> tuple[Tensor, Sums]:
        value = _value_loss(critic.values(part.completions), part, config, total)
        return config.critic.weight * value, {"value/loss": value.item()}

    sums = _accumulate(learner, together, rows, loss, config, runtime)
    norm, _ = _step(together, rows, loss, runtime)["critic"]
    return sums | {"value/grad_norm": norm}


def _value_loss(values: Float[Tensor, "B T"], part: Buffer, config: Policy, total: float) -> Float[Tensor, ""]:
    require_finite(values, "critic", "value")
    losses = value_loss(values, part.values, part.returns, clip=config.critic.clip)
    return reduce(losses, part.completions.mask, config.reduction, total)


def _step(
    together: Together, rows: Buffer, loss: Loss, runtime: Runtime, unit: int = 1
) -> dict[str, tuple[float, float]]:
    """One step of each optimiser, or of none. Returns what :meth:`Optimizer.step` does, by role.

    Raises NotFinite that names the row whose gradient is not, where one alone is to blame.
    """

    def backward(i: int) -> None:
        at = together[role].parameters[0].device
        loss(_trim(rows.rows(slice(unit * i, unit * (i + 1)))).to(at), 1.0)[0].backward()

    taken: dict[str, tuple[float, float]] = {}
    role = ""
    try:
        for role in list(together)[1:]:  # the first says so itself, before anything has moved
            _require_norm(together[role])
        for role in together:
            taken[role] = together[role].step()
    except NotFinite as error:
        mine = runtime.share(list(range(len(rows) // unit)))
        found = together[role].blame(role, error, mine, backward, runtime.gather_all)
        raise found.named([(unit * i, "answer") for i in range(len(rows))]) from None
    return taken


def _require_norm(optimizer: Optimizer) -> None:
    """Raises NotFinite where a step would."""
    norm = nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
    if not torch.isfinite(norm):
        raise NotFinite(Culprit("batch", "gradient norm", str(norm.item())))


def _forget(together: Together) -> None:
    for optimizer in together.values():
        optimizer.forget()


def _ptx(learner: Learner, config: Policy, draw: tuple, runtime: Runtime, budget: int) -> Sums:
    """Leave this process's gradient of ptx * (SFT loss of a batch of demonstrations) on the policy (PPO-max)."""
    objective = SftObjective(learner.policy, pad=0)  # padding is masked: any id will do
    rows = learner.demonstrations
    batch = [rows[i] for i in shuffled(len(rows), *draw)[: config.batch]]
    total = float(sum(map(objective.weight, batch)))
    mine, sums = runtime.share(batch), {"policy/ptx_loss": 0.0}
    for index in micro_batches([objective.size(row) for row in mine], budget):
        try:
            loss, _ = objective.loss([mine[i] for i in index], total)
        except NotFinite as error:
            raise error.among(mine, index) from None
        (config.ptx * loss).backward()
        sums["policy/ptx_loss"] += loss.item()
    return sums


def _accumulate(
    learner: Learner,
    together: Together,
    rows: Buffer,
    loss: Loss,
    config: Policy,
    runtime: Runtime,
    first: First = None,
    unit: int = 1,
) -> Sums:
    """Leave the minibatch's gradient on what steps. Returns the sums of the loss's metrics over processes.

    ``first`` leaves another gradient there before. ``unit`` rows in a row stay in one micro-batch.
    """
    c = rows.completions
    token = config.reduction == "token" and unit == 1
    total = float(c.mask.sum() if token else len(rows))
    lengths = (c.prompt.mask.sum(-1) + c.lengths).view(-1, unit).amax(-1) * unit
    mine = runtime.share(list(range(len(lengths))))

    def work(budget: int) -> Sums:
        with late_gradients():
            sums: Sums = {} if first is None else first(budget)
            for index in micro_batches([int(lengths[i]) for i in mine], budget):
                chosen = [unit * mine[i] + k for i in index for k in range(unit)]
                part = _trim(rows.rows(torch.tensor(chosen))).to(learner.policy.backbone.device)
                try:
                    value, measured = loss(part, total)
                except NotFinite as error:
                    raise error.named([(row, "answer") for row in chosen]) from None
                value.backward()
                for key, number in measured.items():
                    sums[key] = sums.get(key, 0.0) + number
        return sums

    sums = runtime.sum(learner.budget.within(work, partial(_forget, together)))
    runtime.sum_gradients([p for optimizer in together.values() for p in optimizer.parameters])
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
