"""The memory that every stage of a recipe will need, found by rehearsing its heaviest passes with ghost tensors."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from rto import config as recipe
from rto import rewards
from rto.config import Config, Policy, Supervised, Training
from rto.data.collate import micro_batches
from rto.data.rows import Rows, scored_from_pairs
from rto.models.checkpoint import is_adapter
from rto.models.load import opened_as
from rto.models.memory import Budget
from rto.models.rehearsal import GhostWorkshop, Glibc, Label, Tally, base_of, watch_gradients
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.segment import SegmentScorer
from rto.models.trunk import TrunkCritic
from rto.optim import Optimizer
from rto.pipeline.passes import (
    PASS,
    asked_prompts,
    heaviest,
    heaviest_minibatch,
    longest_answers,
    one_update,
    read,
    sample,
)
from rto.pipeline.resolve import guide_stage, scorer_stage, terms_of
from rto.policy.train import planned, reads_values
from rto.policy.update import Learner
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.preferences.groups import pair_scores
from rto.preferences.objectives import PairObjective, SftObjective
from rto.preferences.train import evaluate, gradients, objective_for, reads_groups


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage: ``parts`` by (role, kind) at the moment when most is alive, their sum ``alive``, what the
    allocator holds beyond that (``holes``) and ``state``, one checkpoint."""

    stage: str
    micro_tokens: int
    alive: int
    holes: int
    state: int
    saved: int  # of the model that the stage leaves
    parts: dict[Label, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.alive + self.holes


class Rehearsal:
    """One stage after the other, as ``rto run`` does them in one process."""

    def __init__(self, config: Config, rows: Rows, runtime: Runtime, heap: Glibc | None) -> None:
        self.config, self.rows, self.runtime, self.heap = config, rows, runtime, heap
        self.start = heap.size() if heap else 0
        self.base = base_of(config.model)
        self.known: dict[tuple[Any, ...], StageMemory] = {}  # stages that differ in what costs no memory need one try

    def stages(self, stages: Sequence[str]) -> dict[str, Callable[[], StageMemory]]:
        """The training stages among them and the evaluation, by name and in order, to be called in order."""
        config, rows = self.config, self.rows
        found: dict[str, Callable[[], StageMemory]] = {}
        if "sft" in stages:
            found["sft"] = partial(self._sft, config.sft)
        if "prefer" in stages:
            guides = {stage: guide for stage, guide in config.preferences().items() if guide.checkpoint is None}
            found |= {stage: partial(self._prefer, stage, guide) for stage, guide in guides.items()}
        if "reward" in stages:
            scorers = {stage: scorer for stage, scorer in config.rewards().items() if scorer.checkpoint is None}
            for stage, scorer in scorers.items():
                work = partial(self._reward, stage, scorer, rows.pairs, scorer.cutoff)
                found[stage] = partial(self._once, stage, self._size(scorer, scorer.cutoff), work)
        if "rl" in stages:
            for name, policy in config.policies().items():
                found[f"rl/{name}"] = partial(self._once, f"rl/{name}", _cost(policy), partial(self._rl, name, policy))
        if "evaluate" in stages:
            if isinstance(config.evaluation.oracle, recipe.HeldoutOracle):
                work = partial(self._reward, "oracle", config.reward, rows.oracle_pairs, None)
                found["oracle"] = partial(self._once, "oracle", self._size(config.reward, None), work)
            found["evaluate"] = self._evaluate
        return found

    def _once(self, stage: str, cost: tuple[Any, ...], work: Callable[[], StageMemory]) -> StageMemory:
        if cost not in self.known:
            self.known[cost] = work()
        return replace(self.known[cost], stage=stage)

    @staticmethod
    def _size(training: recipe.Reward, cutoff: float | None) -> tuple[Any, ...]:
        """What the memory of a scorer's training depends on, its rows aside, which fill the same micro-batches."""
        steps = training.max_steps or math.inf
        model = training.model and training.model.model_dump_json()  # lora.targets may be a list, which no key can hold
        read = cutoff is None, cutoff == 0
        return (model, *read, training.micro_tokens, training.batch, training.optimizer, steps > 1)

    # --- stages -----------------------------------------------------------------------------------------

    def _sft(self, training: Supervised) -> StageMemory:
        shop, tally = self._shop()
        shop.fresh = not self.base
        role = shop.open("policy", "policy", trained=True)
        objective = SftObjective(role, self.rows.encoder.pad)
        return self._fit(tally, "sft", objective, self.rows.answers, training, (), whole=True)

    def _prefer(self, stage: str, training: recipe.Prefer) -> StageMemory:
        shop, tally = self._shop()
        role, reference = shop.open("policy", "policy", trained=True), shop.reference()
        loss = PREFERENCE_LOSSES[training.loss["type"]]
        rows: Sequence[Any] = self.rows.pairs
        held_out: Sequence[Any] = self.rows.test_pairs
        if reads_groups(loss):
            scores = pair_scores(loss, _options(training.loss))
            rows = self.rows.scored or scored_from_pairs(self.rows.pairs, *scores)
            held_out = scored_from_pairs(self.rows.test_pairs, *scores)
        if training.rounds.count > 1 and role.adapter is not None:
            reference = shop.open("follower", "policy", trained=False)
        objective = objective_for(role, loss, _options(training.loss), self.rows.encoder.pad, reference)
        return self._fit(tally, stage, objective, rows, training, held_out)

    def _reward(self, stage: str, training: recipe.Reward, rows: Sequence[Any], cutoff: float | None) -> StageMemory:
        shop, tally = self._shop()
        role = (shop._other(training.model) if training.model else shop).open("scorer", "scorer", trained=True)
        if cutoff is not None:
            role = SegmentScorer(role, shop.reference() if cutoff else None, cutoff)
        loss = REWARD_LOSSES[training.loss["type"]]
        objective = PairObjective(role, loss, _options(training.loss), self.rows.encoder.pad)
        return self._fit(tally, stage, objective, rows, training, self.rows.test_pairs)

    def _rl(self, name: str, policy: Policy) -> StageMemory:
        shop, tally = self._shop()
        roles = self._readers(shop, policy)
        learner = shop.open("policy", "policy", trained=True)
        if policy.kl.ema is not None:
            roles["moving"] = shop.open("moving", "policy", trained=False)
        critic = self._critic(shop, policy, learner) if reads_values(policy) else None
        asked = asked_prompts(policy, self.rows, self.config.seed)
        answers = longest_answers(asked, self.rows.encoder, policy.reading_tokens)
        optimizers = {"policy": Optimizer(learner.parameters(), policy, policy.lr, 1)}
        if critic is not None:
            optimizers["critic"] = Optimizer(critic.parameters(), policy, policy.critic.lr, 1)
        for called, optimizer in optimizers.items():
            watch_gradients(tally, optimizer.parameters, called)
        budget = Budget(policy.micro_tokens, print)
        update_with = Learner(
            learner, optimizers["policy"], budget, critic, optimizers.get("critic"), self.rows.answers
        )
        minibatch = heaviest_minibatch(asked, self.rows.encoder, policy)
        with tally:
            for _ in range(2):  # at the second there are moments
                sample(tally, learner, asked, self.rows.encoder, policy)
                read(tally, roles, learner, critic, answers, policy)
                tally.label = PASS
                one_update(update_with, minibatch, policy, self.runtime)
                for called, optimizer in optimizers.items():
                    _name_moments(tally, optimizer, called)
            copies = self._copy(
                tally, optimizers.values(), policy, planned(policy, len(self.rows.prompts), critic=False)
            )
            if copies:
                tally.label = PASS
                one_update(update_with, minibatch, policy, self.runtime)
        return self._close(tally, f"rl/{name}", policy, optimizers.values(), _sum(learner.parameters()))

    def _evaluate(self) -> StageMemory:
        config = self.config
        shop, tally = self._shop()
        roles = {"reference": shop.reference()}
        if isinstance(config.evaluation.oracle, recipe.HeldoutOracle):
            roles["oracle"] = shop.open("oracle", "scorer", trained=False)
        if isinstance(config.evaluation.oracle, recipe.ModelOracle):
            name, trust = config.evaluation.oracle.name, config.evaluation.oracle.trust_remote_code
            own = shop._other(opened_as(name, config.model, trust))
            roles["oracle"] = own.open("oracle", "scorer", trained=False, folder=name)
        for each in config.policies().values():
            roles = self._readers(shop, each, roles)
        # Without adapters one policy goes when the next is there: two at a time.
        count = len(config.policies()) + len(config.preferences()) if config.model.lora else 2
        judged = [shop.open(f"policy {i + 1}", "policy", trained=False) for i in range(count)]
        encoder, policy = self.rows.encoder, config.policy
        asked = [row.ids for row in self.rows.test_prompts[: config.evaluation.prompts]]
        asked = sorted(asked * config.evaluation.samples, key=len, reverse=True)
        with tally:
            sample(tally, judged[-1], asked, encoder, policy)
            read(tally, roles, judged[-1], None, longest_answers(asked, encoder, policy.reading_tokens), policy)
        return self._close(tally, "evaluate", config.policy, [], 0)

    # --- their parts ------------------------------------------------------------------------------------

    def _shop(self) -> tuple[GhostWorkshop, Tally]:
        gc.collect()  # what the stage before has left
        rows = self.rows
        shop = GhostWorkshop(self.config.model, self.base, rows.encoder.tokenizer, self.runtime, self.config.seed)
        tally = Tally(shop.vocabulary(), self.heap)
        return shop.begin(tally), tally

    def _readers(self, shop: GhostWorkshop, policy: Policy, opened: dict[str, Role] | None = None) -> dict[str, Role]:
        """The frozen roles that a policy's terms read."""
        terms = terms_of(policy)
        needed, found = rewards.needs(terms), dict(opened or {"reference": shop.reference()})
        guide, scorer = guide_stage(policy), scorer_stage(policy)
        if "guide" in needed and guide not in found:
            finished = self._full(self.config.preferences()[guide].checkpoint)
            found[guide] = shop.open(guide.replace("/", "_"), "policy", trained=False, folder=finished)
        attended = any(term["type"] == "attention" and term["reader"] == "scorer" for term in rewards.live(terms))
        if (needed & {"scores", "segments"} or attended) and scorer not in found:
            found[scorer] = self._scorer(shop, scorer, trained=False, called=scorer.replace("/", "_"))
        return found

    def _critic(self, shop: GhostWorkshop, policy: Policy, learner: Role) -> Role:
        if policy.critic.trunk != "own":
            critic, shop.role = TrunkCritic(learner, 0, detached=policy.critic.trunk == "detached"), "critic"
            shop._ghost(critic.head, "weights", mapped=False)
            return critic
        if policy.critic.init == "reference":
            return shop.open("critic", "scorer", trained=True)
        return self._scorer(shop, scorer_stage(policy), trained=True, called="critic")

    def _scorer(self, shop: GhostWorkshop, stage: str, trained: bool, called: str) -> Role:
        settings = self.config.rewards()[stage]
        finished, own = self._full(settings.checkpoint), shop._other(settings.model) if settings.model else shop
        return own.open(called, "scorer", trained, finished)

    @staticmethod
    def _full(checkpoint: str | None) -> str | None:
        """A finished checkpoint that is a whole model, not an adapter on this recipe's."""
        return checkpoint if checkpoint is not None and not is_adapter(checkpoint) else None

    def _fit(
        self,
        tally: Tally,
        stage: str,
        objective: Any,
        rows: Sequence[Any],
        training: Supervised,
        held_out: Sequence[Any],
        whole: bool = False,
    ) -> StageMemory:
        role = objective.role
        called = "scorer" if role.head is not None else "policy"
        with tally:  # an objective may try out what its model can do
            batch, steps = heaviest(stage, rows, training, objective.size, self.config.seed, self.runtime)
        optimizer = Optimizer(role.parameters(), training, training.lr, steps)
        watch_gradients(tally, optimizer.parameters, called)
        copies: list[Any] = []
        with tally:
            for step in range(min(steps, 2)):  # at the second there are moments
                tally.label = PASS
                gradients(objective, batch, Budget(training.micro_tokens, print), self.runtime, optimizer.forget)
                optimizer.step()
                _name_moments(tally, optimizer, called)
                if not step:
                    copies += self._copy(tally, [optimizer], training, steps)
            tally.label = PASS
            if held_out:
                size = micro_batches([objective.size(row) for row in held_out], training.reading_tokens)[0]
                evaluate(objective, [held_out[i] for i in size], training, self.runtime)
        del copies
        trained = None if whole else _sum(role.parameters())
        return self._close(tally, stage, training, [optimizer], trained)

    def _copy(self, tally: Tally, optimizers: Iterable[Optimizer], training: Training, steps: int) -> list[Any]:
        """What a checkpoint holds in memory while it is written, where the stage is long enough to write one."""
        checkpoints = self.config.checkpoints
        every = checkpoints.rl_every if isinstance(training, Policy) else checkpoints.every
        if steps <= every:
            return []
        tally.label = ("checkpoint", "copy")
        return [t.detach().to("cpu", copy=True) for o in optimizers for t in (*o.parameters, *o.tensors().values())]

    def _close(
        self, tally: Tally, stage: str, training: Training, optimizers: Iterable[Optimizer], saved: int | None
    ) -> StageMemory:
        state = sum(_sum([*o.parameters, *o.tensors().values()]) for o in optimizers)
        outside = tally.peak - tally.mapped_at_peak
        holes = max(0, self.heap.size() - self.start - outside) if self.heap else 0
        parts = {label: size for label, size in tally.at_peak.items() if size}
        if saved is None:
            saved = sum(size for (_, kind), size in parts.items() if kind == "weights")
        return StageMemory(stage, training.micro_tokens, tally.peak, holes, state, saved, parts)


def _name_moments(tally: Tally, optimizer: Optimizer, role: str) -> None:
    for moment in optimizer.tensors().values():
        tally.relabel(moment, (role, "optimiser"))


def _cost(policy: Policy) -> tuple[Any, ...]:
    """What the memory of RL depends on."""
    terms = terms_of(policy)
    read = tuple(term["reader"] for term in rewards.live(terms) if term["type"] == "attention")
    stages = (
        guide_stage(policy),
        scorer_stage(policy),
        policy.critic.init,
        policy.critic.trunk,
        reads_values(policy),
        policy.kl.ema is None,
    )
    steps = (policy.epochs, policy.max_steps, policy.rollouts, policy.batch, policy.group, policy.optimizer)
    needed = frozenset(rewards.needs(terms))
    return (needed, read, *stages, *steps, policy.micro_tokens, policy.ptx > 0, policy.loss["type"], policy.kl.place)


def _sum(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _options(spec: recipe.Spec) -> recipe.Spec:
    return {key: value for key, value in spec.items() if key != "type"}
