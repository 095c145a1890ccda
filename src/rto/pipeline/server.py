"""A finished scorer of a run that reads texts: what ``rto serve-scorer`` puts behind HTTP."""

from __future__ import annotations

from functools import cached_property

import torch

from rto.config import Config
from rto.data.chat import Encoder, PromptRow
from rto.data.collate import collate_completions
from rto.data.rows import Rows
from rto.pipeline.job import Job
from rto.pipeline.readers import open_scorer
from rto.pipeline.resolve import resolve, term_functions
from rto.recipe import complete, nearest
from rto.rollouts.foreign import ForeignScorer
from rto.rollouts.server import Refused, say
from rto.rollouts.signals import Reader


class RunScorer:
    """The scorer of ``stage`` ("reward" or "reward/NAME"), normalised as the run's own policies see it.

    Raises:
        ValueError: the run has no such scorer, it is not finished, or what normalises it is missing.
    """

    def __init__(self, config: Config, stage: str = "reward") -> None:
        job = Job(resolve(config), quiet=True)
        known = job.config.rewards()
        if stage not in known:
            raise ValueError(f"{job.folder}: no scorer {stage!r}{nearest(stage, known)}; it has {', '.join(known)}")
        data = config.data
        self.limit = data.max_response
        # One token more than the run allows tells a longest answer from one that is too long.
        self.encoder = Encoder(job.tokenizer, data.max_prompt, data.max_response + 1)
        job.rows = Rows(self.encoder, [], [], [], [], [])  # serving needs no data
        shop = job.workshop()
        self.segments = known[stage].cutoff is not None
        scorer = open_scorer(job, shop, stage, self.segments)
        if self.segments:
            reference = shop.reference()  # its entropy cuts the segments
        else:  # nobody asks it
            reference = scorer.role.role if isinstance(scorer.role, ForeignScorer) else scorer.role
        names = ["terminal", "segment"] if self.segments else ["terminal"]
        terms = [complete({"type": name}, term_functions(), "served") for name in names]
        self._reader = Reader(terms, reference, self.encoder, job.config.policy.reading_tokens, scorer=scorer)

    def __call__(self, prompts: list[str], answers: list[str], tokens: list[list[str]]) -> list[float | list[float]]:
        """A number an answer. Of a segment scorer a list with a number a token (each segment's on the token that ends
        it), where all given tokens are the run's own; else the sentence score, for all answers alike.

        Raises:
            Refused: a prompt is empty, or an answer is longer than the run's data.max_response.
            FloatingPointError: a score is not finite.
        """
        if not prompts:
            return []
        asked = [PromptRow(i, text, self.encoder.prompt(text)) for i, text in enumerate(prompts)]
        found = [self._ids(*row) for row in zip(prompts, answers, tokens, strict=True)]
        for i, (row, (ids, _, _)) in enumerate(zip(asked, found, strict=True)):
            if not row.ids:
                raise Refused(f"prompt {i} has no tokens")
            if len(ids) > self.limit:
                raise Refused(f"answer {i} has more than the {self.limit} tokens that this scorer reads", 413)
        own = [mine for _, _, mine in found]
        c = collate_completions(
            [row.ids for row in asked], [ids for ids, _, _ in found], [end for _, end, _ in found], self.encoder.pad
        )
        reader = self._reader
        parts = reader.read(c, torch.zeros(c.ids.shape), reader.reference, asked)
        if self.segments and not all(own):
            say(f"the tokens of {len(own) - sum(own)} answers are not this run's: sentence scores for all {len(own)}")
        chosen = parts["segments" if self.segments and all(own) else "scores"]
        if not chosen.isfinite().all():
            raise FloatingPointError("a score is not finite")
        if chosen.dim() == 1:
            return chosen.tolist()
        return [row[mask].tolist() for row, mask in zip(chosen, c.mask, strict=True)]

    def _ids(self, prompt: str, answer: str, tokens: list[str]) -> tuple[list[int], bool, bool]:
        """An answer's ids, whether it ended by itself, and whether its ids are the given tokens.

        Tokens are texts, so they tell the end token, and ids that the tokenizer itself would not have chosen.
        """
        finished = tokens[-1] == self._text(self.encoder.end)
        ids, ended = self.encoder.answer(prompt, answer)
        if ended and not finished and len(ids) > 1:
            ids = ids[:-1]
        if [self._text(i) for i in ids] == tokens:
            return ids, finished, True
        if all(text in self._known for text in tokens):
            sampled = [self._known[text] for text in tokens]
            if self.encoder.decode(sampled) == answer:
                return sampled, finished, True
        return ids, finished or ids == [self.encoder.end], False

    def _text(self, token: int) -> str:
        return str(self.encoder.tokenizer.decode([token]))

    @cached_property
    def _known(self) -> dict[str, int]:
        """Token texts that only one id has."""
        found: dict[str, int] = {}
        double = set()
        for i in range(len(self.encoder.tokenizer)):
            text = self._text(i)
            double.update({text} & found.keys())
            found[text] = i
        return {text: i for text, i in found.items() if text not in double}
