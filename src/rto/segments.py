"""Where segments and sentences end: the single copy that reward models, reward terms and normalisers share.

All on [B, T] in response coordinates, without a loop over rows or tokens. A segment is the stretch of tokens up to
and with its end; segments lie side by side from the first response token on. The body of an answer is all of it
but the end-of-sequence token; an answer that was cut has none, so that all of it is body.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SENTENCE_MARKS = frozenset(".!?\n。！？．｡")  # the last five are full-width and CJK


def last_token(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True on each answer's last token and nowhere else (nowhere at all in a row of padding)."""
    return mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))


def segment_ends(
    entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], finished: Bool[Tensor, " B"], cutoff: float | None
) -> Bool[Tensor, "B T"]:
    """The tokens that end a segment (Segmenting Text and Learning Their Rewards, arXiv 2501.02790; published code).

    ``entropy[t]`` (nats) is that of the reference's distribution which predicts token t, as
    :func:`rto.numerics.token_logprobs` gives it. A token ends a segment where the reference is unsure of the next
    one: body token j does if ``entropy[j + 1] > cutoff``, and the last body token always does. So the
    end-of-sequence token is in no segment, and an answer of nothing else has none.

    ``cutoff`` 0 means tokens: every body token ends a segment, also where its entropy is 0 or rounded below.
    ``cutoff`` None means whole answers: the last token, end-of-sequence or not, ends the only one.
    """
    if cutoff is None:
        return last_token(mask)
    number = mask.cumsum(-1)  # from 1
    body = (mask.sum(-1) - finished.long())[:, None]  # tokens before the end of sequence
    inside = mask & (number <= body)
    if cutoff == 0:
        return inside
    unsure = torch.zeros_like(mask)
    unsure[:, :-1] = entropy[:, 1:] > cutoff
    return inside & (unsure | (number == body))


def segment_index(ends: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The number (from 0) of the segment that each token is in; -1 for a token in none, and for padding."""
    index = ends.cumsum(-1) - ends.long()
    return torch.where(mask & (index < ends.sum(-1, keepdim=True)), index, -1)


def segment_counts(ends: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """K: segments a row."""
    return ends.sum(-1)


def segment_sums(x: Float[Tensor, "B T"], ends: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The sum of ``x`` over each segment, on every one of its tokens; 0 on tokens in none."""
    return _pooled(torch.where(mask, x, 0.0), segment_index(ends, mask))


def segment_lengths(ends: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """n_k: tokens of each segment, on every one of its tokens; 0 on tokens in none."""
    return _pooled(mask.long(), segment_index(ends, mask))


def to_ends(x: Float[Tensor, "B T"], ends: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The sum of ``x`` over each stretch on the token that ends it, 0 on the others.

    What comes after the last end goes to the last token, so that the sum of a row stays as it was.
    """
    ends = (ends & mask) | last_token(mask)
    return torch.where(ends, segment_sums(x, ends, mask), 0.0)


def sentence_ends(texts: Sequence[Sequence[str]], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """The tokens that end a sentence: those whose text has one of ``.!?``, a CJK or full-width full stop, exclamation
    or question mark, or a newline in it; and each answer's last token.

    ``texts`` has the decoded text of every response token of a row; what it has beyond the mask is not read.
    The rule is ours: Semi-RTO's delimiters are neither in its paper nor in published code. A decimal point ends
    a sentence too.
    """
    lengths = mask.sum(-1).tolist()
    ends = last_token(mask)
    for row, (texts_of, length) in enumerate(zip(texts, lengths, strict=True)):
        assert len(texts_of) >= length, f"row {row} has {len(texts_of)} texts for {length} tokens"
        marked = [not SENTENCE_MARKS.isdisjoint(text) for text in texts_of[:length]]
        ends[row, :length] |= torch.tensor(marked, dtype=torch.bool, device=mask.device)
    return ends


def _pooled(x: Tensor, index: Int[Tensor, "B T"]) -> Tensor:
    """Sums of ``x`` over equal ``index``, back on the tokens; 0 where the index is -1."""
    slot = index + 1  # 0 collects what is in no segment
    sums = x.new_zeros(x.shape[0], x.shape[1] + 1).scatter_add(1, slot, x)
    return torch.where(index >= 0, sums.gather(1, slot), 0)
