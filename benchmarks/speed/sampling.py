"""Sampling from the model: `generate` of rto, with log-probs, and of transformers, without.

Lengths are given, so that both sides write as many tokens: all as long as the limit, or ``case.lengths``.
"""

from __future__ import annotations

from typing import Any

from benchmarks.speed import ours, theirs
from benchmarks.speed.case import Case, Row
from benchmarks.speed.turns import Turns
from benchmarks.speed.work import Model

FIRST = 0  # the end of sequence that rto is given: the token that the smallest random number draws
NEVER = -1


def rto(case: Case, turns: Turns) -> None:
    import torch

    from rto.rollouts import generate

    shop, _ = ours.workshop(case)
    role, prompts = shop.reference(), [row["prompt"] for row in case.batch(0)]
    plain = generate.uniforms

    def uniforms(n: int, seed: int, *names: Any) -> torch.Tensor:
        """The random numbers of an answer: 0 where it is to end, never near it elsewhere."""
        noise = plain(n, seed, *names).clamp(min=0.05)
        noise[case.lengths[int(names[-1])] - 1] = 0.0
        return noise

    if case.lengths:
        generate.uniforms = uniforms  # type: ignore[assignment]
    turns.ready({**ours.settings(case), "log-probs": "yes"})
    while True:
        turns.begin()
        with turns.phase("decoding"):
            made = generate.generate(
                role,
                prompts,
                [("sampling", turns.number, i) for i in range(len(prompts))],
                seed=case.seed,
                limit=case.limit,
                end=FIRST if case.lengths else NEVER,
                pad=case.pad,
                budget=case.micro_tokens,
            )
        turns.stop()
        written = int(made.completions.mask.sum())
        turns.end(written, "other", {"answers": len(made.completions), "answer tokens": written})


def peer(case: Case, turns: Turns) -> None:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = theirs.load(case, trained=False).to(case.device).eval()
    prompts = [row["prompt"] for row in case.batch(0)]
    width = max(map(len, prompts))
    ids = torch.tensor([[case.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=case.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=case.device)
    lengths = torch.tensor(case.lengths or [case.limit] * len(prompts), device=case.device)

    class Long(StoppingCriteria):
        """A row ends where its length says."""

        eos_token_id = None  # criteria that have one make `generate` pad the rows that have ended

        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return input_ids.shape[1] - width >= lengths

    model.generation_config.eos_token_id = None
    turns.ready({"dtype": case.dtype, "attention": case.attention, "rows": len(prompts), "log-probs": "no"})
    torch.manual_seed(case.seed)
    while True:
        turns.begin()
        with turns.phase("decoding"), torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=case.limit,
                pad_token_id=case.pad,
                stopping_criteria=StoppingCriteriaList([Long()]) if case.lengths else None,
            )
        turns.stop()
        answers = out[:, width:]
        written = torch.arange(answers.shape[1], device=case.device) < lengths[:, None]
        assert (answers[~written] == case.pad).all(), "an answer went on after its length"
        turns.end(int(written.sum()), "other", {"answers": len(answers), "answer tokens": int(written.sum())})


def least(case: Case, batch: list[Row], model: Model) -> float:
    """Each token but the last once, logits where one is sampled."""
    lengths = case.lengths or (case.limit,) * len(batch)
    return sum(model.forward(len(row["prompt"]) + n - 1, n) for row, n in zip(batch, lengths, strict=True))
