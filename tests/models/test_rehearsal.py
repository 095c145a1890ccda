"""What a rehearsal counts."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rto.models.rehearsal import Tally


@pytest.mark.parametrize(("device", "counted"), [(None, 12), ("cpu", 12), ("cuda", 0)])
def test_only_what_is_on_the_device_is_counted(device, counted):
    """A checkpoint that a GPU's weights are written from lies in main memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        ghost = torch.empty(3)
    tally = Tally(vocabulary=100)
    tally.device = device
    with tally:
        kept = ghost + 1
    assert tally.total == tally.peak == counted
    del kept
    assert tally.total == 0
