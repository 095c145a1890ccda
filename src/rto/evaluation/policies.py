"""The policies of a run against each other on held-out prompts: answers, oracle scores, win rates, token credit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rto import rewards
from rto.batch import Completions, Signals
from rto.config import Evaluation, Spec
from rto.data.chat import Encoder, PromptRow
from rto.data.collate import collate_prompts
from rto.evaluation.credit import credit_report
from rto.evaluation.winrate import compare, without_nan
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.numerics import masked_sum
from rto.rewards.kl import Estimator
from rto.rollouts.generate import generate
from rto.rollouts.score import sentence_scores, token_logprobs
from rto.rollouts.signals import tokens_of

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
    budget: Budget,
    runtime: Runtime,
) -> Answers:
    """``config.samples`` answers to each prompt. Row seeds are the same for every policy.

    Raises:
        ValueError: a process would have no answer to make.
    """
    if len(prompts) * config.samples < runtime.world:
        raise ValueError(
            f"{len(prompts)} held-out prompts x evaluation.samples = {config.samples} are fewer answers than there are "
            f"processes ({runtime.world}): raise one of them, or start fewer processes"
        )
    mine = runtime.share([(row, k) for row in prompts for k in range(config.samples)])

    def work(tokens: int) -> Completions:
        return generate(
            role,
            [row.ids for row, _ in mine],
            [("evaluation", row.row, k) for row, k in mine],
            seed=seed,
            limit=encoder.max_response,
            end=encoder.end,
            pad=encoder.pad,
            temperature=config.temperature,
            top_p=config.top_p,
            budget=tokens,
        ).completions

    own = budget.within(work)
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
            "missing": p.missing,
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


def credit_views(
    policy: str,
    prompts: Sequence[PromptRow],
    completions: Completions,
    signals: Signals,
    terms: list[Spec],
    kl: tuple[float, Estimator],
    encoder: Encoder,
    truth: Truth | None,
) -> list[dict[str, Any]]:
    """Answers token by token: each term, the total, and the true reward where it is known. ``kl``: coefficient and
    estimator of the penalty."""
    total, parts = rewards.total(terms, signals, *kl)
    views = []
    for i in range(len(completions)):
        mask = completions.mask[i]
        tokens = tokens_of(encoder, completions, i)
        shown = {**parts, "total": total} if len(parts) > 1 else parts
        ends = signals.segment_ends
        views.append(
            {
                "policy": policy,
                "prompt": prompts[i].text,
                "tokens": tokens,
                "terms": {name: part[i][mask].tolist() for name, part in shown.items()},
                "truth": truth(prompts[i].text, tokens, bool(completions.finished[i])) if truth else None,
                "segment_ends": ends[i][mask].tolist() if ends is not None else None,
            }
        )
    return views


def credit_of(
    terms: list[Spec],
    prompts: Sequence[PromptRow],
    completions: Completions,
    signals: Signals,
    encoder: Encoder,
    truth: Truth,
    seed: int,
) -> dict[str, Any]:
    """How well the terms' token rewards (without the KL penalty) find the true ones."""
    true = np.zeros(completions.ids.shape)
    for i, row in enumerate(prompts):
        tokens = tokens_of(encoder, completions, i)
        true[i, : len(tokens)] = truth(row.text, tokens, bool(completions.finished[i]))
    total, _ = rewards.total(terms, signals, 0.0)
    found = credit_report(total.numpy(), true, completions.mask.numpy(), seed=seed)
    measured = {
        "auc": found["auc"]["estimate"],
        "auc_low": found["auc"]["low"],
        "auc_high": found["auc"]["high"],
        "spearman": found["spearman"]["estimate"],
        "within": found["spearman_within"]["estimate"],
        "n": found["tokens"],
    }
    return without_nan(measured)


def judge_by(scorer: Role, budget: Budget) -> Oracle:
    """A scorer as oracle: its raw score. It is asked :meth:`~rto.models.memory.Budget.within` the budget."""
    return lambda prompts, completions: sentence_scores(scorer, completions, budget.tokens).tolist()


def judge_by_truth(truth: Truth, encoder: Encoder) -> Oracle:
    """The sum of the known token rewards as oracle."""

    def score(prompts: Sequence[PromptRow], completions: Completions) -> list[float]:
        return [
            sum(truth(row.text, tokens_of(encoder, completions, i), bool(completions.finished[i])))
            for i, row in enumerate(prompts)
        ]

    return score


def judge_by_words(ask: Callable[[list[str], list[str], list[list[str]]], torch.Tensor], encoder: Encoder) -> Oracle:
    """Whatever reads prompts, answers and tokens as text and gives rewards [B, T]; NaN where it gives none."""

    def score(prompts: Sequence[PromptRow], completions: Completions) -> list[float]:
        tokens = [tokens_of(encoder, completions, i) for i in range(len(completions))]
        pairs = zip(completions.ids, completions.mask, strict=True)
        answers = [encoder.decode(ids[mask].tolist()) for ids, mask in pairs]
        return ask([row.text for row in prompts], answers, tokens).sum(-1).tolist()

    return score
