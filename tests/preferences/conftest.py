"""The tiny world's rows around a random model, in full training and with adapters."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rto.data.rows import make_rows, make_tokenizer
from rto.models.checkpoint import save_role
from rto.models.load import scratch_network
from rto.models.role import Backbone, Role
from rto.models.runtime import Runtime
from rto.models.workshop import Workshop
from rto.recipe import build

SCRATCH = {"type": "scratch", "hidden": 16, "layers": 1, "heads": 2, "intermediate": 16}
DATA = {"type": "world", "sft": 24, "pairs": 24, "prompts": 4, "test": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Rows of the tiny world, a workshop around a random model of 16 dimensions, and ``shop_of`` for others of the
    same base with other settings of [model]."""
    config = build({"model": SCRATCH, "data": DATA, "evaluation": {"oracle": {"type": "world"}}})
    tokenizer = make_tokenizer(config, None)
    rows = make_rows(config, tokenizer)
    network = scratch_network(config.model, tokenizer, rows.encoder.end, seed=0)
    folder = tmp_path_factory.mktemp("base")
    save_role(Role(Backbone(network, "scratch", None, torch.float32)), folder, tokenizer, rows.encoder.pad)
    runtime = Runtime("cpu")

    def shop_of(**settings: Any) -> Workshop:
        return Workshop(config.model.model_copy(update=settings), str(folder), tokenizer, runtime, 0)

    return SimpleNamespace(rows=rows, shop=shop_of(), shop_of=shop_of, runtime=runtime, pad=rows.encoder.pad)


@pytest.fixture
def nudged() -> Callable[..., Role]:
    """Move a role's weights a little, the same way every time, and have them trained."""

    def nudge(role: Role, size: float = 0.2) -> Role:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in role.parameters():
                p.add_(torch.randn(p.shape, generator=draw) * size)
                p.requires_grad_(True)
        return role

    return nudge
