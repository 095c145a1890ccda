"""The one RL loop:

prompts -> answers -> signals -> token rewards -> advantages -> policy and critic updates
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rto import rewards
from rto.advantages import ADVANTAGES, reads
from rto.batch import Completions
from rto.config import Policy
from rto.data.chat import AnswerRow, PromptRow
from rto.finite import NotFinite, require_finite
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime, release_memory
from rto.models.saver import Moving, Saver
from rto.numerics import masked_sum, whiten
from rto.optim import Optimizer
from rto.policy import LOSSES, is_pairwise
from rto.policy.ema import ema_update
from rto.policy.kl import KlController
from rto.policy.metrics import reward_metrics
from rto.policy.rollout import Draw, draw
from rto.policy.scaling import RunningMoments, scale_rewards
from rto.policy.update import SKIPPED, Buffer, Learner, policy_learns, update
from rto.report.log import RunLog
from rto.rollouts.signals import Reader

Truth = Callable[[Sequence[PromptRow], Completions], list[float]]


@dataclass
class RlState:
    """Everything that moves while RL trains."""

    policy: Optimizer
    critic: Optimizer | None
    controller: KlController
    moments: RunningMoments = field(default_factory=RunningMoments)
    iteration: int = 0


def reads_values(config: Policy) -> bool:
    """Whether this policy needs a critic."""
    return not is_pairwise(LOSSES[config.loss["type"]]) and "values" in _wanted(config)


def planned(config: Policy, prompts: int, critic: bool, processes: int = 1, where: str = "policy") -> int:
    """The iterations that ``prompts`` prompts make. ``critic``: one is trained.

    Raises:
        ValueError: none is left to the policy, or a process would have no answer to make.
    """
    iterations = max(1, math.ceil(config.epochs * prompts * config.group / config.rollouts))
    iterations = min(iterations, config.max_steps or iterations)
    if critic and config.critic.warmup >= iterations:
        raise ValueError(
            f"{where}: critic.warmup = {config.critic.warmup} leaves none of the {iterations} iterations to the "
            "policy, which would stay as it is: lower it, or raise epochs or max_steps"
        )
    shared = config.rollouts // (config.group if "greedy" in _wanted(config) else 1)
    if shared < processes:
        raise ValueError(
            f"{where}: an iteration of rollouts = {config.rollouts} has {shared} rows for {processes} processes to "
            "share: raise rollouts, or start fewer processes"
        )
    return iterations


def train(
    stage: str,
    policy: Role,
    critic: Role | None,
    reader: Reader,
    prompts: Sequence[PromptRow],
    config: Policy,
    *,
    seed: int,
    runtime: Runtime,
    log: RunLog,
    progress: Any,
    demonstrations: Sequence[AnswerRow] = (),
    oracle: Truth | None = None,
    saver: Saver | None = None,
) -> RlState:
    """Train ``policy``, and ``critic`` where the estimator reads values, on the rewards of ``reader``'s terms.

    ``demonstrations`` are for ``config.ptx``. ``oracle`` scores answers only to be logged. Prompts, sampling noise
    and minibatches depend on ``seed`` and not on the method, so that methods are compared on the same draws. With a
    ``saver`` the stage goes on where its newest checkpoint left it, and a step that is not finite is left out.

    Raises:
        NotFinite: without a saver, or where the saver gives up; it names role, data row and token.
        ValueError: as :func:`planned` and :func:`~rto.policy.rollout.draw`.
    """
    iterations = planned(config, len(prompts), critic is not None, runtime.world, stage)
    a_step = config.updates * (config.rollouts // config.batch)
    critic_optimizer, warmup = None, 0
    if critic is not None:
        critic_optimizer = Optimizer(critic.parameters(), config, config.critic.lr, iterations * a_step)
        warmup = config.critic.warmup
    steps = (iterations - warmup) * a_step
    state = RlState(
        Optimizer(policy.parameters(), config, config.lr, steps),
        critic_optimizer,
        KlController(config.kl.coef, config.kl.target, config.kl.horizon),
    )
    budget = Budget(config.micro_tokens, progress.say, runtime.gather_all)
    reading = Budget(config.reading_tokens, progress.say, runtime.gather_all, "reading")
    learner = Learner(policy, state.policy, budget, critic, critic_optimizer, demonstrations)
    wants_greedy = "greedy" in _wanted(config)
    moving = _moving(learner, reader.moving, state)
    if saver is not None:
        saver.begin(0, iterations, moving)
    progress.start(stage, iterations, state.iteration)
    seen: Completions | None = None  # the last answers

    def probe() -> None:
        if seen is not None:
            row = seen.rows(slice(0, 1)).to(policy.backbone.device)
            state.policy.probe("policy", lambda: policy.logprobs(row)[0].sum().backward())

    while state.iteration < iterations or not (saver is None or saver.finish(iterations, moving, probe)):
        begun = time.perf_counter()
        drawn = None
        try:
            drawn = draw(policy, critic, reader, prompts, config, state.iteration, seed, runtime, wants_greedy, reading)
            buffer, total, metrics = _rewarded(reader, drawn, config, state)
        except NotFinite as error:
            if saver is None:
                raise
            if saver.met(state.iteration + 1, error, moving):
                continue  # from the last checkpoint
            drawn, metrics = None, {SKIPPED: 1.0}
        if drawn is not None:
            seen = drawn.completions
            if oracle is not None:
                truth = oracle(drawn.asked, drawn.completions)
                metrics["oracle"] = sum(truth) / len(truth)
            if saver is not None:  # before the update: these are the answers of the policy as it is
                saver.consider(state.iteration, moving, metrics)
            release_memory()
            try:
                metrics |= _learn(learner, reader, drawn, buffer, metrics, config, state, seed, runtime, saver, moving)
            except _WentBack:
                continue
            release_memory()
        state.iteration += 1
        if drawn is not None:
            metrics["tokens_per_second"] = drawn.signals.mask.sum().item() / (time.perf_counter() - begun)
            if state.iteration % config.samples_every == 1 % config.samples_every or state.iteration == iterations:
                _log_samples(log, stage, state.iteration, drawn, total, reader)
        log.metrics(stage, state.iteration, metrics)
        runtime.track(stage, state.iteration, metrics)
        progress.update(state.iteration, metrics)
        if saver is not None:
            saver.after(state.iteration, iterations, moving)
    return state


class _WentBack(Exception):
    """Everything was put back to the last checkpoint."""


def _rewarded(
    reader: Reader, drawn: Draw, config: Policy, state: RlState
) -> tuple[Buffer, Float[Tensor, "N T"], dict[str, float]]:
    """An iteration's answers with token rewards and advantages, the token rewards, and their metrics.

    Raises:
        NotFinite: a reward or an advantage.
    """
    signals, coef = drawn.signals, state.controller.coef if config.kl.place == "reward" else 0.0
    _, parts = rewards.total(reader.terms, signals, coef, config.kl.estimator)
    # Summed without KL: to take it off the total would leave its rounding, which a large KL makes large.
    reward = sum((part for name, part in parts.items() if name != "kl"), torch.zeros_like(parts["kl"]))
    moments = replace(state.moments)
    try:
        for name, part in parts.items():
            require_finite(part, f"term {name}", "reward", drawn.places)
        require_finite(reward, "reward terms", "reward", drawn.places)
        if config.reward_scaling is not None or config.reward_clip is not None:
            reward = scale_rewards(reward, signals.mask, moments, config.reward_scaling, config.reward_clip)
        total = reward + parts["kl"]
        advantages, returns = _advantages(config, total, parts["kl"], drawn)
        require_finite(advantages, "estimator", "advantage", drawn.places)
    except NotFinite as error:
        raise error.among(drawn.answers(), range(len(drawn.asked))) from None
    state.moments = moments  # not before: an iteration that is left out leaves nothing behind
    buffer = Buffer(
        drawn.completions,
        signals.logprobs,
        signals.reference if signals.moving is None else signals.moving,
        drawn.values,
        advantages,
        returns,
        masked_sum(reward, signals.mask),
        drawn.group,
        torch.arange(len(drawn.asked)),
    )
    return buffer, total, reward_metrics(reader.terms, signals, total, parts)


def _learn(
    learner: Learner,
    reader: Reader,
    drawn: Draw,
    buffer: Buffer,
    metrics: dict[str, float],
    config: Policy,
    state: RlState,
    seed: int,
    runtime: Runtime,
    saver: Saver | None,
    moving: Moving,
) -> dict[str, float]:
    """The updates of one iteration, and what moves after them. Returns their metrics.

    Raises:
        NotFinite: without a saver, or where the saver gives up.
    """

    def met(error: NotFinite) -> None:
        if saver is None:
            raise error
        if saver.met(state.iteration + 1, error.among(drawn.answers(), range(len(drawn.asked))), moving):
            raise _WentBack

    coef = state.controller.coef
    found = update(learner, buffer, config, coef, state.iteration, seed, runtime, met)
    if policy_learns(learner.critic, config, state.iteration):  # before, KL says nothing of its coefficient
        state.controller.update(metrics["kl" if config.kl.unit == "sequence" else "kl_per_token"], len(drawn.asked))
    if reader.moving is not None:
        assert config.kl.ema is not None
        ema_update(list(reader.moving.parameters()), list(learner.policy.parameters()), config.kl.ema)
    return found | {"kl_coef": coef, "missing": drawn.missing / config.rollouts, **reader.measures(runtime.sum)}


def _moving(learner: Learner, follower: Role | None, state: RlState) -> Moving:
    """What a checkpoint of RL holds."""
    roles = {"policy": learner.policy, "critic": learner.critic, "moving": follower}
    optimizers = {"policy": learner.policy_optimizer, "critic": learner.critic_optimizer}

    def numbers() -> dict[str, Any]:
        return {"iteration": state.iteration, "kl_coef": state.controller.coef, "moments": asdict(state.moments)}

    def set_numbers(saved: dict[str, Any]) -> None:
        state.iteration, state.controller.coef = saved["iteration"], saved["kl_coef"]
        state.moments = RunningMoments(**saved["moments"])

    return Moving(
        {name: role.parameters() for name, role in roles.items() if role is not None},
        {name: optimizer for name, optimizer in optimizers.items() if optimizer is not None},
        numbers,
        set_numbers,
    )


def _wanted(config: Policy) -> tuple[str, ...]:
    """What the estimator reads; a pairwise loss has none."""
    if is_pairwise(LOSSES[config.loss["type"]]):
        return ()
    return reads(ADVANTAGES[config.advantage["type"]].function)


def _advantages(
    config: Policy, total: Float[Tensor, "N T"], penalty: Float[Tensor, "N T"], drawn: Draw
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """Zero for a pairwise loss, which compares whole answers."""
    mask = drawn.signals.mask
    if is_pairwise(LOSSES[config.loss["type"]]):
        return total.new_zeros(total.shape), total.new_zeros(total.shape)
    estimator = ADVANTAGES[config.advantage["type"]]
    at_hand = {"rewards": total, "values": drawn.values, "mask": mask, "group": drawn.group}
    at_hand |= {"penalty": penalty, "greedy": drawn.greedy}
    options = {key: value for key, value in config.advantage.items() if key != "type"}
    read = {name: at_hand[name] for name in reads(estimator.function)}
    advantages, returns = estimator.function(**read, **options)
    if estimator.whiten if config.whiten is None else config.whiten:
        advantages = whiten(advantages, mask)
    if config.advantage_clip is not None:
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
    return advantages, returns


def _log_samples(
    log: RunLog, stage: str, iteration: int, drawn: Draw, total: Float[Tensor, "N T"], reader: Reader
) -> None:
    c = drawn.completions
    for i in range(min(2, len(drawn.asked))):
        record: dict[str, Any] = {"prompt": drawn.asked[i].text}
        record |= {"answer": reader.encoder.decode(c.ids[i][c.mask[i]].tolist())}
        record |= {"score": masked_sum(total[i : i + 1], c.mask[i : i + 1]).item()}
        log.sample(stage, iteration, record | {"finished": c.finished[i].item()})
