"""What the roles say of answers, exactly as far as the reward terms of a recipe read it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto import rewards
from rto.batch import Completions
from rto.config import Spec
from rto.data.chat import Encoder, PromptRow
from rto.finite import require_finite
from rto.models.checkpoint import ScorerNotes
from rto.models.mapped import leave
from rto.models.role import Role
from rto.models.segment import mean_at_ends
from rto.rewards.normaliser import Normaliser
from rto.rollouts.attention import attention_weights
from rto.rollouts.foreign import ForeignScorer
from rto.rollouts.functions import call_function, load_function
from rto.rollouts.http import HttpScorer
from rto.rollouts.score import logprobs_and_entropy, sentence_scores, token_logprobs, token_values
from rto.segments import segment_ends, sentence_ends

logger = logging.getLogger(__name__)

EXTERNAL = ("function", "http")  # signals from outside, which may be missing


@dataclass(frozen=True)
class Scorer:
    """A reward model as the terms read it.

    ``notes`` normalises sentence scores and ``normaliser`` segments; None leaves them as they are.
    """

    role: Role | ForeignScorer
    cutoff: float | None = None
    notes: ScorerNotes | None = None
    normaliser: Normaliser | None = None


class Reader:
    """Reads answers for a list of reward terms; the roles that no term needs may be None."""

    def __init__(
        self,
        terms: list[Spec],
        reference: Role,
        encoder: Encoder,
        budget: int,
        *,
        temperature: float = 1.0,
        guide: Role | None = None,
        scorer: Scorer | None = None,
        moving: Role | None = None,
    ) -> None:
        self.terms = terms
        self.needs = rewards.needs(terms)
        self.reference, self.guide, self.scorer, self.moving = reference, guide, scorer, moving
        self.encoder, self.budget, self.temperature = encoder, budget, temperature
        self._options: dict[str, Spec] = {term["type"]: term for term in rewards.live(terms)}
        if "function" in self.needs:
            self._function = load_function(self._options["function"]["function"])
        self._failures = self._counted = 0  # since the last measures: answers for which the function raised; http's
        self.failure = ""  # the first thing that the function raised
        if "http" in self.needs:
            settings = self._options["http"]
            self._http = HttpScorer(settings["url"], settings["timeout"], settings["retries"], settings["batch"])
        assert guide is not None or "guide" not in self.needs
        assert scorer is not None or not self.needs & {"scores", "segments", "segment_ends"}

    def read(
        self,
        completions: Completions,
        logprobs: Float[Tensor, "B T"],
        policy: Role,
        prompts: Sequence[PromptRow],
    ) -> dict[str, Tensor]:
        """The fields of :class:`~rto.batch.Signals` that the terms need; ``logprobs`` are the policy's own."""
        c, needs, heat = completions, self.needs, self.temperature
        # At cutoff 0 every token is a segment, whatever the entropy.
        cut = self.scorer is not None and self.scorer.cutoff and needs & {"scores", "segments"}
        parts = {"mask": c.mask, "finished": c.finished, "logprobs": logprobs}
        entropy = torch.zeros_like(logprobs)
        if cut:
            # Segments are cut by the untempered distribution, as the scorer was trained.
            parts["reference"], entropy = logprobs_and_entropy(self.reference, c, self.budget)
        if not cut or heat != 1.0:
            same = policy is self.reference and heat == 1.0
            parts["reference"] = logprobs if same else token_logprobs(self.reference, c, self.budget, heat)
        leave(self.reference, policy)  # before the next role comes into memory
        if self.moving is not None:
            parts["moving"] = token_logprobs(self.moving, c, self.budget, heat)
        if "guide" in needs:
            assert self.guide is not None
            parts["guide"] = token_logprobs(self.guide, c, self.budget, heat)
            leave(self.guide, policy)
        if self.scorer is not None:
            parts |= self._scored(self.scorer, c, entropy, prompts)
        if "attention" in needs:
            options = self._options["attention"]
            reader = policy if options["reader"] == "policy" or self.scorer is None else self.scorer.role
            if isinstance(reader, ForeignScorer):
                parts["attention"] = reader.attention(c, prompts, options["reading"], self.budget)
            else:
                parts["attention"] = attention_weights(reader, c, options["reading"], self.budget)
        if self.scorer is not None and isinstance(self.scorer.role, Role):
            leave(self.scorer.role, policy)
        if needs & {"sentence_ends", *EXTERNAL}:
            parts |= self._of_text(c, prompts)
        return parts

    def _scored(
        self, scorer: Scorer, c: Completions, entropy: Float[Tensor, "B T"], prompts: Sequence[PromptRow]
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        role, needs = scorer.role, self.needs
        if "segments" not in needs and scorer.cutoff is None:
            if "scores" in needs:
                parts["scores"] = self._normal(scorer, self._sentences(role, c, prompts))
            return parts
        if not needs & {"scores", "segments"}:
            return parts
        ends = segment_ends(entropy, c.mask, c.finished, scorer.cutoff)
        if isinstance(role, ForeignScorer):
            values = role.token_scores(c, prompts, self.budget)
        else:
            values = token_values(role, c, self.budget)
        if "scores" in needs:
            parts["scores"] = self._normal(scorer, mean_at_ends(values, ends, c.mask))
        if "segments" in needs:
            parts["segment_ends"] = ends
            if scorer.cutoff is None:
                values = self._normal(scorer, values)
            elif scorer.normaliser is not None:
                values = scorer.normaliser.apply(values, ends, c.mask)
            parts["segments"] = torch.where(ends, values, 0.0)
        return parts

    def _sentences(self, role: Role | ForeignScorer, c: Completions, prompts: Sequence[PromptRow]) -> Tensor:
        if isinstance(role, ForeignScorer):
            return role.scores(c, prompts, self.budget)
        scores = sentence_scores(role, c, self.budget)
        if not scores.isfinite().all():  # at which token they were first
            require_finite(token_values(role, c, self.budget), "scorer", "score")
        return scores

    @staticmethod
    def _normal(scorer: Scorer, raw: Tensor) -> Tensor:
        return raw if scorer.notes is None else (raw - scorer.notes.mean) / scorer.notes.std

    def _of_text(self, c: Completions, prompts: Sequence[PromptRow]) -> dict[str, Tensor]:
        """What is read from the words."""
        tokens = [tokens_of(self.encoder, c, i) for i in range(len(c))]
        parts: dict[str, Tensor] = {}
        if "sentence_ends" in self.needs:
            parts["sentence_ends"] = sentence_ends(tokens, c.mask)
        asked = [row.text for row in prompts]
        answers = [self.encoder.decode(ids[mask].tolist()) for ids, mask in zip(c.ids, c.mask, strict=True)]
        if "function" in self.needs:
            name = self._options["function"]["function"]
            found = call_function(self._function, name, asked, answers, tokens, self._function_failed)
            parts["function"] = self._wide(found, c)
        if "http" in self.needs:
            parts["http"] = self._wide(self._http.score(asked, answers, tokens), c)
        return parts

    @staticmethod
    def _wide(values: Float[Tensor, "B t"], c: Completions) -> Float[Tensor, "B T"]:
        """Padded to the width of the answers' tensors."""
        return torch.nn.functional.pad(values, (0, c.ids.shape[1] - values.shape[1]))

    def _function_failed(self, said: str) -> None:
        if not self.failure:
            logger.warning("%s. Such answers are dropped; function_failures counts them, later ones are not said", said)
            self.failure = said
        self._failures += 1

    def measures(self, total: Callable[[dict[str, float]], dict[str, float]]) -> dict[str, float]:
        """What is worth logging about the reading since the last time. ``total`` sums over the processes
        (:meth:`rto.models.runtime.Runtime.sum`), each of which reads its own answers."""
        counts = {"function_failures": float(self._failures)}
        self._failures = 0
        if "http" in self.needs:
            counts["http_failures"] = float(self._http.failures - self._counted)
            self._counted = self._http.failures
        foreign = self.scorer.role if self.scorer is not None else None
        if isinstance(foreign, ForeignScorer):
            counts |= {"moved": foreign.moved, "mass": foreign.mass}
        found = total(counts)
        if "mass" in found:
            moved, mass = found.pop("moved"), found.pop("mass")
            found["scorer_misaligned"] = moved / mass if mass else 0.0
        if not found["function_failures"]:
            del found["function_failures"]
        return found


def missing(parts: dict[str, Any]) -> Bool[Tensor, " B"]:
    """Answers whose reward somebody outside did not give."""
    gone = torch.zeros(len(parts["mask"]), dtype=torch.bool)
    for name in EXTERNAL:
        if name in parts:
            gone |= (parts[name].isnan() & parts["mask"]).any(-1)
    return gone


ROLES = {
    "logprobs": ("policy", "log-prob"),
    "reference": ("reference", "log-prob"),
    "moving": ("moving reference", "log-prob"),
    "guide": ("guide", "log-prob"),
    "scores": ("scorer", "score"),
    "segments": ("scorer", "score"),
    "attention": ("reader of attention", "share"),
    "values": ("critic", "value"),
    "function": ("reward function", "reward"),
    "http": ("reward server", "reward"),
}


def check_finite(parts: dict[str, Tensor]) -> None:
    """Raises NotFinite that names role, answer and token of the first signal that is none; a missing reward is not
    meant."""
    gone = missing(parts)
    for name, part in parts.items():
        if part.dtype.is_floating_point:
            shown = torch.where(gone.view(-1, *[1] * (part.dim() - 1)), 0.0, part)
            require_finite(shown, *ROLES[name], [(i, "answer") for i in range(len(part))])


def tokens_of(encoder: Encoder, completions: Completions, row: int) -> list[str]:
    """The text of each response token, special ones included."""
    ids = completions.ids[row][completions.mask[row]].tolist()
    return [str(encoder.tokenizer.decode([token])) for token in ids]
