"""The memory that every stage of a recipe will need, found by rehearsing its heaviest passes with ghost tensors."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rto import config as recipe
from rto import rewards
from rto.batch import Completions
from rto.config import Config, Policy, Supervised, Training
from rto.data.collate import collate_completions, collate_prompts, micro_batches
from rto.data.rows import Rows, scored_from_pairs
from rto.models.memory import Budget
from rto.models.rehearsal import GhostWorkshop, Label, Tally, base_of, heap_of, watch_gradients
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.segment import SegmentScorer
from rto.optim import Optimizer
from rto.pipeline.resolve import guide_stage, scorer_stage, segment_scorers, terms_of
from rto.policy.rollout import prompts_of
from rto.policy.train import reads_values
from rto.policy.update import Buffer, Learner, update
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.preferences.objectives import PairObjective, SftObjective
from rto.preferences.train import evaluate, gradients, objective_for, reads_groups
from rto.rollouts.attention import attention_weights
from rto.rollouts.generate import pick
from rto.rollouts.score import state_values, token_logprobs, token_values
from rto.seeds import shuffled

Heavy = Sequence[Any]  # rows


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

    def __init__(self, config: Config, rows: Rows, runtime: Runtime) -> None:
        self.config, self.rows, self.runtime = config, rows, runtime
        self.heap = heap_of(runtime.device)
        self.start = self.heap.size() if self.heap else 0
        self.base = base_of(config.model)

    def stages(self, stages: Sequence[str]) -> list[StageMemory]:
        """Of the training stages and the evaluation, in order."""
        config, rows = self.config, self.rows
        found = []
        if "sft" in stages:
            found.append(self._sft(config.sft))
        if "prefer" in stages:
            found += [self._prefer(s, guide) for s, guide in config.preferences().items() if guide.checkpoint is None]
        if "reward" in stages:
            found += [
                self._reward(stage, scorer, rows.pairs, scorer.cutoff)
                for stage, scorer in config.rewards().items()
                if scorer.checkpoint is None
            ]
        if "rl" in stages:
            found += [self._rl(name, policy) for name, policy in config.policies().items()]
        if "evaluate" in stages:
            if isinstance(config.evaluation.oracle, recipe.HeldoutOracle):
                found.append(self._reward("oracle", config.reward, rows.oracle_pairs, None))
            found.append(self._evaluate())
        return found

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
        rows: Heavy = self.rows.pairs
        held_out: Heavy = self.rows.test_pairs
        if reads_groups(loss):
            rows, held_out = self.rows.scored or scored_from_pairs(self.rows.pairs), scored_from_pairs(held_out)
        if training.rounds.count > 1 and role.adapter is not None:
            reference = shop.open("follower", "policy", trained=False)
        objective = objective_for(role, loss, _options(training.loss), self.rows.encoder.pad, reference)
        return self._fit(tally, stage, objective, rows, training, held_out)

    def _reward(self, stage: str, training: recipe.Reward, rows: Heavy, cutoff: float | None) -> StageMemory:
        shop, tally = self._shop()
        role = (shop._other(training.model) if training.model else shop).open("scorer", "scorer", trained=True)
        if cutoff is not None:
            role = SegmentScorer(role, shop.reference(), cutoff)
        loss = REWARD_LOSSES[training.loss["type"]]
        objective = PairObjective(role, loss, _options(training.loss), self.rows.encoder.pad)
        return self._fit(tally, stage, objective, rows, training, self.rows.test_pairs)

    def _rl(self, name: str, policy: Policy) -> StageMemory:
        shop, tally = self._shop()
        roles = self._readers(shop, policy)
        learner = shop.open("policy", "policy", trained=True)
        if policy.kl.ema is not None:
            roles["moving"] = shop.open("moving", "policy", trained=False)
        critic = self._critic(shop, policy) if reads_values(policy) else None
        answers = self._answers(policy)
        options = Optimizer(learner.parameters(), policy, policy.lr, 1)
        critic_options = Optimizer(critic.parameters(), policy, policy.critic.lr, 1) if critic else None
        trained = [(learner, "policy", options)] + ([(critic, "critic", critic_options)] if critic else [])
        for role, called, _ in trained:
            watch_gradients(tally, role.parameters(), called)
        budget = Budget(policy.micro_tokens, print)
        update_with = Learner(learner, options, budget, critic, critic_options, self.rows.answers)
        minibatch = self._minibatch(policy)
        with tally:
            for _ in range(2):
                self._sample(tally, learner, policy)
                self._read(tally, roles, learner, critic, answers, policy)
                tally.label = ("pass", "activations")
                self._update(update_with, minibatch, policy)
                for _, called, optimizer in trained:
                    _name_moments(tally, optimizer, called)
            copies = self._copy(tally, [optimizer for _, _, optimizer in trained], policy, self._iterations(policy))
            if copies:
                self._update(update_with, minibatch, policy)
        return self._close(tally, f"rl/{name}", policy, [o for _, _, o in trained], len(list(learner.parameters())))

    def _evaluate(self) -> StageMemory:
        config = self.config
        shop, tally = self._shop()
        roles = {"reference": shop.reference()}
        if isinstance(config.evaluation.oracle, recipe.HeldoutOracle):
            roles["oracle"] = shop.open("oracle", "scorer", trained=False)
        if isinstance(config.evaluation.oracle, recipe.ModelOracle):
            name = config.evaluation.oracle.name
            roles["oracle"] = self._beside(shop, name).open("oracle", "scorer", trained=False, folder=name)
        for policy in config.policies().values():
            for called, role in self._readers(shop, policy, opened=roles).items():
                roles[called] = role
        # Without adapters one policy goes when the next is there: two at a time.
        count = len(config.policies()) + len(config.preferences()) if config.model.lora else 2
        judged = [shop.open(f"policy {i + 1}", "policy", trained=False) for i in range(count)]
        with tally:
            self._sample(tally, judged[-1], config.policy, len(self.rows.test_prompts))
            self._read(tally, roles, judged[-1], None, self._answers(config.policy), config.policy)
        return self._close(tally, "evaluate", config.policy, [], 0)

    # --- their parts ------------------------------------------------------------------------------------

    def _shop(self) -> tuple[GhostWorkshop, Tally]:
        gc.collect()  # what the stage before has left
        rows = self.rows
        shop = GhostWorkshop(self.config.model, self.base, rows.encoder.tokenizer, self.runtime, self.config.seed)
        tally = Tally(shop.vocabulary(), self.heap)
        return shop.begin(tally), tally

    def _beside(self, shop: GhostWorkshop, name: str) -> GhostWorkshop:
        model = recipe.Pretrained(name=name)
        other = GhostWorkshop(model, name, self.rows.encoder.tokenizer, self.runtime, self.config.seed)
        return other.begin(shop.tally)

    def _readers(self, shop: GhostWorkshop, policy: Policy, opened: dict[str, Role] | None = None) -> dict[str, Role]:
        """The frozen roles that a policy's terms read."""
        terms, found = terms_of(policy), dict(opened or {})
        needed = rewards.needs(terms)
        found.setdefault("reference", shop.reference() if "reference" not in found else found["reference"])
        guide, scorer = guide_stage(policy), scorer_stage(policy)
        if "guide" in needed and guide not in found:
            finished = self._full(self.config.preferences()[guide].checkpoint)
            found[guide] = shop.open(guide.replace("/", "_"), "policy", trained=False, folder=finished)
        attended = any(term["type"] == "attention" and term["reader"] == "scorer" for term in rewards.live(terms))
        if (needed & {"scores", "segments"} or attended) and scorer not in found:
            found[scorer] = self._scorer(shop, scorer, trained=False, called=scorer.replace("/", "_"))
        return found

    def _critic(self, shop: GhostWorkshop, policy: Policy) -> Role:
        if policy.critic.init == "reference":
            return shop.open("critic", "scorer", trained=True)
        return self._scorer(shop, scorer_stage(policy), trained=True, called="critic")

    def _scorer(self, shop: GhostWorkshop, stage: str, trained: bool, called: str) -> Role:
        settings = self.config.rewards()[stage]
        finished = self._full(settings.checkpoint)
        if finished is not None:
            return self._beside(shop, finished).open(called, "scorer", trained, finished)
        return (shop._other(settings.model) if settings.model else shop).open(called, "scorer", trained)

    @staticmethod
    def _full(checkpoint: str | None) -> str | None:
        """A finished checkpoint that is a whole model, not an adapter on this recipe's."""
        from rto.models.checkpoint import is_adapter

        return checkpoint if checkpoint is not None and not is_adapter(checkpoint) else None

    def _fit(
        self,
        tally: Tally,
        stage: str,
        objective: Any,
        rows: Heavy,
        training: Supervised,
        held_out: Heavy,
        whole: bool = False,
    ) -> StageMemory:
        role = objective.role
        called = "scorer" if role.head is not None else "policy"
        batch, steps = heaviest(stage, rows, training, objective.size, self.config.seed, self.runtime)
        optimizer = Optimizer(role.parameters(), training, training.lr, steps)
        watch_gradients(tally, optimizer.parameters, called)
        copies: list[Any] = []
        with tally:
            for step in range(min(steps, 2)):
                tally.label = ("pass", "activations")
                gradients(objective, batch, Budget(training.micro_tokens, print), self.runtime)
                optimizer.step()
                _name_moments(tally, optimizer, called)
                if not step:
                    copies += self._copy(tally, [optimizer], training, steps)
            tally.label = ("pass", "activations")
            if held_out:
                size = micro_batches([objective.size(row) for row in held_out], training.reading_tokens)[0]
                evaluate(objective, [held_out[i] for i in size], training, self.runtime)
        del copies
        trained = None if whole else sum(_bytes(p) for p in role.parameters())
        return self._close(tally, stage, training, [optimizer], trained)

    def _copy(self, tally: Tally, optimizers: Sequence[Optimizer], training: Training, steps: int) -> list[Any]:
        """What a checkpoint holds in memory while it is written, where the stage is long enough to write one."""
        checkpoints = self.config.checkpoints
        every = checkpoints.rl_every if isinstance(training, Policy) else checkpoints.every
        if steps <= every:
            return []
        tally.label = ("checkpoint", "copy")
        return [t.detach().to("cpu", copy=True) for o in optimizers for t in (*o.parameters, *o.tensors().values())]

    def _sample(self, tally: Tally, role: Role, policy: Policy, at_most: int | None = None) -> None:
        """The prompts' pass, then the last step of decoding: the cache is at its longest."""
        from transformers import DynamicCache

        limit, asked = self.rows.encoder.max_response, self._asked(policy)
        group = micro_batches([len(ids) + limit for ids in asked], policy.reading_tokens)[0]
        prompts = collate_prompts([asked[i] for i in group[:at_most]], self.rows.encoder.pad)
        tally.label = ("pass", "activations")
        with torch.no_grad():
            backbone = role.activate()
            cache = DynamicCache(config=backbone.network.config)
            backbone.project(backbone.states(prompts.ids, prompts.mask, cache)[:, -1])
            for i, layer in enumerate(cache.layers):
                tally.label = ("pass", "KV cache")
                if layer.keys is not None and limit > 2:
                    rows, heads, _, width = layer.keys.shape
                    cache.update(*(layer.keys.new_empty(rows, heads, limit - 2, width) for _ in range(2)), i)
            for layer in cache.layers:
                for kept in (layer.keys, layer.values):
                    tally.relabel(kept, ("pass", "KV cache"))
            tally.label = ("pass", "activations")
            mask = torch.ones(len(prompts), prompts.ids.shape[1] + max(1, limit - 1), dtype=torch.bool)
            logits = backbone.project(backbone.states(prompts.ids[:, -1:], mask, cache)[:, -1])
            pick(logits, torch.zeros(len(prompts)), policy.temperature, 1.0)

    def _read(
        self,
        tally: Tally,
        roles: dict[str, Role],
        policy: Role,
        critic: Role | None,
        answers: Completions,
        settings: Policy,
    ) -> None:
        tally.label, budget = ("pass", "activations"), settings.reading_tokens
        scorers = [role for role in roles.values() if role.head is not None]
        readers = [role for role in roles.values() if role.head is None]
        token_logprobs(readers[0] if readers else policy, answers, budget, settings.temperature)
        if scorers:
            token_values(scorers[0], answers, budget)
        if critic is not None:
            state_values(critic, answers, budget)
        for term in rewards.live(terms_of(settings)):
            if term["type"] == "attention":
                attention_weights(scorers[0] if scorers else policy, answers, term["reading"], budget)

    def _update(self, learner: Learner, buffer: Buffer, policy: Policy) -> None:
        one = {"rollouts": len(buffer), "batch": len(buffer), "updates": 1}
        update(learner, buffer, policy.model_copy(update=one), policy.kl.coef, policy.critic.warmup, 0, self.runtime)

    def _iterations(self, policy: Policy) -> int:
        wanted = max(1, math.ceil(policy.epochs * len(self.rows.prompts) * policy.group / policy.rollouts))
        return min(wanted, policy.max_steps or wanted)

    def _asked(self, policy: Policy) -> list[list[int]]:
        """Prompts of all iterations (of the first 50, if there are more)."""
        count, prompts = policy.rollouts // policy.group, self.rows.prompts
        asked = [
            row
            for i in range(min(50, self._iterations(policy)))
            for row in prompts_of(prompts, count, i, self.config.seed)
        ]
        return sorted((row.ids for row in asked for _ in range(policy.group)), key=len, reverse=True)[: policy.rollouts]

    def _answers(self, policy: Policy) -> Completions:
        """The heaviest pass without gradients: answers that all reach the limit."""
        limit, asked = self.rows.encoder.max_response, self._asked(policy)
        group = micro_batches([len(ids) + limit for ids in asked], policy.reading_tokens)[0]
        return self._full_answers([asked[i] for i in group])

    def _full_answers(self, asked: list[list[int]]) -> Completions:
        encoder = self.rows.encoder
        limit = [[encoder.end] * encoder.max_response for _ in asked]
        return collate_completions(asked, limit, [False] * len(asked), encoder.pad)

    def _minibatch(self, policy: Policy) -> Buffer:
        """The heaviest minibatch of an update, cut to its first two micro-batches."""
        unit = 2 if policy.group == 2 else 1
        asked = self._asked(policy)[: policy.batch]
        limit = self.rows.encoder.max_response
        sizes = [unit * (len(ids) + limit) for ids in asked[::unit]]
        used = micro_batches(sizes, policy.micro_tokens)[:2]
        rows = [asked[unit * i + k] for group in used for i in group for k in range(unit)]
        answers = self._full_answers(rows)
        zeros, number = torch.zeros(answers.ids.shape), torch.arange(len(rows))
        return Buffer(answers, zeros, zeros, zeros, zeros, zeros, torch.zeros(len(rows)), number // unit, number)

    def _close(
        self, tally: Tally, stage: str, training: Training, optimizers: Sequence[Optimizer], saved: int | None
    ) -> StageMemory:
        state = sum(_bytes(t) for o in optimizers for t in (*o.parameters, *o.tensors().values()))
        mapped = tally.mapped
        holes = max(0, self.heap.size() - self.start + mapped - tally.peak) if self.heap else 0
        parts = {label: size for label, size in tally.at_peak.items() if size}
        if saved is None:
            saved = sum(size for (_, kind), size in parts.items() if kind == "weights")
        return StageMemory(stage, training.micro_tokens, tally.peak, holes, state, saved, parts)


def heaviest(
    stage: str, rows: Heavy, training: Supervised, size: Any, seed: int, runtime: Runtime
) -> tuple[list[Any], int]:
    """The first two micro-batches of the step that holds the most tokens at once, and the number of steps.

    Rows come in the order of :func:`rto.preferences.train.fit`.
    """
    wanted = max(1, round(training.epochs * len(rows)))
    if training.max_steps:
        wanted = min(wanted, training.max_steps * training.batch)
    kind = stage.partition("/")[0]
    order = [i for epoch in range(math.ceil(wanted / len(rows))) for i in shuffled(len(rows), seed, kind, epoch)]
    sizes = [size(row) for row in rows]
    best, most = [], -1
    for start in range(0, wanted, training.batch):
        mine = runtime.share(order[start : min(start + training.batch, wanted)])
        groups = [[mine[i] for i in g] for g in micro_batches([sizes[i] for i in mine], training.micro_tokens)[:2]]
        tokens = max((len(g) * sizes[g[0]] for g in groups), default=0)
        if tokens > most:
            best, most = [rows[i] for g in groups for i in g], tokens
    return best, math.ceil(wanted / training.batch)


def _name_moments(tally: Tally, optimizer: Optimizer, role: str) -> None:
    for moment in optimizer.tensors().values():
        tally.relabel(moment, (role, "optimiser"))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _options(spec: recipe.Spec) -> recipe.Spec:
    return {key: value for key, value in spec.items() if key != "type"}


__all__ = ["Rehearsal", "StageMemory", "heaviest", "segment_scorers"]
