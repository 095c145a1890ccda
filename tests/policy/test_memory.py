"""A step that lacks memory in the middle is done again in smaller pieces: weights and metrics are the same."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from rto.models.role import Role

TERMINAL = {"type": "terminal", "scale": 1.0, "clip": 10.0}


def scarce(method):
    """Room for the activations of three rows."""

    def read(role: Role, completions, *more, **options):
        if torch.is_grad_enabled() and len(completions) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method(role, completions, *more, **options)

    return read


@pytest.mark.parametrize("ptx", [0.0, 0.5])
def test_rl_goes_on_with_smaller_micro_batches(world, tmp_path, monkeypatch, ptx):
    config = world.settings(rollouts=8, batch=8, updates=2, max_steps=2, ptx=ptx)
    found = []
    for name in ("whole", "scarce"):
        roles = world.roles()
        if name == "scarce":
            for method in ("logprobs", "values"):
                monkeypatch.setattr(Role, method, scarce(getattr(Role, method)))
        rows = world.run(tmp_path / name, roles, config, [TERMINAL], demonstrations=world.answers if ptx else ())
        found.append((rows, world.weights(roles.policy) + world.weights(roles.critic)))
    (whole, after_whole), (scarce_rows, after_scarce) = found
    for one, other in zip(whole, scarce_rows, strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    for a, b in zip(after_whole, after_scarce, strict=True):
        assert_close(a, b, atol=1e-5, rtol=0)
