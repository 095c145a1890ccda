"""What the metrics of a run say is going wrong: the rules of :mod:`rto.report.symptoms` with causes and remedies.

It reads rows of ``metrics.jsonl`` and nothing else: no models and no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from rto.report import symptoms
from rto.report.symptoms import Curves, Rows, Sign

KEPT = 120  # rows of a stage that curves are read from: its first and last 30, and others evenly between
LOOKS = 100  # moments of a stage at which :func:`diagnose` asks the rules


@dataclass(frozen=True)
class Finding:
    """One thing that goes wrong in one stage, from step ``first`` to ``last``, with its numbers."""

    rule: str
    severity: Literal["warn", "fail"]
    stage: str
    first: int
    last: int
    evidence: dict[str, float]
    cause: str
    remedy: str

    @property
    def steps(self) -> str:
        return f"step {self.last}" if self.first == self.last else f"steps {self.first} to {self.last}"

    def __str__(self) -> str:
        """One line, as a warning while a run trains."""
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"{self.severity}: {self.rule} in {self.stage}, {self.steps}: {numbers}. {self.cause} {self.remedy}"


class Rule(NamedTuple):
    see: Callable[[Curves], Sign | None]
    cause: str
    remedy: str


RULES: dict[str, Rule] = {
    "kl-mismatch": Rule(
        symptoms.kl_mismatch,
        "Policy and reference do not score the same tokens in the same way.",
        "Check that policy.temperature and model.dtype are those of sampling and of every role, and that the "
        "reference is the model the policy started from.",
    ),
    "sampler-gap": Rule(
        symptoms.sampler_gap,
        "The log-probs recorded while sampling are not those of training, so ratios and KL are wrong.",
        "Set model.dtype = 'float32'; see to policy.temperature and to anything that changes the sampler's logits.",
    ),
    "kl-explosion": Rule(
        symptoms.kl_explosion,
        "The policy writes what the reference finds very unlikely: the step is too large or the reward is hacked.",
        "Raise policy.kl.coef (or set policy.kl.controller = 'adaptive' with a target), lower policy.lr or updates.",
    ),
    "step-size": Rule(
        symptoms.step_size,
        "One iteration moves the policy far from the one that sampled.",
        "Lower policy.lr or policy.updates, or raise policy.batch.",
    ),
    "clip-share": Rule(
        symptoms.clip_share,
        "Most of what an update would change is clipped away, or the ratio clip is very narrow.",
        "Lower policy.lr or policy.updates, or widen policy.loss.clip.",
    ),
    "entropy-collapse": Rule(
        symptoms.entropy_collapse,
        "The policy says nearly the same thing to every prompt.",
        "Raise policy.kl.coef, lower policy.lr; read samples.jsonl for what the reward pays for.",
    ),
    "entropy-explosion": Rule(
        symptoms.entropy_explosion,
        "The policy turns to noise: the step is too large or the KL penalty is too weak.",
        "Lower policy.lr, raise policy.kl.coef; check that the log-probs agree (policy/sampler_gap).",
    ),
    "length-hacking": Rule(
        symptoms.length_hacking,
        "Longer answers are paid more, not better ones.",
        "Normalise by length (rewards type 'segment' with length_norm = true), add a 'length' or 'missing_eos' "
        "penalty, raise policy.kl.coef, or train the scorer on pairs of like length.",
    ),
    "reward-hacking": Rule(
        symptoms.reward_hacking,
        "The policy has found what the reward pays for and the oracle does not.",
        "Keep an earlier checkpoint (policy.max_steps), raise policy.kl.coef, train a better scorer ([reward]).",
    ),
    "reward-falls": Rule(
        symptoms.reward_falls,
        "The policy gets worse at its own reward.",
        "Lower policy.lr; check the signs of the terms' scales, and policy.advantage.",
    ),
    "critic-not-learning": Rule(
        symptoms.critic_not_learning,
        "The critic predicts returns no better than a constant, so advantages are noise.",
        "Raise policy.critic.lr, set policy.critic.warmup, or take an estimator without a critic (policy.advantage).",
    ),
    "dense-dominates": Rule(
        symptoms.dense_dominates,
        "The dense terms drown the scorer: the policy follows them alone.",
        "Lower the dense term's scale or set its clip, or raise the scale of 'terminal' in policy.rewards.",
    ),
    "kl-dominates": Rule(
        symptoms.kl_dominates,
        "Most of the reward is the KL penalty: the policy is paid to stay the reference.",
        "Lower policy.kl.coef, or raise the scales of the terms.",
    ),
    "term-saturated": Rule(
        symptoms.term_saturated,
        "The clip and not the model behind the term sets the reward of most tokens.",
        "Raise the term's clip or lower its scale in policy.rewards.",
    ),
    "truncated": Rule(
        symptoms.truncated,
        "Answers reach data.max_response before they end, and what is cut off is not judged.",
        "Raise data.max_response, add a 'missing_eos' penalty, or train [sft] on answers that end.",
    ),
    "missing-rewards": Rule(
        symptoms.missing_rewards,
        "A function or a server gives no reward for some answers, and they are dropped.",
        "See to the function or the server; policy.max_missing says how many stop the run.",
    ),
    "left-out-steps": Rule(
        symptoms.left_out,
        "Losses, gradients or outputs of a model were not finite; those steps were not applied.",
        "Read incidents/*.json (role, data row, token): a broken row, weights that overflow (dtype), a large lr.",
    ),
    "at-chance": Rule(
        symptoms.at_chance,
        "The model does not tell chosen from rejected answers; well below one half the labels may be swapped.",
        "Check the pairs (data.pairs), raise lr or epochs of this stage, or take a larger model.",
    ),
    "overfit": Rule(
        symptoms.overfit,
        "The model knows its training pairs by heart.",
        "Fewer epochs or a smaller lr in this stage, more pairs, weight_decay above 0.",
    ),
    "loss-rises": Rule(
        symptoms.loss_rises,
        "Training diverges.",
        "Lower this stage's lr, or raise its warmup.",
    ),
}


def live(rows: Rows) -> list[Finding]:
    """What the rules say now of the stage of the last row. ``rows`` may hold earlier stages; a few milliseconds."""
    if not rows:
        return []
    stage = rows[-1]["stage"]
    whole = [row for row in rows if row["stage"] == stage]
    curves = Curves(_thinned(whole), whole)
    found = []
    for name, rule in RULES.items():
        sign = rule.see(curves)
        if sign is not None:
            severity: Literal["warn", "fail"] = "fail" if sign.fail else "warn"
            last = rows[-1]["step"]
            found.append(Finding(name, severity, stage, sign.first, last, sign.evidence, rule.cause, rule.remedy))
    return found


def diagnose(rows: Rows) -> list[Finding]:
    """Everything that :func:`live` says of the stages' last rows, and would have said on the way.

    A rule gives one finding a stage, from the first step that showed it to the last, with the numbers of the last
    time at its worst severity.
    """
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    found = []
    for seen in stages.values():
        kept: dict[str, Finding] = {}
        looks = sorted({math.ceil(len(seen) * k / LOOKS) for k in range(1, LOOKS + 1)})
        for count in looks:
            for new in live(seen[:count]):
                old = kept.get(new.rule, new)
                worse = old if (old.severity, new.severity) == ("fail", "warn") else new
                kept[new.rule] = replace(worse, first=min(old.first, new.first), last=new.last)
        found += sorted(kept.values(), key=lambda finding: (finding.severity, finding.first))
    return found


def _thinned(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most :data:`KEPT` rows: both ends whole, so that their windows are those of all rows."""
    if len(rows) <= KEPT:
        return rows
    between = KEPT - 60
    middle = [rows[30 + (len(rows) - 60) * k // between] for k in range(between)]
    return [*rows[:30], *middle, *rows[-30:]]
