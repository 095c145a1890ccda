"""Whether a recipe fits into the machine, and what to change where it does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto.config import Config
from rto.models.rehearsal import heap_of
from rto.pipeline import machine
from rto.pipeline.job import Job
from rto.pipeline.memory_plan import Rehearsal, StageMemory

MB = 2**20


@dataclass(frozen=True)
class Misfit:
    """A stage that does not fit. ``micro_tokens``: the largest power of two that would, None: none does."""

    stage: str
    needed: int
    micro_tokens: int | None
    text: str


@dataclass(frozen=True)
class Sizing:
    """Bytes. ``base`` is what the process holds without a model (0 on a GPU), ``limit`` what it may hold; ``disk`` by
    what lies there."""

    device: str
    base: int
    limit: int
    stages: list[StageMemory]
    misfits: list[Misfit]
    disk: dict[str, int]
    disk_needed: int
    free: int

    @property
    def fits(self) -> bool:
        return not self.misfits and self.disk_needed <= self.free

    def peak(self, stage: StageMemory) -> int:
        return self.base + stage.bytes


def sizing(config: Config, job: Job, stages: Sequence[str]) -> Sizing:
    """Rehearse the stages in order."""
    runtime = job.runtime
    machine.warm_up(config.model.lora is not None, runtime)
    base = machine.resident() if runtime.device.type == "cpu" else 0
    limit = machine.memory(runtime.device)
    found = []
    for name, rehearse in Rehearsal(config, job.rows, runtime, heap_of(runtime.device)).stages(stages).items():
        if sys.stderr.isatty():  # about a second a layer
            print(f"rehearsing {name}", file=sys.stderr)
        found.append(rehearse())
    misfits = [_misfit(config, job, stage, base, limit) for stage in found if base + stage.bytes > limit]
    disk = _disk(config, job, found, stages)
    models = sum(size for name, size in disk.items() if not name.startswith("checkpoints"))
    needed = models + max((size for name, size in disk.items() if name.startswith("checkpoints")), default=0)
    free = machine.disk(Path(config.output))
    return Sizing(str(runtime.device), base, limit, found, misfits, disk, needed, free)


def _misfit(config: Config, job: Job, stage: StageMemory, base: int, limit: int) -> Misfit:
    """The largest power of two that fits is searched for by bisection. Its holes are in proportion to those of the
    configured one."""
    share = stage.bytes / max(1, stage.alive)
    verb = "evaluate" if stage.stage == "oracle" else stage.stage.partition("/")[0]

    def fits(exponent: int) -> bool:
        smaller = Rehearsal(_with_micro_tokens(config, 2**exponent), job.rows, job.runtime, None)
        return base + smaller.stages([verb])[stage.stage]().alive * share <= limit

    low, high = 0, max(1, stage.micro_tokens - 1).bit_length()  # of 2 ** low it is known that it fits, of high not
    fitting = None
    if high > 0 and fits(low):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        fitting = 2**low
    needed = base + stage.bytes
    roles: dict[str, int] = {}
    for (role, kind), size in stage.parts.items():
        roles[f"{role} {kind}"] = size
    worst = sorted(roles.items(), key=lambda item: -item[1])[:4]
    said = ", ".join(f"{name} {size / MB:,.0f}" for name, size in worst)
    text = f"{stage.stage} does not fit: it needs {needed / MB:,.0f} MB, {limit / MB:,.0f} are there ({said}). "
    return Misfit(stage.stage, needed, fitting, text + _advice(config, stage, fitting))


def _advice(config: Config, stage: StageMemory, fitting: int | None) -> str:
    if fitting is not None:
        return f"It would fit with micro_tokens = {fitting} instead of {stage.micro_tokens}; the result is the same"
    ways = []
    if config.model.lora is None:
        ways.append("train adapters (model.lora.r = 16)")
    if not config.model.gradient_checkpointing:
        ways.append("set model.gradient_checkpointing = true")
    ways.append("lower data.max_response and data.max_prompt, or take a smaller model")
    return "No micro_tokens would do: " + "; ".join(ways)


def _with_micro_tokens(config: Config, tokens: int) -> Config:
    changes: dict[str, Any] = {}
    for name in ("sft", "prefer", "reward", "policy"):
        section = getattr(config, name)
        changes[name] = section.model_copy(update={"micro_tokens": min(section.micro_tokens, tokens)})
    for name in ("guides", "scorers", "baselines"):
        tables = getattr(config, name)
        changes[name] = {
            key: table | ({"micro_tokens": min(table["micro_tokens"], tokens)} if "micro_tokens" in table else {})
            for key, table in tables.items()
        }
    return config.model_copy(update=changes)


def _disk(config: Config, job: Job, found: Sequence[StageMemory], stages: Sequence[str]) -> dict[str, int]:
    """Models stay; the checkpoints of a stage go when it is finished, and one more than is kept must fit."""
    parts = {f"model of {stage.stage}": stage.saved for stage in found if stage.saved}
    for stage in found:
        if stage.state:
            parts[f"checkpoints of {stage.stage}"] = (config.checkpoints.keep + 1) * stage.state
    if "evaluate" in stages:
        settings, rows = config.evaluation, job.rows
        asked = settings.samples * min(settings.prompts, len(rows.test_prompts))
        policies = 1 + len(config.preferences()) + len(config.policies())
        # Text and ids of a token: about 16 characters of JSON.
        parts["answers"] = 16 * policies * asked * (rows.encoder.max_prompt + rows.encoder.max_response)
    return parts
