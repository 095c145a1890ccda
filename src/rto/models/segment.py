"""A scorer that is read at the ends of segments (arXiv 2501.02790, Eq. 4): the sentence reward is their mean."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.batch import Completions
from rto.finite import require_finite
from rto.models.role import Role
from rto.segments import segment_ends


class SegmentScorer(Role):
    """``role`` with the segments that ``reference``'s entropy cuts at ``cutoff`` (nats). At 0, where every token is a
    segment, no reference is read."""

    def __init__(self, role: Role, reference: Role | None, cutoff: float) -> None:
        assert reference is not None or cutoff == 0
        super().__init__(role.backbone, role.adapter, role.head)
        self.reference = reference
        self.cutoff = cutoff

    def scores(self, completions: Completions) -> Float[Tensor, " B"]:
        """Mean of the head over each answer's segment ends: a sum would favour length.

        Raises:
            NotFinite: the reference, whose entropy cuts the segments, says no numbers.
        """
        entropy = torch.zeros(completions.ids.shape, device=completions.ids.device)
        if self.reference is not None:
            with torch.no_grad():  # first, while no activations of the scorer are held
                logprobs, entropy = self.reference.logprobs(completions)
            require_finite(logprobs, "reference", "log-prob")
        ends = segment_ends(entropy, completions.mask, completions.finished, self.cutoff)
        return mean_at_ends(self.token_scores(completions), ends, completions.mask)


def mean_at_ends(
    values: Float[Tensor, "B T"], ends: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """The mean over the segment ends. An answer without a segment, its end of sequence alone, is read there."""
    places = torch.where(ends.any(-1, keepdim=True), ends, mask)
    return torch.where(places, values, 0.0).sum(-1) / places.sum(-1).clamp(min=1)
