"""Pairs scored by a finished scorer or guide of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from rto.data.chat import PairRow, PromptRow
from rto.data.collate import collate_completions
from rto.data.layouts import Prompt
from rto.numerics import masked_sum
from rto.pipeline.job import Job
from rto.pipeline.readers import adapter_name, open_policy, open_scorer
from rto.pipeline.resolve import term_functions
from rto.recipe import complete, nearest
from rto.rollouts.score import token_logprobs
from rto.rollouts.signals import Reader

Kind = Literal["scorer", "guide"]


def score_pairs(
    job: Job, pairs: Sequence[PairRow], prompts: Mapping[int, Prompt], role: Kind, name: str | None = None
) -> tuple[list[float], list[float]]:
    """Scores of all chosen and of all rejected answers, in the order of the pairs.

    A scorer is read as its reward is: at the last token, or as the mean over the ends of its segments. A guide's score
    is its log-ratio to the reference, summed over the answer (nats). ``prompts``: by row, what they were rendered
    from, for a scorer with another chat template. ``name``: a further one of the recipe.

    Raises:
        ValueError: the recipe has no such role, or it is not trained yet.
    """
    config, encoder, budget = job.config, job.rows.encoder, job.config.policy.reading_tokens
    first, known = ("reward", config.rewards()) if role == "scorer" else ("prefer", config.preferences())
    stage = first if name is None else f"{first}/{name}"
    if stage not in known:
        names = [key.partition("/")[2] for key in known if "/" in key]
        others = ", ".join(names) or "none beside the first"
        raise ValueError(f"{config.output}: no {role} {name!r}{nearest(str(name), names)}; the recipe has: {others}")
    asked, answers = [pair.prompt for pair in pairs] * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs]
    ended = [pair.chosen_finished for pair in pairs] + [pair.rejected_finished for pair in pairs]
    completions = collate_completions(asked, answers, ended, encoder.pad)
    shop = job.workshop()
    reference = shop.reference()
    if role == "guide":
        guide = open_policy(job, shop, stage, adapter_name(stage))
        ratios = token_logprobs(guide, completions, budget) - token_logprobs(reference, completions, budget)
        scores = masked_sum(ratios, completions.mask)
    else:
        terms = [complete({"type": "terminal"}, term_functions(), "rewardbench")]
        reader = Reader(terms, reference, encoder, budget, scorer=open_scorer(job, shop, stage, False))
        rows = [PromptRow(pair.row, pair.prompt_text, pair.prompt, prompts[pair.row]) for pair in pairs] * 2
        # Given as the reference's own log-probs, zeros save a pass that no term reads.
        scores = reader.read(completions, torch.zeros(completions.ids.shape), reference, rows)["scores"]
    chosen, rejected = scores.tolist()[: len(pairs)], scores.tolist()[len(pairs) :]
    return chosen, rejected
