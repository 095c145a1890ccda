"""What a training stage minimises: the mean of a loss over demonstrations or over pairs.

A loss says by its positional parameters what it reads; an objective computes that, and only that.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rto.batch import Completions, Pairs, Siblings
from rto.data.chat import AnswerRow, PairRow
from rto.data.collate import collate_completions, collate_pairs, micro_batches
from rto.finite import NotFinite, require_finite
from rto.models.mapped import leave
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime, release_memory
from rto.numerics import masked_sum, predicting, reduce
from rto.preferences.cache import ReferenceCache
from rto.preferences.sft import sft

Row = TypeVar("Row")
Sums = dict[str, float]

# What a pairwise loss may name as a positional parameter; all [B], float32.
READABLE = {
    "chosen": "summed log-prob of the chosen answer",
    "rejected": "summed log-prob of the rejected answer",
    "chosen_reference": "the same under the reference",
    "rejected_reference": "the same under the reference",
    "chosen_length": "tokens of the chosen answer, end of sequence included",
    "rejected_length": "tokens of the rejected answer",
    "chosen_kl": "KL(reference || policy) of the next token, summed over the chosen answer",
    "rejected_kl": "the same over the rejected answer",
    "chosen_score": "the scorer at the chosen answer's last token",
    "rejected_score": "the scorer at the rejected answer's last token",
    "margin": "how much better the chosen answer is, where the data say so, else 0",
}
KL = {"chosen_kl", "rejected_kl"}
OF_REFERENCE = {"chosen_reference", "rejected_reference", "reference", "baseline"} | KL


@runtime_checkable
class Objective(Protocol[Row]):
    """What a stage minimises."""

    role: Role

    def size(self, row: Row) -> int:
        """Tokens that the row adds to a forward pass."""

    def weight(self, row: Row) -> int:
        """What the row adds to the denominator of the loss: tokens or rows."""

    def loss(self, rows: list[Row], total: float) -> tuple[Tensor, Sums]:
        """The rows' share of the loss, and sums over rows of what is worth logging."""


Ids = tuple[tuple[int, ...], tuple[int, ...]]  # of a prompt and its answer


@dataclass(frozen=True)
class Answers:
    """Answers that models read together. ``of`` names them (:func:`rto.finite.require_finite`)."""

    batch: Completions
    ids: list[Ids]  # what they are known by
    of: list[tuple[int, str]]


@dataclass
class SftObjective:
    """Token mean of -log pi over demonstrations."""

    role: Role
    pad: int

    def size(self, row: AnswerRow) -> int:
        return len(row.prompt) + len(row.answer)

    def weight(self, row: AnswerRow) -> int:
        return len(row.answer)

    def loss(self, rows: list[AnswerRow], total: float) -> tuple[Tensor, Sums]:
        batch = collate_completions(
            [r.prompt for r in rows], [r.answer for r in rows], [r.finished for r in rows], self.pad
        ).to(self.role.backbone.device)
        logprobs, _ = self.role.logprobs(batch, entropy=False)
        require_finite(logprobs, "policy", "log-prob", [(i, "answer") for i in range(len(rows))])
        return reduce(sft(logprobs), batch.mask, "token", total), {}


class Compared(ABC):
    """A loss of a policy, mostly against its reference, or of a scorer; its positional parameters say what is computed
    for it, and ``READABLE`` of its kind what it may name. ``cache`` keeps the reference's log-probs between epochs.

    Raises:
        ValueError: a cache is given for a loss that has no use of it.
    """

    readable: Mapping[str, str]

    @abstractmethod
    def size(self, row: Any) -> int:
        """As :meth:`Objective.size`."""

    @abstractmethod
    def ids(self, rows: list[Any]) -> list[Ids]:
        """What the answers of these rows are known by, in the order of :meth:`answers`."""

    @abstractmethod
    def answers(self, rows: list[Any]) -> Answers:
        """All answers of these rows."""

    def __init__(
        self,
        role: Role,
        loss: Callable[..., Tensor],
        options: dict[str, Any],
        pad: int,
        reference: Role | None = None,
        cache: ReferenceCache | None = None,
    ) -> None:
        self.role, self.pad, self.cache = role, pad, cache
        self.function, self.options = loss, options
        self.wanted = reads(loss)
        assert set(self.wanted) <= set(self.readable), f"{loss.__name__} reads what is not there: {self.wanted}"
        self.reference = reference_for(loss, reference, cache)
        self.trained = "policy" if role.head is None else "scorer"
        self.ahead: dict[Ids, Tensor] = {}  # what the reference said of the batch that is being trained on

    @torch.no_grad()
    def prepare(self, batch: list[Any], budget: Budget, runtime: Runtime) -> None:
        """Called once a batch, before its micro-batches, with the same batch on every process: the reference reads its
        part of it (:meth:`read_ahead`).

        Raises:
            NotFinite: a log-prob, with its row.
        """
        self.ahead.clear()
        mine = runtime.share(batch)
        budget.within(lambda tokens: self.read_ahead(mine, tokens))

    @torch.no_grad()
    def read_ahead(self, rows: list[Any], tokens: int) -> None:
        """The reference reads those of these rows that the cache does not know, ``tokens`` a pass, before the policy
        does. One whose weights lie in a file then leaves memory, so that they and the policy's gradients are never
        there at once.

        Not for a loss that compares whole distributions: there the two models are needed together.

        Raises:
            NotFinite: a log-prob, with its row.
        """
        reference = self.reference
        if reference is None or KL & set(self.wanted):
            return
        if self.cache is not None:
            rows = [row for row in rows if not self.cache.knows(self.ids([row]))]
        own = reference.backbone is not self.role.backbone
        if rows and own and reference.backbone.device.type == "cpu":
            release_memory()  # of the last step's gradients
        for index in micro_batches([self.size(row) for row in rows], tokens):
            asked = self.answers([rows[i] for i in index])
            try:
                self.ahead.update(zip(asked.ids, self._frozen(asked, self.cache).unbind(), strict=True))
            except NotFinite as error:
                raise error.among(rows, index) from None
        leave(reference, self.role)

    def done(self) -> None:
        """The batch of :meth:`prepare` is: the reference may be another one for the next."""
        self.ahead.clear()

    def _parts(self, asked: Answers, cache: ReferenceCache | None) -> dict[str, Float[Tensor, " B"]]:
        """Summed log-probs of each answer under the role (key "") and, where there is one, the reference."""
        found = {}
        if self.reference is not None:  # first, while no activations of the policy are held
            found["reference"] = self._frozen(asked, cache)
        logprobs, _ = self.role.logprobs(asked.batch, entropy=False)
        require_finite(logprobs, "policy", "log-prob", asked.of)
        found[""] = masked_sum(logprobs, asked.batch.mask)
        return found

    @torch.no_grad()
    def _frozen(self, asked: Answers, cache: ReferenceCache | None) -> Float[Tensor, " B"]:
        """Summed log-probs under the reference: what it has said, or says now."""
        if all(ids in self.ahead for ids in asked.ids):
            return torch.stack([self.ahead[ids] for ids in asked.ids])
        reference, batch = self.reference, asked.batch
        assert reference is not None

        def compute() -> Tensor:
            logprobs, _ = reference.logprobs(batch, entropy=False)
            require_finite(logprobs, "reference", "log-prob", asked.of)
            return masked_sum(logprobs, batch.mask)

        return compute() if cache is None else cache.sums(asked.ids, compute).to(batch.ids.device)


class PairObjective(Compared):
    """A pairwise loss."""

    readable = READABLE

    def size(self, row: PairRow) -> int:
        answers = len(row.chosen), len(row.rejected)
        if self.role.backbone.forks:
            return len(row.prompt) + sum(answers)
        return 2 * (len(row.prompt) + max(answers))

    def weight(self, row: PairRow) -> int:
        return 1

    def loss(self, rows: list[PairRow], total: float) -> tuple[Tensor, Sums]:
        read = self._read(rows)
        losses = self.function(*(read[name] for name in self.wanted), **self.options)
        require_finite(losses, self.trained, "loss")
        return losses.sum() / total, self._sums(read)

    @torch.no_grad()
    def scores(self, rows: Sequence[PairRow], budget: Budget) -> tuple[Tensor, Tensor]:
        """The scorer's scores of all chosen and of all rejected answers, each [N], in the order of the rows.

        Raises:
            NotFinite: a score.
        """

        def work(tokens: int) -> tuple[Tensor, Tensor]:
            chosen, rejected = torch.zeros(len(rows)), torch.zeros(len(rows))
            for index in micro_batches([self.size(row) for row in rows], tokens):
                try:
                    read = self._read([rows[i] for i in index])
                except NotFinite as error:
                    raise error.among(rows, index) from None
                chosen[index] = read["chosen_score"].float().cpu()
                rejected[index] = read["rejected_score"].float().cpu()
            return chosen, rejected

        return budget.within(work)

    def ids(self, rows: list[PairRow]) -> list[Ids]:
        chosen = [(tuple(row.prompt), tuple(row.chosen)) for row in rows]
        return chosen + [(tuple(row.prompt), tuple(row.rejected)) for row in rows]

    def answers(self, rows: list[PairRow]) -> Answers:
        """Chosen ones above rejected ones."""
        return self._asked(rows, self._pairs(rows))

    def _pairs(self, rows: list[PairRow]) -> Pairs:
        return collate_pairs(rows, self.pad).to(self.role.backbone.device)

    def _asked(self, rows: list[PairRow], pairs: Pairs) -> Answers:
        return Answers(
            _both(pairs), self.ids(rows), [(i, side) for side in ("chosen", "rejected") for i in range(len(rows))]
        )

    def _read(self, rows: list[PairRow]) -> dict[str, Tensor]:
        pairs = self._pairs(rows)
        asked = self._asked(rows, pairs)
        both, of = asked.batch, asked.of
        read = {"margin": pairs.margin}
        read["chosen_length"], read["rejected_length"] = both.lengths.float().chunk(2)
        if self.role.head is not None:
            read["chosen_score"], read["rejected_score"] = self._scores(both, of).chunk(2)
            return read
        found = self._with_kl(both, of) if KL & set(self.wanted) else self._parts(asked, self.cache)
        for name, values in found.items():
            suffix = f"_{name}" if name else ""
            read[f"chosen{suffix}"], read[f"rejected{suffix}"] = values.chunk(2)
        return read

    def _scores(self, both: Completions, of: Sequence[tuple[int, str]]) -> Tensor:
        try:
            scores = self.role.scores(both)
        except NotFinite as error:  # of the reference, whose entropy cuts segments
            raise error.named(of) from None
        if not scores.isfinite().all():
            with torch.no_grad():  # at which token it was first
                require_finite(self.role.token_scores(both), "scorer", "score", of)
            require_finite(scores, "scorer", "score", of)
        return scores

    def _with_kl(self, both: Completions, of: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
        """As :meth:`_parts`, and the KL; each model reads the text once."""
        assert self.reference is not None
        with torch.no_grad():
            states = predicting(self.reference.hidden(both), both.ids.shape[1])
            frozen, _ = self.reference.logprobs_from(states, both, entropy=False)
        require_finite(frozen, "reference", "log-prob", of)
        logprobs, kl = self.role.logprobs_and_kl(both, self.reference, states)
        require_finite(logprobs, "policy", "log-prob", of)
        sums = {"": logprobs, "reference": frozen, "kl": kl}
        return {name: masked_sum(values, both.mask) for name, values in sums.items()}

    def _sums(self, read: dict[str, Tensor]) -> Sums:
        if self.role.head is not None:
            better, worse = read["chosen_score"], read["rejected_score"]
        else:
            better, worse = (self._implicit(read, side).detach() for side in ("chosen", "rejected"))
        sums = {
            "accuracy": (better > worse).sum().item() + 0.5 * (better == worse).sum().item(),  # a tie is a coin toss
            "margin": (better - worse).sum().item(),
            "chosen": better.sum().item(),
            "rejected": worse.sum().item(),
        }
        return sums | {name: read[name].sum().item() for name in sorted(KL & set(read))}

    def _implicit(self, read: dict[str, Tensor], side: str) -> Tensor:
        """The reward that the loss gives an answer: beta times its log-ratio (TDPO: and its KL), or its log-prob where
        there is no reference; a token's mean where the loss compares means (IPO, SimPO, ORPO)."""
        reward, means = read[side], {"chosen_length", "rejected_length"} <= set(self.wanted)
        if self.reference is not None:
            reward = reward - read[f"{side}_reference"] + read.get(f"{side}_kl", 0.0)
            means = False
        if option(self.function, self.options, "average", means):
            reward = reward / read[f"{side}_length"].clamp(min=1)
        return option(self.function, self.options, "beta", 1.0) * reward


def reads(loss: Callable[..., Tensor]) -> list[str]:
    """What a loss reads: the names of its positional parameters."""
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]


def option(loss: Callable[..., Tensor], options: dict[str, Any], name: str, otherwise: float) -> float:
    """The value of an option: as given, else the loss's default, else ``otherwise`` where it has no such option."""
    parameter = inspect.signature(loss).parameters.get(name)
    return options.get(name, otherwise if parameter is None else parameter.default)


def reads_reference(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss needs the reference's forward pass."""
    return bool(OF_REFERENCE & set(reads(loss)))


def reference_for(loss: Callable[..., Tensor], reference: Role | None, cache: ReferenceCache | None) -> Role | None:
    """The reference where the loss reads it. Raises ValueError for a cache that the loss cannot use."""
    if cache is not None:
        check_cacheable(loss)
    if not reads_reference(loss):
        return None
    assert reference is not None, f"{loss.__name__} reads a reference"
    return reference


def check_cacheable(loss: Callable[..., Tensor]) -> None:
    """Raises:
    ValueError: the loss has no use for one number an answer from the reference.
    """
    if not reads_reference(loss):
        raise ValueError(f"cache_reference = true, but {loss.__name__} reads no reference: leave it out")
    if KL & set(reads(loss)):
        raise ValueError(
            f"cache_reference = true keeps one number an answer, but {loss.__name__} reads the reference's "
            "whole distribution at every token: set it to false"
        )


def _both(pairs: Pairs) -> Siblings:
    """Chosen above rejected, as one batch of 2B rows."""
    above, below = pairs.chosen, pairs.rejected

    def stack(read: Callable[[Completions], Tensor]) -> Tensor:
        return torch.cat([read(above), read(below)])

    prompt = type(above.prompt)(stack(lambda c: c.prompt.ids), stack(lambda c: c.prompt.mask))
    return Siblings(prompt, stack(lambda c: c.ids), stack(lambda c: c.mask), stack(lambda c: c.finished))
