"""A critic that is a scalar head on the policy's own trunk: one pass gives log-probs and values."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rto.batch import Completions
from rto.models.load import fresh_head
from rto.models.role import Role
from rto.numerics import predicting


class TrunkCritic(Role):
    """A fresh head on the last hidden states of ``policy``. Only the head is its own to step and to save.

    ``detached``: no gradient of the values reaches the trunk.
    """

    head: nn.Linear

    def __init__(self, policy: Role, seed: int, detached: bool) -> None:
        shared = policy.backbone
        super().__init__(shared, policy.adapter, fresh_head(shared.network, seed))
        self.detached = detached

    def parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def values(self, completions: Completions) -> Float[Tensor, "B T"]:
        """As :meth:`Role.values`, with a gradient for the head alone."""
        with torch.no_grad():
            states = predicting(self.hidden(completions), completions.ids.shape[1])
        return self._read(states, completions)

    def logprobs_and_values(
        self, completions: Completions, temperature: float = 1.0
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-probs and entropy as :meth:`Role.logprobs`, and values, from one pass."""
        states = predicting(self.hidden(completions), completions.ids.shape[1])
        logprobs, entropy = self.logprobs_from(states, completions, temperature)
        return logprobs, entropy, self._read(states.detach() if self.detached else states, completions)
