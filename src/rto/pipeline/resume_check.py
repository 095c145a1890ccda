"""Does an interrupted run of this recipe, on this machine, go on to the bit? Tried, not promised."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rto.config import Config
from rto.pipeline.job import write_json
from rto.report.log import METRICS, SAMPLES, read_metrics, read_samples

UNTIMED = "tokens_per_second"  # the only metric that may differ


def shortened(config: Config, steps: int, folder: Path) -> Config:
    """The recipe with at most ``steps`` steps or iterations a stage, a checkpoint after each, and no evaluation."""
    few = {"max_steps": steps}
    trained = [stage for stage in config.stages if stage not in ("evaluate", "report")]
    changes: dict[str, Any] = {
        name: getattr(config, name).model_copy(update=few) for name in ("sft", "prefer", "reward", "policy")
    }
    for named in ("guides", "scorers", "baselines"):  # which may have a max_steps of their own
        changes[named] = {name: changed | few for name, changed in getattr(config, named).items()}
    policies = config.policies()  # in which a warm-up must leave the policy a step
    sooner = {name: {"warmup": min(policy.critic.warmup, steps - 1)} for name, policy in policies.items()}
    critic = config.policy.critic.model_copy(update=sooner[config.policy.method])
    changes["policy"] = changes["policy"].model_copy(update={"critic": critic})
    for name, changed in changes["baselines"].items():
        changed["critic"] = {**changed.get("critic", {}), **sooner[name]}
    changes |= {"stages": trained, "output": str(folder)}
    changes["checkpoints"] = config.checkpoints.model_copy(update={"every": 1, "rl_every": 1})
    return config.model_copy(update=changes)


def resume_check(
    config: Config, folder: Path, *, steps: int, kills: int, seed: int, say: Callable[[str], None]
) -> bool:
    """Run the shortened recipe once whole; run it again with SIGKILLs at random moments, each followed by the same
    command, until ``kills`` of them have struck; compare every weight and every row of metrics of each finished run.
    Returns whether all are equal.

    Raises:
        ValueError: a run fails by itself, with what it said.
    """
    whole = folder / "whole"
    begun = time.perf_counter()
    _run(_command(shortened(config, steps, whole)))
    seconds = time.perf_counter() - begun
    say(f"uninterrupted: {seconds:.0f} s; stages {', '.join(dict.fromkeys(r['stage'] for r in read_metrics(whole)))}")
    dice = random.Random(seed)
    struck = finished = unequal = 0
    while struck < kills:
        cut = folder / f"cut{finished}"
        command = _command(shortened(config, steps, cut))
        while _run(command, dice.uniform(0.1, 0.9) * seconds if struck < kills else None):
            struck += 1
            rows = read_metrics(cut)
            place = f"after a step of {rows[-1]['stage']}" if rows else "before the first step"
            say(f"kill {struck} of {kills}: {place}")
        found = list(differences(whole, cut))
        finished, unequal = finished + 1, unequal + bool(found)
        for line in found[:5]:
            say(f"differs: {line}")
    say(f"{struck} kills in {finished} runs: {'all equal to the bit' if not unequal else f'{unequal} differ'}")
    return not unequal


def differences(whole: Path, cut: Path) -> Iterator[str]:
    """The first tensor of every file, and the first row of every log, in which two runs differ."""
    files = sorted({p.relative_to(f) for f in (whole, cut) for p in f.rglob("*.safetensors")})
    for name in files:
        if not ((whole / name).exists() and (cut / name).exists()):
            yield f"{name} is only in one of the runs"
            continue
        one, other = load_file(whole / name), load_file(cut / name)
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other or not torch.equal(one[key], other[key]):
                yield f"{name}: {key}"
                break
    for log, read in ((METRICS, read_metrics), (SAMPLES, read_samples)):
        rows = [[{k: v for k, v in row.items() if k != UNTIMED} for row in read(f)] for f in (whole, cut)]
        for number in range(max(map(len, rows))):
            pair = [r[number] if number < len(r) else None for r in rows]
            if pair[0] != pair[1]:
                yield f"{log}, row {number + 1}: {json.dumps(pair[0])[:120]} and {json.dumps(pair[1])[:120]}"
                break


def _command(config: Config) -> list[str]:
    """The command line of a run; the recipe goes through a run folder's config.json."""
    folder = Path(config.output)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    return [sys.executable, "-m", "rto.cli", "resume", str(folder), "--quiet"]


def _run(command: list[str], kill_after: float | None = None) -> bool:
    """Run it, or SIGKILL it after so many seconds. Returns whether it was killed."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        try:
            _, said = child.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            return True
    if child.returncode:
        raise ValueError(f"the run failed by itself (exit code {child.returncode}): {said.strip()[-500:]}")
    return False
