"""How often the divergence doctor is right: runs with an injected pathology against healthy runs of other seeds.

    python benchmarks/doctor.py --output runs/doctor

One reference, guide and scorer of recipes/tiny.toml serve all runs (``--base RUN``: those of a finished run); only RL
is trained, on the tiny world. A hit is a finding of one of the expected rules; a false alarm is any finding in a
healthy run. Finished runs are not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import rto
from rto.policy import rollout
from rto.report.doctor import Finding, diagnose
from rto.report.log import read_metrics

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny.toml"
RTO = '{ type = "implicit" }, { type = "terminal" }'


@dataclass(frozen=True)
class Case:
    """What is changed in a healthy run, and the rules of which one has to speak."""

    overrides: dict[str, str]
    expected: tuple[str, ...]
    injected: Callable[[], Any] = nullcontext


def intensifiers(prompts: list[str], answers: list[str]) -> list[float]:
    """A hackable reward: words such as "very", up to five an answer."""
    words = {"very", "really", "so", "quite", "truly", "extremely"}
    return [min(5.0, sum(word in words for word in answer.split())) for answer in answers]


def length_bonus(prompts: list[str], answers: list[str], tokens: list[list[str]]) -> list[float]:
    """A tenth a token."""
    return [0.1 * len(row) for row in tokens]


@contextmanager
def late_logprobs() -> Iterator[None]:
    """The sampler records each token's log-prob one token late."""
    generate = rollout.generate

    def shifted(*args: Any, **options: Any) -> Any:
        made = generate(*args, **options)
        late = torch.where(made.completions.mask, made.logprobs.roll(1, -1), 0.0)
        return replace(made, logprobs=late)

    rollout.generate = shifted
    try:
        yield
    finally:
        rollout.generate = generate


def custom(terms: str) -> dict[str, str]:
    return {"policy.method": "custom", "policy.rewards": f"[{terms}]"}


DIVERGES = ("kl-explosion", "step-size", "clip-share", "entropy-collapse", "entropy-explosion", "reward-falls")
CASES = {
    "too large a step": Case({"policy.lr": "1e-2"}, DIVERGES),
    "hackable reward, no KL": Case(
        custom('{ type = "function", function = "doctor:intensifiers" }') | {"policy.kl.coef": "0.0"},
        ("reward-hacking", "length-hacking", "kl-explosion", "entropy-collapse"),
    ),
    "length bonus": Case(
        custom(f'{RTO}, {{ type = "function", function = "doctor:length_bonus" }}'), ("length-hacking",)
    ),
    "shifted log-probs": Case({}, ("sampler-gap", "kl-mismatch"), late_logprobs),
    "frozen critic": Case({"policy.critic.lr": "1e-9"}, ("critic-not-learning",)),
    "clip saturation": Case(
        {"policy.loss": '{ type = "ppo", clip = 0.01 }', "policy.updates": "6"}, ("clip-share", "step-size")
    ),
    "dense term dominates": Case(
        custom('{ type = "implicit", scale = 5.0, clip = "none" }, { type = "terminal" }'), ("dense-dominates",)
    ),
    "truncated answers": Case({"data.max_response": "8"}, ("truncated",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/doctor")
    parser.add_argument("--base", help="a finished run of recipes/tiny.toml; default: OUTPUT/base, trained first")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--healthy", type=int, default=16, help="healthy runs: seeds 1, 2, ...; RTO and PPO by turns")
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="pathologies; default: all")
    known = parser.parse_args()
    output = Path(known.output)
    base = Path(known.base) if known.base else output / "base"
    if not known.base:
        rto.run(recipe({"stages": '["sft", "prefer", "reward"]', "output": json.dumps(str(base))}))
    common = {
        "stages": '["rl"]',
        "baselines": "{}",
        "policy.max_steps": str(known.iterations),
        "model": f'{{ type = "pretrained", name = {json.dumps(str(base / "sft"))} }}',
        "prefer.checkpoint": json.dumps(str(base / "prefer")),
        "reward.checkpoint": json.dumps(str(base / "reward")),
    }
    sick = {}
    for name, case in CASES.items():
        if known.only is None or name in known.only:
            sick[name] = seen(common | case.overrides, output / name.replace(" ", "-").replace(",", ""), case.injected)
    healthy = {}
    for seed in range(1, known.healthy + 1):
        method = "rto" if seed % 2 else "ppo"
        changes = common | {"seed": str(seed), "policy.method": json.dumps(method)}
        healthy[f"{method}, seed {seed}"] = seen(changes, output / f"healthy-{seed}")
    print(table(sick, healthy))


def recipe(changes: dict[str, str]) -> Any:
    return rto.load_recipe(RECIPE, list(changes.items()))


def seen(changes: dict[str, str], folder: Path, injected: Callable[[], Any] = nullcontext) -> list[Finding]:
    """The findings in one run, which is trained unless it is finished."""
    with injected():
        rto.run(recipe(changes | {"output": json.dumps(str(folder))}))
    return diagnose(read_metrics(folder))


def table(sick: dict[str, list[Finding]], healthy: dict[str, list[Finding]]) -> str:
    """Markdown."""
    lines = ["| injected | expected | found (first step) | hit |", "| --- | --- | --- | --- |"]
    hits = 0
    for name, findings in sick.items():
        hit = any(finding.rule in CASES[name].expected for finding in findings)
        hits += hit
        lines.append(f"| {name} | {', '.join(CASES[name].expected)} | {said(findings)} | {'yes' if hit else 'no'} |")
    alarms = {name: findings for name, findings in healthy.items() if findings}
    lines += ["", "| runs | number | with a finding | rate |", "| --- | --- | --- | --- |"]
    lines.append(f"| with a pathology | {len(sick)} | {hits} (as expected) | {share(hits, len(sick))} hits |")
    lines.append(f"| healthy | {len(healthy)} | {len(alarms)} | {share(len(alarms), len(healthy))} false alarms |")
    lines += [f"| {name} | | {said(findings)} | |" for name, findings in alarms.items()]
    return "\n".join(lines)


def said(findings: Sequence[Finding]) -> str:
    return ", ".join(f"{finding.rule} ({finding.severity}, {finding.first})" for finding in findings) or "nothing"


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


if __name__ == "__main__":
    main()
