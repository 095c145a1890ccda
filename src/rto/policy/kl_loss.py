"""The KL to the reference as a part of the loss, with the gradient that it should have."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rto.rewards.kl import ESTIMATORS, Estimator


def kl_loss(
    logprobs: Float[Tensor, "B T"], reference: Float[Tensor, "B T"], estimator: Estimator
) -> Float[Tensor, "B T"]:
    """A loss a token (nats): the value of ``estimator``, the gradient of k2.

    On the policy's own samples k2's gradient, (log pi - log pi_ref) grad log pi, is in expectation that of
    KL(pi, pi_ref). Differentiated as they stand, k1 has expected gradient zero and k3 that of KL(pi_ref, pi). A
    later pass over the same rollouts sees a policy that has moved on; there the gradient is approximate.
    """
    difference = logprobs - reference
    k2 = ESTIMATORS["k2"](difference)
    return ESTIMATORS[estimator](difference).detach() + (k2 - k2.detach())  # the bracket is exactly 0
