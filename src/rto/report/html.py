"""``report.html``: one self-contained page of a run, made only of the files in its folder.

Read: ``config.json``, ``stages.json``, ``metrics.jsonl``, ``samples.jsonl``, ``evaluation.json`` and
``credit.json``. A file that is missing costs its section, which then names the command that makes it. Text
of models and data sets is escaped by jinja2's autoescape; the page needs no script and no other file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from rto.report import plots
from rto.report.log import Row, read_metrics, read_samples
from rto.report.tokens import token_view

SHOWN_PROMPTS = 12  # of the evaluation, side by side
SHOWN_SAMPLES = 3  # of the first and of the last logged step of a stage
PANELS = {
    "oracle": "oracle score",
    "reward/total": "reward an answer",
    "kl": "KL, nats an answer",
    "length": "tokens an answer",
}
STAGE_PANELS: dict[str, dict[str, list[str]]] = {
    "sft": {"loss": ["loss"]},
    "prefer": {"loss": ["loss"], "accuracy": ["accuracy", "eval_accuracy"], "margin": ["margin"]},
    "reward": {"loss": ["loss"], "accuracy": ["accuracy", "eval_accuracy"]},
    "oracle": {"loss": ["loss"], "accuracy": ["accuracy", "eval_accuracy"]},
}
STAGE_NAMES = {
    "sft": "Supervised fine-tuning: the reference",
    "prefer": "Preference training: the guide",
    "reward": "Reward model: the scorer",
    "oracle": "Held-out reward model: the oracle",
}


def write_report(folder: Path) -> Path:
    """Writes ``folder/report.html`` and returns its path.

    ValueError when the folder does not exist, or a file in it is broken or lacks a key that the page needs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder. Make one with: rto run RECIPE --output {folder}")
    metrics = read_metrics(folder)
    config = _load(folder, "config.json")
    method = ((config or {}).get("policy") or {}).get("method")
    view = {
        "folder": folder.resolve().name,
        "method": method,
        "facts": _facts(config),
        "config": json.dumps(config, indent=2, ensure_ascii=False),
        "stages": _load(folder, "stages.json"),
        "evaluation": _section(folder, "evaluation.json", lambda found: _evaluation(found, method)),
        "rl": _rl(metrics),
        "training": _training(metrics),
        "normalisers": _normalisers(folder),
        "credit": _section(folder, "credit.json", _credit),
        "samples": _samples(read_samples(folder)),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(num=num, percent=percent, seconds=seconds, to=interval, to_percent=percent_interval)
    try:
        page = environment.get_template("report.html.j2").render(view)
    except UndefinedError as error:
        raise ValueError(f"{folder}: a file of the run lacks a key ({error}). Run `rto evaluate` again.") from error
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")  # lone surrogates have no UTF-8 form
    return path


# --- numbers ------------------------------------------------------------------------------------------


def num(value: Any) -> str:
    """At most four digits that mean something; a dash for null, anything that is no number as it came."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif value and (abs(value) < 0.001):
        text = f"{value:.2g}"
    else:
        text = f"{value:.{1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3}f}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{num(low)} to {num(high)}"


def percent_interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# --- sections -----------------------------------------------------------------------------------------


def _load(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / name
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Delete it and run the stage that makes it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object. Delete it and run the stage that makes it again.")
    return found


def _section(folder: Path, name: str, make: Any) -> Any:
    """What ``make`` says about the file, None when there is no file."""
    found = _load(folder, name)
    try:
        return None if found is None else make(found)
    except KeyError as error:
        raise ValueError(f"{folder / name}: the key {error} is missing. Run `rto evaluate` again.") from error
    except ValueError as error:
        raise ValueError(f"{folder / name}: {error}. Run `rto evaluate` again.") from error


def _facts(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the run was, in the words of its config."""
    if config is None:
        return None
    model, data, policy = (config.get(key) or {} for key in ("model", "data", "policy"))
    evaluation = config.get("evaluation") or {}
    name = model.get("name") or model.get("file")
    if model.get("type") == "scratch":
        name = f"random weights, {model.get('layers')} layers of {model.get('hidden')}"
    lora = model.get("lora")
    facts = {
        "Model": name,
        "Training": f"LoRA, rank {lora.get('r')}" if lora else "all weights",
        "Data": "tiny world" if data.get("type") == "world" else data.get("pairs"),
        "Method": policy.get("method"),
        "Baselines": ", ".join(config.get("baselines") or {}) or None,
        "KL coefficient": (policy.get("kl") or {}).get("coef"),
        "Oracle": (evaluation.get("oracle") or {}).get("type"),
        "Seed": str(config["seed"]) if "seed" in config else None,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _evaluation(found: dict[str, Any], method: str | None) -> dict[str, Any]:
    comparison = found["comparison"]
    names = comparison["names"]
    figure = plots.win_matrix(names, comparison["matrix"], comparison["matrix_low"], comparison["matrix_high"])
    pairs = [{**pair, "words": verdict(pair)} for pair in _once(comparison["pairs"], method)]
    samples = found.get("samples") or []
    return {
        "oracle": found.get("oracle"),
        "used": found.get("oracle_used_in_training"),
        "names": names,
        "policies": comparison["policies"],
        "matrix": Markup(plots.svg(figure, "wins", "Win rate of every policy against every other one")),
        "main": [pair for pair in pairs if method in (pair["a"], pair["b"])] or pairs,
        "pairs": pairs,
        "samples": samples[:SHOWN_PROMPTS],
        "sampled": len(samples),
        "accuracy": {name: value for name, value in (found.get("accuracy") or {}).items() if value is not None},
    }


def verdict(pair: Mapping[str, Any]) -> str:
    """The evaluation's verdict ("better", "worse" or "not distinguishable") as a sentence about both policies."""
    a, b, said = pair["a"], pair["b"], pair.get("verdict") or "no verdict"
    return {"better": f"{a} beat {b}", "worse": f"{a} lost to {b}"}.get(said, f"{a} and {b}: {said}")


def _once(pairs: Sequence[Row], method: str | None) -> list[Row]:
    """Every two policies once, read from the side of the run's own method where it is one of them."""
    found: dict[frozenset[str], Row] = {}
    for pair in pairs:
        both = frozenset((pair["a"], pair["b"]))
        if both not in found or pair["a"] == method:
            found[both] = pair
    return list(found.values())


def _rl(metrics: Sequence[Row]) -> dict[str, Any] | None:
    runs: dict[str, list[Row]] = {}
    for row in metrics:
        if row["stage"].startswith("rl/"):
            runs.setdefault(row["stage"].removeprefix("rl/"), []).append(row)
    if not runs:
        return None
    seen = {key for rows in runs.values() for row in rows for key in row}
    keys = [key for key in PANELS if key != "oracle" or key in seen]
    figure = plots.curves(runs, keys, [PANELS[key] for key in keys])
    # The last row of every run, by key: the terms in the order they came, then what every method has.
    terms = sorted(key for key in seen if key.startswith("reward/") and key != "reward/total")
    rest = ["kl", "length", "entropy", "policy/loss", "policy/clip_share", "value/loss", "value/explained_variance"]
    shown = [key for key in ["oracle", "reward/total", *terms, *rest, "tokens_per_second"] if key in seen]
    return {
        "names": list(runs),
        "curves": Markup(plots.svg(figure, "curves", "Reward, KL and response length of every method by step")),
        "smoothed": any(len(rows) > plots.SMOOTH_FROM for rows in runs.values()),
        "last": [(key, [rows[-1].get(key) for rows in runs.values()]) for key in shown],
        "steps": [rows[-1]["step"] for rows in runs.values()],
    }


def _training(metrics: Sequence[Row]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    stages = dict.fromkeys(row["stage"] for row in metrics)
    for kind, title in STAGE_NAMES.items():
        for stage in [stage for stage in stages if stage.partition("/")[0] == kind]:
            rows = [row for row in metrics if row["stage"] == stage]
            seen = {key for row in rows for key in row}
            panels = {name: keys for name, keys in STAGE_PANELS[kind].items() if seen & set(keys)}
            if panels:
                figure = plots.training(rows, panels)
                said = title if stage == kind else f"{title} {stage.partition('/')[2]}"
                number = len(found)
                markup = plots.svg(figure, f"stage-{number}", f"{said}, training curves")
                found.append({"title": said, "svg": Markup(markup)})
    return found


def _normalisers(folder: Path) -> list[dict[str, Any]]:
    """The fitted normaliser of every segment scorer."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("reward/**/normaliser.json")):
        stored = _load(folder, path.relative_to(folder).as_posix()) or {}
        fitted, stage = stored["normaliser"], path.parent.relative_to(folder).as_posix()
        figure = plots.normaliser_plot(fitted)
        markup = plots.svg(figure, f"normaliser-{len(found)}", f"Normaliser of the scorer {stage}")
        found.append({"stage": stage, "svg": Markup(markup), **fitted, **stored})
    return found


def _credit(found: dict[str, Any]) -> dict[str, Any]:
    answers = []
    for answer in found.get("answers") or []:
        terms = dict(answer["terms"])
        if answer.get("truth") is not None:
            terms["true reward"] = answer["truth"]
        answers.append({**answer, "view": token_view(answer["tokens"], terms, answer.get("segment_ends"))})
    return {"methods": found.get("methods"), "answers": answers}


def _samples(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For every stage the samples of its first and of its last logged step."""
    stages: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], {}).setdefault(row["step"], []).append(row)
    return [
        {"stage": stage, "steps": [(step, steps[step][:SHOWN_SAMPLES]) for step in sorted({min(steps), max(steps)})]}
        for stage, steps in stages.items()
    ]
