"""The policies of a run against each other on held-out prompts: answers, oracle scores, win rates, token credit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rto import rewards
from rto.batch import Completions, Signals
from rto.config import Evaluation, Spec
from rto.data.chat import Encoder, PromptRow
from rto.data.collate import collate_prompts
from rto.evaluation.credit import credit_report
from rto.evaluation.winrate import compare, without_nan
from rto.models.checkpoint import ScorerNotes
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.numerics import masked_sum
from rto.rollouts.generate import generate
from rto.rollouts.score import sentence_scores, token_logprobs

Oracle = Callable[[Sequence[PromptRow], Completions], list[float]]  # a prompt for each answer
Truth = Callable[[str, list[str], bool], list[float]]  # prompt, tokens, finished -> true reward of each token


@dataclass(frozen=True)
class Answers:
    """One policy's answers, row for row with the prompts asked (each prompt ``samples`` times in a row)."""

    completions: Completions
    texts: list[str]


def answer(
    role: Role,
    prompts: Sequence[PromptRow],
    config: Evaluation,
    encoder: Encoder,
    seed: int,
    budget: int,
    runtime: Runtime,
) -> Answers:
    """``config.samples`` answers to each prompt. Row seeds are the same for every policy."""
    mine = runtime.share([(row, k) for row in prompts for k in range(config.samples)])
    own = generate(
        role,
        [row.ids for row, _ in mine],
        [("evaluation", row.row, k) for row, k in mine],
        seed=seed,
        limit=encoder.max_response,
        end=encoder.end,
        pad=encoder.pad,
        temperature=config.temperature,
        top_p=config.top_p,
        budget=budget,
    ).completions
    parts = runtime.gather_rows({"ids": own.ids, "mask": own.mask, "finished": own.finished})
    asked = [row.ids for row in prompts for _ in range(config.samples)]
    completions = Completions(collate_prompts(asked, encoder.pad), parts["ids"], parts["mask"], parts["finished"])
    return Answers(
        completions, [encoder.decode(i[m].tolist()) for i, m in zip(parts["ids"], parts["mask"], strict=True)]
    )


def compare_policies(
    answers: dict[str, Answers],
    scores: dict[str, list[float]],
    kls: dict[str, list[float]],
    prompts: Sequence[PromptRow],
    config: Evaluation,
    seed: int,
) -> dict[str, Any]:
    """Win-rate matrix with paired bootstrap intervals over prompts, mean score, length and KL; JSON-ready."""
    shape = (len(prompts), config.samples)
    lengths = {name: np.reshape(a.completions.lengths.numpy(), shape) for name, a in answers.items()}
    result = compare(
        {name: np.reshape(score, shape) for name, score in scores.items()},
        rounds=config.bootstrap,
        seed=seed,
        lengths=lengths,
        kls={name: np.reshape(kl, shape) for name, kl in kls.items()},
    )
    names = list(result.names)

    def matrix(read: Callable[[Any], float]) -> list[list[float]]:
        return [[0.5 if a == b else read(result.pair(a, b).win_rate) for b in names] for a in names]

    policies = {
        p.name: {
            "score": p.score.estimate,
            "low": p.score.low,
            "high": p.score.high,
            "length": p.length,
            "kl": p.kl,
            "finished": answers[p.name].completions.finished.float().mean().item(),
            "n": p.n,
        }
        for p in result.policies
    }
    pairs = [
        {
            "a": p.a,
            "b": p.b,
            "win_rate": p.win_rate.estimate,
            "win_low": p.win_rate.low,
            "win_high": p.win_rate.high,
            "difference": p.difference.estimate,
            "difference_low": p.difference.low,
            "difference_high": p.difference.high,
            **{key: getattr(p, key) for key in ("wins", "ties", "losses", "n", "missing", "p", "p_holm", "verdict")},
        }
        for p in result.pairs
    ]
    samples = [
        {
            "prompt": row.text,
            "answers": {
                name: {"text": answers[name].texts[i * config.samples], "score": scores[name][i * config.samples]}
                for name in names
            },
        }
        for i, row in enumerate(prompts[:20])
    ]
    comparison = {
        "names": names,
        "policies": policies,
        "matrix": matrix(lambda interval: interval.estimate),
        "matrix_low": matrix(lambda interval: interval.low),
        "matrix_high": matrix(lambda interval: interval.high),
        "pairs": pairs,
    }
    return without_nan({"comparison": comparison, "samples": samples})


def kl_to_reference(role: Role, reference: Role, answers: Answers, budget: int) -> list[float]:
    """log pi - log pi_ref of each answer, nats (k1)."""
    if role is reference:
        return [0.0] * len(answers.completions)
    ours = token_logprobs(role, answers.completions, budget)
    return masked_sum(ours - token_logprobs(reference, answers.completions, budget), answers.completions.mask).tolist()


def signals_of(
    completions: Completions,
    policy: Role,
    reference: Role,
    guide: Role | None,
    scorer: Role | None,
    notes: ScorerNotes | None,
    budget: int,
) -> Signals:
    """What reward terms read, for answers that are already there."""
    frozen = token_logprobs(reference, completions, budget)
    scores = None
    if scorer is not None:
        scores = sentence_scores(scorer, completions, budget)
        scores = scores if notes is None else (scores - notes.mean) / notes.std
    return Signals(
        completions.mask,
        completions.finished,
        frozen if policy is reference else token_logprobs(policy, completions, budget),
        frozen,
        guide=None if guide is None else token_logprobs(guide, completions, budget),
        scores=scores,
    )


def credit_views(
    policy: str,
    prompts: Sequence[PromptRow],
    completions: Completions,
    signals: Signals,
    terms: list[Spec],
    kl_coef: float,
    encoder: Encoder,
    truth: Truth | None,
) -> list[dict[str, Any]]:
    """Answers token by token: each term, the total, and the true reward where it is known."""
    total, parts = rewards.total(terms, signals, kl_coef)
    views = []
    for i in range(len(completions)):
        mask = completions.mask[i]
        tokens = tokens_of(encoder, completions, i)
        shown = {**parts, "total": total} if len(parts) > 1 else parts
        views.append(
            {
                "policy": policy,
                "prompt": prompts[i].text,
                "tokens": tokens,
                "terms": {name: part[i][mask].tolist() for name, part in shown.items()},
                "truth": truth(prompts[i].text, tokens, bool(completions.finished[i])) if truth else None,
            }
        )
    return views


def credit_table(
    methods: dict[str, list[Spec]],
    prompts: Sequence[PromptRow],
    completions: Completions,
    signals: Signals,
    encoder: Encoder,
    truth: Truth,
    seed: int,
) -> dict[str, Any]:
    """How well each method's token rewards (without the KL penalty) find the true ones, on the same answers."""
    true = np.zeros(completions.ids.shape)
    for i, row in enumerate(prompts):
        tokens = tokens_of(encoder, completions, i)
        true[i, : len(tokens)] = truth(row.text, tokens, bool(completions.finished[i]))
    table = {}
    for name, terms in methods.items():
        total, _ = rewards.total(terms, signals, 0.0)
        found = credit_report(total.numpy(), true, completions.mask.numpy(), seed=seed)
        table[name] = {
            "auc": found["auc"]["estimate"],
            "auc_low": found["auc"]["low"],
            "auc_high": found["auc"]["high"],
            "spearman": found["spearman"]["estimate"],
            "within": found["spearman_within"]["estimate"],
            "n": found["tokens"],
        }
    return without_nan(table)


def judge_by(scorer: Role, budget: int) -> Oracle:
    """A scorer as oracle: its raw score."""
    return lambda prompts, completions: sentence_scores(scorer, completions, budget).tolist()


def judge_by_truth(truth: Truth, encoder: Encoder) -> Oracle:
    """The sum of the known token rewards as oracle."""

    def score(prompts: Sequence[PromptRow], completions: Completions) -> list[float]:
        return [
            sum(truth(row.text, tokens_of(encoder, completions, i), bool(completions.finished[i])))
            for i, row in enumerate(prompts)
        ]

    return score


def tokens_of(encoder: Encoder, completions: Completions, row: int) -> list[str]:
    """The text of each response token, special ones included."""
    ids = completions.ids[row][completions.mask[row]].tolist()
    return [str(encoder.tokenizer.decode([token])) for token in ids]
