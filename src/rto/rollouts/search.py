"""Beam search with a preference-trained policy as its own value function.

"From r to Q*" (Rafailov et al. 2024, arXiv 2404.12358; from memory of the paper, not checked against its text). For the
optimal policy of the KL-penalised objective, the sum over a partial answer of

    beta log pi(a_t|s_t)                               is  sum (r + beta log pi_ref)  +  V(s_k+1) - V(s_1),
    beta (log pi(a_t|s_t) - log pi_ref(a_t|s_t))       is  sum r                      +  V(s_k+1) - V(s_1).

V(s_1) is the same for all answers to a prompt, and beta > 0 is a factor of the whole: neither changes an order, so
beams are compared by the sums of log-probs or of log-ratios alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rto.batch import Completions, Prompts
from rto.data.collate import collate_prompts, micro_batches
from rto.models.role import Role
from rto.models.workshop import check_positions

Search = Literal["sample", "beams"]  # how `rto generate` finds an answer
Score = Literal["policy", "implicit"]
NONE = float("-inf")  # the score of a beam that is not there


@torch.no_grad()
def beam_search(
    guide: Role,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int = 5,
    score: Score = "policy",
    reference: Role | None = None,
    length_norm: bool = False,
    limit: int,
    end: int,
    pad: int,
    budget: int = 16384,
) -> tuple[Completions, Float[Tensor, " N"]]:
    """The best answer found to each of N prompts (T = ``limit``) and its score in nats, on the CPU.

    ``score`` "policy" sums log pi_guide over the answer, end of sequence included; "implicit" sums log pi_guide -
    log pi_ref and needs the ``reference``. ``length_norm`` divides the sum by the number of tokens. A beam grows by
    the guide's 2 x ``beams`` likeliest tokens only: under "policy" nothing is lost, under "implicit" it keeps out
    tokens that both models find impossible, whose ratio says nothing.

    Of all growths of a prompt's beams, an end of sequence among the best ``beams`` is put aside as a finished answer
    and the best ``beams`` others go on; what reaches the limit competes unfinished. Nothing is drawn: a row depends
    on its prompt alone. ``budget`` bounds rows x beams x (prompt + answer).

    Raises:
        ValueError: ``beams`` or ``limit`` is below 1, the reference is missing or is of no use, or an answer's score
            is not finite, or the longest prompt and an answer are more than the models read.
    """
    if beams < 1 or limit < 1:
        raise ValueError(f"beams and limit: at least 1 (given: {beams} and {limit})")
    if score not in get_args(Score) or (score == "implicit") != (reference is not None):
        raise ValueError(f"score = {score!r}: known are 'policy', without a reference, and 'implicit', with one")
    for role in (guide, reference):
        if role is not None:
            check_positions(role.backbone, max(map(len, prompts)) + limit)
    ids = torch.full((len(prompts), limit), pad)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    scores = torch.full((len(prompts),), NONE)
    roles = [guide] if reference is None else [guide, reference]
    for rows in micro_batches([beams * (len(prompt) + limit) for prompt in prompts], budget):
        part = collate_prompts([prompts[i] for i in rows], pad).to(guide.backbone.device)
        where = torch.tensor(rows)
        found = _search(roles, part, beams, length_norm, limit, end, pad)
        ids[where], lengths[where], finished[where], scores[where] = (tensor.cpu() for tensor in found)
    if not scores.isfinite().all():
        first = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(
            f"beam search: the best answer to prompt {first + 1} has score {scores[first]:g}: "
            "the model's log-probs are no finite numbers, look at its weights"
        )
    mask = torch.arange(limit) < lengths[:, None]
    return Completions(collate_prompts(prompts, pad), ids, mask, finished), scores


def _search(
    roles: list[Role], prompts: Prompts, beams: int, length_norm: bool, limit: int, end: int, pad: int
) -> tuple[Int[Tensor, "N L"], Int[Tensor, " N"], Bool[Tensor, " N"], Float[Tensor, " N"]]:
    """Ids, lengths, finished and scores of the best answers. ``roles``: the guide, and perhaps the reference."""
    from transformers import DynamicCache

    device = prompts.ids.device
    best_ids = torch.full((len(prompts), limit), pad, device=device)
    best_lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    best_finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    best_scores = torch.full((len(prompts),), NONE, device=device)
    caches: list[Any] = [DynamicCache(config=role.backbone.network.config) for role in roles]
    row = torch.arange(len(prompts), device=device)  # [b]: the prompts that are still searched
    totals = torch.zeros(len(prompts), 1, device=device)  # [b, k]: k grows from 1 to ``beams``
    texts = prompts.ids.new_zeros(len(prompts), 1, 0)  # [b, k, t]
    step, mask = prompts.ids, prompts.mask
    for t in range(1, limit + 1):
        gains, tokens = _growths(roles, caches, step, mask, 2 * beams)
        b, k = totals.shape
        grown = torch.where(gains.view(b, k, -1) > NONE, totals[..., None] + gains.view(b, k, -1), NONE)
        grown = grown.where(totals[..., None] > NONE, NONE).flatten(1)
        # At most one growth of a beam ends it, so of the best 2 x beams at least ``beams`` can go on.
        ranked, order = grown.topk(min(2 * beams, grown.shape[1]))
        parents, chosen = order // tokens.shape[-1], tokens.view(b, -1).gather(1, order)
        written = torch.cat([_take(texts, parents), chosen[..., None]], -1)

        stops = (chosen == end)[:, :beams] if t < limit else torch.ones_like(chosen[:, :beams], dtype=torch.bool)
        value, place = torch.where(stops, ranked[:, :beams], NONE).max(1)
        value = value / t if length_norm else value
        better = value > best_scores[row]
        there, place = row[better], place[better]
        best_ids[there, :t] = written[better, place]
        best_lengths[there] = t
        best_finished[there] = chosen[better, place] == end
        best_scores[there] = value[better]
        if t == limit:
            break

        totals, keep = torch.where(chosen == end, NONE, ranked).topk(min(beams, ranked.shape[1]))
        live = totals[:, 0] > NONE
        if len(roles) == 1:  # log-probs are never positive: no answer of a beam scores more than this
            live &= totals[:, 0] / (limit if length_norm else 1) > best_scores[row]
        if not live.any():
            break
        source = (torch.arange(b, device=device)[:, None] * k + parents.gather(1, keep))[live].flatten()
        for cache in caches:
            cache.reorder_cache(source)
        row, totals, texts = row[live], totals[live], _take(written, keep)[live]
        step = texts[..., -1].reshape(-1, 1)
        mask = torch.cat([mask[source], mask.new_ones(len(source), 1)], -1)
    return best_ids, best_lengths, best_finished, best_scores


def _growths(
    roles: list[Role], caches: list[Any], step: Int[Tensor, "R n"], mask: Bool[Tensor, "R s"], width: int
) -> tuple[Float[Tensor, "R m"], Int[Tensor, "R m"]]:
    """What each of the guide's ``width`` likeliest next tokens adds to a beam's total (-inf: impossible)."""
    gains = tokens = None
    for role, cache in zip(roles, caches, strict=True):
        backbone = role.activate()  # guide and reference may be adapters of one backbone
        logprobs = backbone.project(backbone.states(step, mask, cache)[:, -1]).float().log_softmax(-1)
        if gains is None or tokens is None:
            gains, tokens = logprobs.topk(min(width, logprobs.shape[-1]))
        else:
            gains = torch.where(gains > NONE, gains - logprobs.gather(-1, tokens), NONE)
    assert gains is not None and tokens is not None, "no guide"
    return gains, tokens


def _take(texts: Int[Tensor, "b k t"], index: Int[Tensor, "b c"]) -> Int[Tensor, "b c t"]:
    """The beams ``index`` of each row."""
    return texts.gather(1, index[..., None].expand(-1, -1, texts.shape[-1]))
