"""What the rto sides share: opening the roles, and the turns of a supervised stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.speed.case import Case, Row, tokens
from benchmarks.speed.turns import Turns

Loaded = tuple[Any, Any]  # Workshop, Runtime


def workshop(case: Case) -> Loaded:
    """The roles of the case's model, and the machine."""
    from rto.config import Lora, Pretrained
    from rto.models.load import load_tokenizer
    from rto.models.runtime import Runtime
    from rto.models.workshop import Workshop

    runtime = Runtime(case.device)
    keys = {"dtype": case.dtype, "attention": case.attention, **case.keys}
    model = Pretrained(name=case.model, lora=Lora(r=case.lora) if case.lora else None, **keys)
    return Workshop(model, case.model, load_tokenizer(case.model), runtime, case.seed), runtime


def pairs(batch: list[Row]) -> list[Any]:
    from rto.data.chat import PairRow

    return [
        PairRow(i, "", row["prompt"], row["chosen"], True, row["rejected"], True, 0.0) for i, row in enumerate(batch, 1)
    ]


def training(case: Case, **more: Any) -> dict[str, Any]:
    """The settings of every optimiser, as the peers get them in ``theirs.arguments``."""
    return {
        "lr": case.lr,
        "schedule": "constant",
        "warmup": 0.0,
        "betas": (0.9, 0.999),
        "micro_tokens": case.micro_tokens,
        **more,
    }


def settings(case: Case) -> dict[str, Any]:
    """What is told beside the times."""
    found = {"dtype": case.dtype, "attention": case.attention, "micro_tokens": case.micro_tokens, **case.keys}
    if case.device == "cpu":
        found["malloc"] = "keeps freed blocks by itself"
    return found | ({"lora r": case.lora} if case.lora else {})


def refuse(said: str) -> None:
    """What a run would go on with after telling of it: fewer tokens a pass than the table says."""
    raise RuntimeError(f"{said}: give a smaller --micro-tokens")


def supervised(case: Case, objective: Any, batches: list[list[Any]], runtime: Any, turns: Turns) -> None:
    """Optimiser steps of rto.preferences.train, one a turn."""
    from rto.config import Supervised
    from rto.models.memory import Budget
    from rto.optim import Optimizer
    from rto.preferences.train import gradients

    config = Supervised.model_validate(training(case))
    optimizer = Optimizer(objective.role.parameters(), config, config.lr, case.turns)
    budget = Budget(config.micro_tokens, refuse, runtime.gather_all)
    for name in ("prepare", "loss"):
        if hasattr(objective, name):
            setattr(objective, name, _timed(getattr(objective, name), turns))
    turns.ready({**settings(case), "optimizer": type(optimizer.inner).__name__})
    while True:
        batch = batches[turns.number % len(batches)]
        turns.begin()
        with turns.phase("backward"):
            loss, sums = gradients(objective, batch, budget, runtime, optimizer.forget)
        optimizer.step()
        turns.stop()
        checks = {"loss": loss}
        if "margin" in sums:
            checks["margin"] = sums["margin"] / len(batch)
        turns.end(sum(map(tokens, case.batch(turns.number))), "optimiser", checks)


def _timed(work: Callable[..., Any], turns: Turns) -> Callable[..., Any]:
    def timed(*given: Any) -> Any:
        with turns.phase("forward"):
            return work(*given)

    return timed
