"""Losses of one prompt with several scored answers (KTO, MPPO): what they read, and their metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.data.chat import AnswerRow, ScoredRow
from rto.data.collate import collate_completions, micro_batches
from rto.finite import NotFinite, require_finite
from rto.models.memory import Budget
from rto.models.runtime import Runtime
from rto.numerics import masked_sum
from rto.preferences.objectives import Answers, Compared, Ids, Sums, option

# What a group loss may name as a positional parameter; float32. Absent answers hold 0.
READABLE_GROUP = {
    "logprobs": "[B, N], summed log-prob of each answer",
    "reference": "[B, N], the same under the reference",
    "lengths": "[B, N], tokens of each answer, end of sequence included",
    "scores": "[B, N], as in the data",
    "there": "[B, N], bool: the row has that answer",
    "baseline": "[B], mean log-ratio of mismatched prompts and answers of the global batch",
}


def pair_scores(loss: Callable[..., Tensor], options: dict[str, Any]) -> tuple[float, float]:
    """Scores by which the loss takes a pair's chosen answer as good and its rejected one as bad: either side of KTO's
    ``desirable_above``, MPPO's ``full_score`` and 0."""
    above = option(loss, options, "desirable_above", 0.5)
    return option(loss, options, "full_score", above + 0.5), above - 0.5


class GroupObjective(Compared):
    """A loss over all scored answers of a prompt. N is the largest group of the micro-batch."""

    readable = READABLE_GROUP
    baseline: float | None = None  # of the batch that is being trained on

    def size(self, row: ScoredRow) -> int:
        """Padded: each answer stands behind a prompt of its own."""
        return len(row.answers) * (len(row.prompt) + max(map(len, row.answers)))

    def weight(self, row: ScoredRow) -> int:
        return 1

    @torch.no_grad()
    def prepare(self, batch: list[ScoredRow], budget: Budget, runtime: Runtime) -> None:
        """First KTO's reference point, then what every loss has. The point is the mean of log pi - log pi_ref over
        mismatched pairs, the prompt of each row with the answers of the next one (of the last row: those of the first).
        A batch of one row, such as the rest at the end of a stage, has none and keeps that of the batch before.

        Raises:
            ValueError: the first batch has one row.
            NotFinite: a log-prob, with its row.
        """
        if "baseline" in self.wanted:
            if len(batch) > 1:
                self.baseline = self._mismatched(batch, budget, runtime)
            elif self.baseline is None:
                raise ValueError(
                    f"{self.function.__name__} compares prompts with the answers to other prompts, and a batch of one "
                    "row has no others: set prefer.batch to 2 or more"
                )
        super().prepare(batch, budget, runtime)

    def _mismatched(self, batch: list[ScoredRow], budget: Budget, runtime: Runtime) -> float:
        pairs = [
            AnswerRow(row.row, row.prompt_text, row.prompt, answer, end)
            for row, other in zip(batch, batch[1:] + batch[:1], strict=True)
            for answer, end in zip(other.answers, other.finished, strict=True)
        ]
        mine = runtime.share(pairs)

        def work(tokens: int) -> float:
            total = 0.0
            for index in micro_batches([len(pair.prompt) + len(pair.answer) for pair in mine], tokens):
                rows = [mine[i] for i in index]
                try:  # not cached: the next epoch mixes them anew
                    parts = self._parts(self._asked(rows, [(i, "answer") for i in range(len(rows))]), None)
                except NotFinite as error:
                    raise error.among(mine, index) from None
                total += (parts[""] - parts["reference"]).sum().item()
            return total

        return runtime.sum({"total": budget.within(work)})["total"] / len(pairs)

    def loss(self, rows: list[ScoredRow], total: float) -> tuple[Tensor, Sums]:
        read = self._read(rows)
        losses = self.function(*(read[name] for name in self.wanted), **self.options)
        require_finite(losses, self.trained, "loss")
        return losses.sum() / total, self._sums(read)

    def ids(self, rows: list[ScoredRow]) -> list[Ids]:
        return [(tuple(row.prompt), tuple(answer)) for row in rows for answer in row.answers]

    def answers(self, rows: list[ScoredRow]) -> Answers:
        """Row by row."""
        flat = [
            AnswerRow(row.row, row.prompt_text, row.prompt, answer, end)
            for row in rows
            for answer, end in zip(row.answers, row.finished, strict=True)
        ]
        of = [(i, f"answers.{k}") for i, row in enumerate(rows) for k in range(len(row.answers))]
        return self._asked(flat, of)

    def _read(self, rows: list[ScoredRow]) -> dict[str, Tensor]:
        device, asked = self.role.backbone.device, self.answers(rows)
        parts = self._parts(asked, self.cache)
        parts["lengths"] = asked.batch.lengths.float()
        parts["scores"] = torch.tensor([s for row in rows for s in row.scores], dtype=torch.float32, device=device)
        counts = torch.tensor([len(row.answers) for row in rows], device=device)
        there = torch.arange(int(counts.max()), device=device) < counts[:, None]
        where = there.nonzero(as_tuple=True)  # in the order of ``flat``
        read = {name or "logprobs": p.new_zeros(there.shape).index_put(where, p) for name, p in parts.items()}
        read["there"] = there
        if "baseline" in self.wanted:
            assert self.baseline is not None, "prepare comes first"
            read["baseline"] = torch.full((len(rows),), self.baseline, device=device)
        return read

    def _asked(self, flat: list[AnswerRow], of: list[tuple[int, str]]) -> Answers:
        prompts, answers = [row.prompt for row in flat], [row.answer for row in flat]
        batch = collate_completions(prompts, answers, [row.finished for row in flat], self.pad)
        ids = [(tuple(row.prompt), tuple(row.answer)) for row in flat]
        return Answers(batch.to(self.role.backbone.device), ids, of)

    @torch.no_grad()
    def _sums(self, read: dict[str, Tensor]) -> Sums:
        there, reward = read["there"], read["logprobs"].detach()
        if self.reference is not None:
            reward = reward - read["reference"]
        elif "lengths" in self.wanted:
            reward = reward / read["lengths"].clamp(min=1)
        reward = option(self.function, self.options, "beta", 1.0) * reward
        gaps, counted = ordered(
            reward, read["scores"], there, option(self.function, self.options, "desirable_above", 0.5)
        )
        count = counted.sum((1, 2)).clamp(min=1)
        right = torch.where(counted, (gaps > 0) + 0.5 * (gaps == 0), 0.0).sum((1, 2)) / count
        sums = {
            "accuracy": torch.where(counted.any(-1).any(-1), right, 0.5).sum().item(),
            "margin": (torch.where(counted, gaps, 0.0).sum((1, 2)) / count).sum().item(),
            "reward": (masked_sum(reward, there) / there.sum(-1).clamp(min=1)).sum().item(),
        }
        return sums | ({"baseline": read["baseline"].sum().item()} if "baseline" in read else {})


def ordered(
    reward: Float[Tensor, "B N"], scores: Float[Tensor, "B N"], there: Bool[Tensor, "B N"], above: float
) -> tuple[Float[Tensor, "B N N"], Bool[Tensor, "B N N"]]:
    """Reward gaps that should be positive, and which of them count: answer i less answer j where i scores higher.

    A lone answer has no other: its gap is its reward, turned round where its score is not over ``above``.
    """
    gaps = reward[:, :, None] - reward[:, None, :]
    counted = (scores[:, :, None] > scores[:, None, :]) & there[:, :, None] & there[:, None, :]
    alone = there.sum(-1) == 1
    own = torch.where(scores > above, reward, -reward)
    gaps = torch.where(alone[:, None, None], torch.diag_embed(own), gaps)
    return gaps, torch.where(alone[:, None, None], torch.diag_embed(there), counted)
