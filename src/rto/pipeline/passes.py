"""The heaviest passes of a stage: which rows go together in them, and the passes of RL that keep no gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rto import rewards
from rto.batch import Completions
from rto.config import Policy, Supervised
from rto.data.chat import Encoder
from rto.data.collate import collate_completions, micro_batches
from rto.data.rows import Rows
from rto.models.mapped import leave
from rto.models.prepacked import copied
from rto.models.rehearsal import Tally
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.trunk import TrunkCritic
from rto.pipeline.resolve import terms_of
from rto.policy import LOSSES, is_pairwise
from rto.policy.rollout import prompts_of
from rto.policy.train import planned
from rto.policy.update import Buffer, Learner, update
from rto.rollouts.attention import attention_weights
from rto.rollouts.generate import read_prompts
from rto.rollouts.pick import pick
from rto.rollouts.score import state_values, token_logprobs, token_values
from rto.seeds import shuffled

STAYING = {"moving", "oracle"}  # the one changes, and the other is no reader of signals
PASS = ("pass", "activations")  # what a pass makes is counted as


def heaviest(
    stage: str, rows: Sequence[Any], training: Supervised, size: Callable[[Any], int], seed: int, runtime: Runtime
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
    best: list[list[Any]] = []
    most = -1
    for start in range(0, wanted, training.batch):
        mine = runtime.share(order[start : min(start + training.batch, wanted)])
        groups = [[mine[i] for i in g] for g in micro_batches([sizes[i] for i in mine], training.micro_tokens)[:2]]
        tokens = max((len(g) * sizes[g[0]] for g in groups), default=0)
        if tokens > most:
            best, most = [[rows[i] for i in g] for g in groups], tokens
    return [row for group in best for row in group], math.ceil(wanted / training.batch)


def asked_prompts(policy: Policy, rows: Rows, seed: int) -> list[list[int]]:
    """As many prompts as an iteration asks, the longest of all that RL asks (of 50 iterations, if there are more)."""
    count = policy.rollouts // policy.group
    asked = [
        row.ids
        for i in range(min(50, planned(policy, len(rows.prompts), critic=False)))
        for row in prompts_of(rows.prompts, count, i, seed)
        for _ in range(policy.group)
    ]
    return sorted(asked, key=len, reverse=True)[: policy.rollouts]


def longest_answers(asked: Sequence[list[int]], encoder: Encoder, budget: int) -> Completions:
    """The first pass of ``budget`` padded tokens over answers that all reach the limit: how long answers will be is not
    known before."""
    group = micro_batches([len(ids) + encoder.max_response for ids in asked], budget)[0]
    return _answered([asked[i] for i in group], encoder)


def heaviest_minibatch(asked: Sequence[list[int]], encoder: Encoder, policy: Policy) -> Buffer:
    """A minibatch of an update whose answers all reach the limit, cut to its first two micro-batches."""
    unit = 2 if is_pairwise(LOSSES[policy.loss["type"]]) else 1
    asked = asked[: policy.batch]
    sizes = [unit * (len(ids) + encoder.max_response) for ids in asked[::unit]]
    used = micro_batches(sizes, policy.micro_tokens)[:2]
    answers = _answered([asked[unit * i + k] for group in used for i in group for k in range(unit)], encoder)
    zeros, number = torch.zeros(answers.ids.shape), torch.arange(len(answers))
    return Buffer(answers, zeros, zeros, zeros, zeros, zeros, zeros[:, 0], number // unit, number)


def _answered(asked: list[list[int]], encoder: Encoder) -> Completions:
    return collate_completions(
        asked, [[encoder.end] * encoder.max_response for _ in asked], [False] * len(asked), encoder.pad
    )


@torch.no_grad()
def sample(tally: Tally, role: Role, asked: Sequence[list[int]], encoder: Encoder, policy: Policy) -> None:
    """The prompts' pass, then the last step of decoding, where the cache is at its longest."""
    limit = encoder.max_response
    groups = micro_batches([len(ids) + limit for ids in asked], policy.reading_tokens)
    prompts = [asked[i] for i in groups[0]]
    tally.label = ("pass", "weights")
    copies = [torch.empty_like(base.weight) for _, base in copied(role, limit * len(groups))]
    tally.label = PASS
    backbone = role.activate()
    states, mask, cache = read_prompts(backbone, prompts, limit, encoder.pad)
    backbone.project(states)
    for i, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)  # layers without attention keep something else
        if keys is None:
            continue
        if limit > 2:
            rows, heads, _, width = keys.shape
            later = keys.new_empty(rows, heads, limit - 2, width)
            cache.update(later, later, i)
        for kept in ("keys", "values"):
            tally.relabel(getattr(layer, kept), ("pass", "KV cache"))
    mask = mask.new_ones(len(prompts), mask.shape[1] + max(1, limit - 1))
    words = torch.full((len(prompts), 1), encoder.end, device=backbone.device)
    logits = backbone.project(backbone.states(words, mask, cache)[:, -1])
    pick(logits, torch.zeros(len(prompts), device=backbone.device), policy.temperature, 1.0)
    del copies


def read(
    tally: Tally, roles: dict[str, Role], policy: Role, critic: Role | None, answers: Completions, settings: Policy
) -> None:
    """One pass of each kind that scoring makes: log-probs, scores, values, attention. What reads the signals leaves
    memory after its turn (:class:`rto.rollouts.signals.Reader`)."""
    tally.label, budget = PASS, settings.reading_tokens
    scorers = [role for role in roles.values() if role.head is not None]
    reference = roles.get("reference", policy)
    token_logprobs(reference, answers, budget, settings.temperature)
    leave(reference, policy)
    if scorers:
        token_values(scorers[0], answers, budget)
    if critic is not None and not isinstance(critic, TrunkCritic):  # its values come with the answers
        state_values(critic, answers, budget)
    for term in rewards.live(terms_of(settings)):
        if term["type"] == "attention":
            attention_weights(scorers[0] if scorers else policy, answers, term["reading"], budget)
    for name, role in roles.items():
        if name not in STAYING:
            leave(role, policy)


def one_update(learner: Learner, buffer: Buffer, policy: Policy, runtime: Runtime) -> None:
    """One optimiser step of policy and critic."""
    once = policy.model_copy(update={"rollouts": len(buffer), "batch": len(buffer), "updates": 1})
    update(learner, buffer, once, policy.kl.coef, policy.critic.warmup, 0, runtime)
