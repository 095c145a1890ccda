"""What a recipe would do, and whether this machine can: data, checks, steps, memory and disk of every stage."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rto import config as recipe
from rto import rewards
from rto.config import Config, Training
from rto.data.report import DataReport, data_report
from rto.data.rows import Rows
from rto.pipeline.checks import Check, checks
from rto.pipeline.job import Job
from rto.pipeline.memory_plan import StageMemory
from rto.pipeline.resolve import check_stages, resolve, segment_scorers, terms_of
from rto.pipeline.sizing import Sizing, sizing
from rto.policy.train import planned, reads_values
from rto.preferences import PREFERENCE_LOSSES
from rto.preferences.train import reads_groups

MB, GB = 2**20, 2**30
KINDS = ("weights", "adapters", "gradients", "optimiser", "activations", "logits", "KV cache", "copy")


@dataclass(frozen=True)
class Plan:
    """``stages`` are lines for people; the rest is in bytes and counts."""

    config: Config
    data: DataReport
    checks: list[Check]
    stages: list[str]
    sizing: Sizing

    @property
    def ready(self) -> bool:
        """Whether everything fits and no check has failed."""
        return self.sizing.fits and not any(check.level == "problem" for check in self.checks)


def make_plan(config: Config, stages: Sequence[str] | None = None) -> Plan:
    """The plan of a recipe, or of only ``stages``. The data are read and encoded; nothing is written, no weights are
    loaded.

    Raises:
        ValueError: as a run would, for a recipe or data that it refuses.
    """
    config = resolve(config)
    check_stages(config, stages or config.stages)
    job = Job(config, quiet=True)
    rows, wanted = job.rows, list(stages or config.stages)
    told = _stages(config, rows, wanted)
    return Plan(config, data_report(rows), checks(config, rows, job.runtime), told, sizing(config, job, wanted))


def as_json(plan: Plan) -> str:
    """For programs: bytes, not MB."""
    found = plan.sizing
    memory = [
        {
            "stage": stage.stage,
            "micro_tokens": stage.micro_tokens,
            "peak": found.peak(stage),
            "holes": stage.holes,
            "roles": _by_role(stage),
        }
        for stage in found.stages
    ]
    table = {
        "ready": plan.ready,
        "config": plan.config.model_dump(mode="json"),
        "data": asdict(plan.data),
        "checks": [asdict(check) for check in plan.checks],
        "stages": [line.strip() for line in plan.stages],
        "memory": {"device": found.device, "available": found.limit, "base": found.base, "stages": memory},
        "disk": {"free": found.free, "needed": found.disk_needed, "parts": found.disk},
        "misfits": [asdict(misfit) for misfit in found.misfits],
    }
    return json.dumps(table, indent=1, ensure_ascii=False)


def describe(plan: Plan) -> str:
    """For people."""
    parts = [json.dumps(plan.config.model_dump(mode="json"), indent=1, ensure_ascii=False)]
    parts += ["", "data", *_data(plan.data), "", "checks", *_checks(plan.checks), "", "stages", *plan.stages]
    parts += ["", "memory", *_memory(plan.sizing), "", "disk", *_disk(plan.sizing), "", "verdict", *_verdict(plan)]
    return "\n".join(parts)


def _data(report: DataReport) -> list[str]:
    lines = [f"  {name}: {count:,}" for name, count in report.rows.items()]
    if report.lengths:
        table = [["tokens", "median", "90 %", "longest", "cut"]]
        for name, one in report.lengths.items():
            cut = f"{one.cut:,} ({one.cut / one.count:.1%})"
            table.append([name, f"{one.median:,}", f"{one.most:,}", f"{one.longest:,}", cut])
        lines += _table(table)
    lines += [f"  {count:,} {name}" for name, count in report.duplicates.items()]
    for reason, numbers in sorted(report.rejected.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        lines.append(f"  rejected, {reason}: {len(numbers):,} (rows {shown})")
    return lines


def _checks(found: Sequence[Check]) -> list[str]:
    mark = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
    return [f"  {mark[check.level]:<8}{check.name}: {check.text}" for check in found]


def _by_role(stage: StageMemory) -> dict[str, dict[str, int]]:
    roles: dict[str, dict[str, int]] = {}
    for (role, kind), size in stage.parts.items():
        roles.setdefault(role, {})[kind] = size
    return roles


def _memory(found: Sizing) -> list[str]:
    """Stage by stage, in MB: what is alive at the fullest moment, by role."""
    used = [kind for kind in KINDS if any(kind == k for stage in found.stages for _, k in stage.parts)]
    table = [["stage", "role", *used, "in all"]]
    for stage in found.stages:
        name = stage.stage
        for role, kinds in _by_role(stage).items():
            cells = [_mb(kinds[kind]) if kind in kinds else "" for kind in used]
            table.append([name, role, *cells, _mb(sum(kinds.values()))])
            name = ""
        for role, size in (("allocator", stage.holes), ("process", found.base)):
            if size:
                table.append([name, role, *[""] * len(used), _mb(size)])
        table.append(["", "peak", *[""] * len(used), _mb(found.peak(stage))])
    lines = [f"  MB on {found.device}, which has {found.limit / MB:,.0f}; each stage at its fullest moment"]
    return [*lines, *_table(table)]


def _disk(found: Sizing) -> list[str]:
    table = [[name, _mb(size)] for name, size in found.disk.items()]
    lines = _table(table)
    return [*lines, f"  at most {found.disk_needed / MB:,.0f} MB at once; {found.free / MB:,.0f} MB are free"]


def _verdict(plan: Plan) -> list[str]:
    found = plan.sizing
    lines = [f"  {misfit.text}" for misfit in found.misfits]
    if found.disk_needed > found.free:
        lines.append("  the disk is too small: choose another --output, or keep fewer checkpoints (checkpoints.keep)")
    lines += [f"  {check.name}: {check.text}" for check in plan.checks if check.level == "problem"]
    if lines:
        return lines
    most = max((found.peak(stage) for stage in found.stages), default=found.base)
    line = f"  fits: {most / MB:,.0f} of {found.limit / MB:,.0f} MB, with micro_tokens as configured"
    if most > 0.85 * found.limit:
        line += "; that is close, and the figure is good to about 15 %"
    return [line]


def _mb(size: int) -> str:
    return f"{size / MB:,.0f}" if size >= MB else f"{size / MB:.1f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def cell(text: str, i: int, first: bool) -> str:
        return text.ljust(widths[i]) if i == 0 or (text and text[0].isalpha() and not first) else text.rjust(widths[i])

    return ["  " + "  ".join(cell(t, i, n == 0) for i, t in enumerate(row)).rstrip() for n, row in enumerate(rows)]


def _stages(config: Config, rows: Rows, stages: Sequence[str]) -> list[str]:
    def supervised(name: str, training: Training, count: int, checkpoint: str | None = None) -> str:
        wanted = round(training.epochs * count)
        steps = math.ceil(min(wanted, (training.max_steps or math.inf) * training.batch) / training.batch)
        planned = f"{max(1, steps):,} steps of {training.batch} rows, lr {training.lr:g}"
        return f"  {name}: " + (f"uses {checkpoint}" if checkpoint else planned)

    lines = []
    if "sft" in stages:
        lines.append(supervised("sft", config.sft, len(rows.answers)))
    if "prefer" in stages:
        for stage, guide in config.preferences().items():
            read = rows.scored or rows.pairs if reads_groups(PREFERENCE_LOSSES[guide.loss["type"]]) else rows.pairs
            lines.append(supervised(stage, guide, len(read), guide.checkpoint))
    if "reward" in stages:
        fitted = segment_scorers(config)
        for stage, scorer in config.rewards().items():
            lines.append(supervised(stage, scorer, len(rows.pairs), scorer.checkpoint))
            if stage in fitted:
                where = "the pairs" if scorer.normaliser.answers == "pairs" else "sampled answers"
                lines.append(f"  {stage}/normaliser: fitted on at most {scorer.normaliser.limit:,} answers of {where}")
    if "rl" in stages:
        for name, policy in config.policies().items():
            terms = terms_of(policy)
            iterations = planned(policy, len(rows.prompts), reads_values(policy), where=f"rl/{name}")
            listed = " + ".join(
                term["type"] + "(" + ", ".join(f"{k} {v:g}" for k, v in term.items() if isinstance(v, float)) + ")"
                for term in rewards.live(terms)
            )
            lines.append(
                f"  rl/{name}: {iterations:,} iterations of {policy.rollouts:,} rollouts, {policy.updates} x "
                f"{policy.rollouts // policy.batch} updates each, lr {policy.lr:g}; "
                f"reward {listed}, KL {policy.kl.coef:g} ({policy.kl.estimator}) in the {policy.kl.place}"
            )
    if "evaluate" in stages:
        if isinstance(config.evaluation.oracle, recipe.HeldoutOracle):
            lines.append(supervised("oracle", config.reward, len(rows.oracle_pairs)))
        prompts = min(config.evaluation.prompts, len(rows.test_prompts))
        lines.append(f"  evaluate: {config.evaluation.samples} answers of every policy to each of {prompts:,} prompts")
    return lines
