"""The location-aware normaliser of segment values: mean and std as lines over the log of the location.

Segment k of K (from 1) lies at p = k / K. Later segments score higher and vary more, so that one mean and std for
all would reward where a segment stands (Segmenting Text and Learning Their Rewards, arXiv 2501.02790; its code).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rto.segments import segment_counts

TINY = 1e-10  # added to p inside the log, as published


def locations(ends: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """p = k / K on the end of segment k (from 1) of K, 0 elsewhere."""
    ends = ends & mask
    share = ends.cumsum(-1) / segment_counts(ends).clamp(min=1)[:, None]
    return torch.where(ends, share, 0.0)


@dataclass(frozen=True)
class Normaliser:
    """mean(p) = w_mu log p + b_mu and std(p) = max(w_sigma log p + b_sigma, floor), in the scorer's raw units.

    ``answers`` and ``segments`` count what it was fitted on. The lists hold the statistics of each distinct
    location (p to three decimals) that the lines were fitted to.

    Raises:
        ValueError: the floor is not positive. Without one, std(p) is negative below exp(-b_sigma / w_sigma).
    """

    w_mu: float
    b_mu: float
    w_sigma: float
    b_sigma: float
    floor: float
    answers: int = 0
    segments: int = 0
    locations: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise ValueError(
                f"reward.normaliser.floor = {self.floor} must be above 0: it keeps the fitted std positive"
            )

    def mean(self, location: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        return self.w_mu * (location + TINY).log() + self.b_mu

    def std(self, location: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        return (self.w_sigma * (location + TINY).log() + self.b_sigma).clamp(min=self.floor)

    def apply(
        self, values: Float[Tensor, "B T"], ends: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """(v - mean(p)) / std(p) on the segments' ends, 0 elsewhere."""
        location = locations(ends, mask)
        return torch.where(ends & mask, (values - self.mean(location)) / self.std(location), 0.0)

    @property
    def floored(self) -> float:
        """Share of the segments it was fitted on whose std is the floor."""
        under = self.w_sigma * (torch.tensor(self.locations) + TINY).log() + self.b_sigma < self.floor
        return (under * torch.tensor(self.counts)).sum().item() / max(1, self.segments)


def fit(values: Float[Tensor, " N"], locations: Float[Tensor, " N"], floor: float) -> Normaliser:
    """Fit both lines to the mean and the std (population) of ``values`` at each distinct location.

    Huber regression (epsilon 1.35, alpha 1e-4) on log(p + 1e-10), every location with the same weight, as
    published: a location that was seen once has std 0 and pulls as hard as one that was seen often.
    Locations are rounded to three decimals, and to 0.001 at least.

    Raises:
        ValueError: a value is NaN or infinite, or there are fewer than two distinct locations.
    """
    from sklearn.linear_model import HuberRegressor  # 1 s to import

    if not torch.isfinite(values).all():
        raise ValueError("a segment value is NaN or infinite: the scorer is broken, train it again (a lower reward.lr)")
    exact = values.cpu().double()
    thousandths, where = (locations.cpu().double() * 1000).round().clamp(min=1).unique(return_inverse=True)
    if len(thousandths) < 2:
        raise ValueError(
            f"the normaliser needs segments at two locations or more, found {len(thousandths)}: lower reward.cutoff or "
            "fit on more answers (reward.normaliser.limit); a scorer of whole answers (cutoff = 'none') needs none"
        )
    counts = where.bincount()
    means = where.bincount(exact) / counts
    stds = (where.bincount((exact - means[where]) ** 2) / counts).sqrt()
    distinct = thousandths / 1000
    logs = (distinct + TINY).log().numpy()[:, None]
    lines = [HuberRegressor(epsilon=1.35, alpha=1e-4, max_iter=10_000).fit(logs, y.numpy()) for y in (means, stds)]
    (w_mu, b_mu), (w_sigma, b_sigma) = ((float(line.coef_[0]), float(line.intercept_)) for line in lines)
    return Normaliser(
        w_mu,
        b_mu,
        w_sigma,
        b_sigma,
        floor,
        answers=int((locations == 1).sum()),
        segments=len(values),
        locations=distinct.tolist(),
        means=means.tolist(),
        stds=stds.tolist(),
        counts=counts.tolist(),
    )
