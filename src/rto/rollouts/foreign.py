"""A scorer with another tokenizer than the policy's: answers go over as text, rewards come back by characters."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from rto import config as recipe
from rto.batch import Completions
from rto.data.chat import Encoder, PromptRow
from rto.data.collate import collate_completions
from rto.data.layouts import Prompt
from rto.models.checkpoint import is_adapter
from rto.models.load import positions_of
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.workshop import Workshop
from rto.rewards.carry import Span, at_ends, carry
from rto.rollouts.attention import Reading, attention_weights
from rto.rollouts.score import sentence_scores, token_values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[Span]

_BROKEN = "\ufffd"  # what bytes that are no whole character decode to
_BYTES = 8  # tokens that one character, or two that share a token, may take


class ForeignScorer:
    """Reads the policy's answers with a scorer of another tokenizer.

    It sees the conversations that the prompts were made of under its own chat template. Of a prompt without one it
    sees the text, with the policy's template spelled out, which it was hardly trained on. An answer that ended by
    itself ends with the scorer's own end token; one that was cut has none. ``policy`` is the policy's encoder.
    ``limit`` is in the scorer's tokens, by default its positions: longer prompts lose their beginning. The ``budget``
    of a reading is in padded tokens of one pass. ``moved`` is how much of ``mass``, the absolute mass of the last token
    readings, lay across the borders of tokens (see :mod:`rto.rewards.carry`).

    Raises:
        ValueError: the tokenizer cannot tell which characters its tokens stand for; when scoring, an answer alone is
            over the limit.
    """

    def __init__(
        self, role: Role, tokenizer: PreTrainedTokenizerBase, policy: Encoder, limit: int | None = None
    ) -> None:
        self.source = role.backbone.source
        if not tokenizer.is_fast:
            raise ValueError(f"{self.source}: a scorer with a vocabulary of its own needs a fast tokenizer")
        self.role = role
        self.policy = policy
        self.limit = limit or positions_of(role.backbone.network.config) or 2**31
        self.encoder = Encoder(tokenizer, self.limit, self.limit)
        self.moved = self.mass = 0.0
        self._anchor = policy.tokenizer("a", add_special_tokens=False)["input_ids"]
        self._pieces: dict[tuple[int, ...], str] = {}

    @classmethod
    def open(
        cls, model: recipe.Pretrained, tokenizer: PreTrainedTokenizerBase, policy: Encoder, runtime: Runtime
    ) -> ForeignScorer:
        """The one-label classifier of that name, frozen. ``tokenizer`` is its own.

        Raises:
            ValueError: the folder holds something else.
        """
        folder = model.name
        if is_adapter(folder):
            raise ValueError(f"{folder} is an adapter: merge it into its base model to score for another tokenizer")
        shop = Workshop(model, folder, tokenizer, runtime, seed=0)  # nothing is drawn
        return cls(shop.open_scorer(folder, "scorer", None, trained=False), tokenizer, policy)

    # --- readings ---------------------------------------------------------------------------------------

    def scores(self, completions: Completions, prompts: Sequence[PromptRow], budget: int) -> Float[Tensor, " B"]:
        """The scorer at each answer's last token."""
        own, _, _ = self._translated(completions, prompts)
        return sentence_scores(self.role, own, budget)

    def token_scores(self, completions: Completions, prompts: Sequence[PromptRow], budget: int) -> Float[Tensor, "B T"]:
        """The scorer where each of the policy's tokens ends: at the first of its own that ends there or later."""
        own, theirs, ours = self._translated(completions, prompts)
        values = token_values(self.role, own, budget)
        return self._back(completions, values, theirs, ours, lambda v, f, t: at_ends(v, f, [end for _, end in t]))

    def attention(
        self,
        completions: Completions,
        prompts: Sequence[PromptRow],
        reading: Reading,
        budget: int,
    ) -> Float[Tensor, "B T"]:
        """The scorer's :func:`~rto.rollouts.attention.attention_weights` as shares of the policy's tokens: sum 1."""
        own, theirs, ours = self._translated(completions, prompts)
        return self._back(completions, attention_weights(self.role, own, reading, budget), theirs, ours, carry)

    # --- there and back ---------------------------------------------------------------------------------

    def _translated(
        self, completions: Completions, prompts: Sequence[PromptRow]
    ) -> tuple[Completions, list[Spans], list[Spans]]:
        """The answers in the scorer's tokens, the spans of these, and the spans of the policy's tokens."""
        seen = [row.text if row.prompt is None else row.prompt for row in prompts]
        finished = completions.finished.tolist()
        asked, answers, theirs, ours = [], [], [], []
        for prompt, ids, mask, ended in zip(seen, completions.ids, completions.mask, finished, strict=True):
            text, spans = self._text(prompt, ids[mask].tolist(), ended)
            answer, places = self._answer(prompt, text, ended)
            if len(answer) >= self.limit:
                raise ValueError(
                    f"an answer has {len(answer)} tokens for the scorer {self.source}, which reads {self.limit} with "
                    "the prompt: lower data.max_response"
                )
            self.encoder.max_prompt = self.limit - len(answer)
            asked.append(self.encoder.prompt(prompt))
            answers.append(answer)
            theirs.append(places)
            ours.append(spans)
        return collate_completions(asked, answers, finished, self.encoder.pad), theirs, ours

    def _text(self, prompt: Prompt, ids: list[int], finished: bool) -> tuple[str, Spans]:
        """An answer of the policy as text, without what its template puts before answers, and its tokens' spans."""
        body = ids[:-1] if finished else ids
        text, spans = self.policy.decode(body), self._spans(body)
        lead = "" if isinstance(prompt, str) else self.policy.lead
        if lead and text.startswith(lead):
            text, spans = text[len(lead) :], _shifted(spans, len(lead))
        return text, [*spans, *_end(text, finished)]

    def _answer(self, prompt: Prompt, text: str, finished: bool) -> tuple[list[int], Spans]:
        """The text as the scorer's answer ids, as :meth:`Encoder.answer` would give them, and their spans."""
        lead = "" if isinstance(prompt, str) else self.encoder.lead
        coded = self.encoder.tokenizer(
            lead + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, spans = list(coded["input_ids"]), _shifted(_in_order(coded["offset_mapping"]), len(lead))
        if self.encoder.end in ids:  # spelled out: it ends the answer there
            stop = ids.index(self.encoder.end) + 1
            return ids[:stop], spans[:stop]
        if finished or not ids:  # nothing can be read where there is no token
            return [*ids, self.encoder.end], [*spans, *_end(text, True)]
        return ids, spans

    def _spans(self, ids: list[int]) -> Spans:
        """Which characters of the decoded text each token stands for; empty until a character is complete."""
        text = self.policy.decode(ids)
        pieces = self._split(ids)
        if "".join(pieces) == text:
            ends = list(accumulate(map(len, pieces)))
        else:  # a token's text depends on its neighbours: decode every beginning, which is slower
            beginnings = (self.policy.decode(ids[:stop]) for stop in range(1, len(ids)))
            ends = list(accumulate((len(os.path.commonprefix([part, text])) for part in beginnings), max))
            ends += [len(text)] * (len(ids) > 0)
        return list(zip([0, *ends], ends, strict=False))

    def _split(self, ids: list[int]) -> list[str]:
        """Each token's text on its own. Of tokens that are bytes of one character, the last has it."""
        pieces: list[str] = []
        while len(pieces) < len(ids):
            start = len(pieces)
            whole = [self._piece(ids[start : start + 1], start == 0)]
            if _BROKEN in whole[0]:
                for stop in range(start + 2, min(start + _BYTES, len(ids)) + 1):
                    if _BROKEN not in (together := self._piece(ids[start:stop], start == 0)):
                        whole = [""] * (stop - start - 1) + [together]
                        break
            pieces += whole
        return pieces

    def _piece(self, ids: list[int], first: bool) -> str:
        """The text of some tokens, at the beginning (where some decoders drop a space) or after others."""
        key = (first, *ids)
        if key not in self._pieces:
            before = [] if first else self._anchor
            self._pieces[key] = self.policy.decode([*before, *ids])[len(self.policy.decode(before)) :]
        return self._pieces[key]

    def _back(
        self,
        completions: Completions,
        values: Float[Tensor, "B N"],
        theirs: list[Spans],
        ours: list[Spans],
        move: Callable[[list[float], Spans, Spans], tuple[list[float], float]],
    ) -> Float[Tensor, "B T"]:
        """Values at the scorer's tokens as values at the policy's."""
        out = torch.zeros(completions.ids.shape)
        self.moved = self.mass = 0.0
        for row, (given, source, target) in enumerate(zip(values.tolist(), theirs, ours, strict=True)):
            carried, share = move(given[: len(source)], source, target)
            weight = sum(map(abs, carried))
            self.mass, self.moved = self.mass + weight, self.moved + share * weight
            out[row, completions.mask[row]] = torch.tensor(carried, dtype=torch.float32)
        return out


def _end(text: str, finished: bool) -> Spans:
    """The end of an answer counts as a character of its own, so that end tokens are matched like any other."""
    return [(len(text), len(text) + 1)] if finished else []


def _shifted(spans: Spans, by: int) -> Spans:
    return [(max(0, start - by), max(0, end - by)) for start, end in spans]


def _in_order(spans: Sequence[Sequence[int]]) -> Spans:
    """Spans that do not overlap nor go back: of tokens that share a character, the last has it."""
    starts = list(accumulate((int(start) for start, _ in spans), max))
    ends = list(accumulate((int(end) for _, end in spans), max))
    stops = [min(end, start) for end, start in zip(ends, [*starts[1:], *ends[-1:]], strict=True)]
    return list(zip(starts, stops, strict=True))
