"""Two or more systems before a judge: games, verdicts, and the report on them.

A game is one question: a prompt and two answers, one of them shown first. Its key names the prompt and who was shown
first, so that judging b against a finds the games of a against b again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rto.evaluation.answers import Answer, OnMissing, pair_answers
from rto.evaluation.endpoint import Endpoint, Row, Task, ask_all, read_rows
from rto.evaluation.judge_stats import Order, pair_statistics
from rto.evaluation.judge_templates import Template
from rto.evaluation.winrate import holm
from rto.seeds import derive

JUDGMENTS, VERDICTS, REPORT, TABLE = "judgments.jsonl", "verdicts.jsonl", "report.json", "report.md"
Pairs = list[tuple[Answer, Answer]]
_SHOWN = 20  # failures in the Markdown report; report.json has all


def judge(
    systems: Sequence[list[Answer]],
    template: Template,
    endpoint: Endpoint,
    folder: Path,
    *,
    order: Order = "both",
    limit: int | None = None,
    on_missing: OnMissing = "error",
    rounds: int = 10_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Every system against every later one. Returns the report, and writes it and all it rests on to ``folder``.

    ``order``: "both" plays two games a prompt, "single" one, its order drawn from ``seed`` and the prompt. ``limit``:
    at most so many prompts a pair, the same ones whatever the order of the files. ``seed`` is of the order and of the
    bootstrap (``rounds`` resamples).

    Raises:
        ValueError: fewer than two systems, or two of one name; as :func:`pair_answers` and :func:`ask_all`.
    """
    names = [answers[0].model for answers in systems]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"systems {', '.join(names)}: give two or more, with names that differ")
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: judge at least one prompt")
    matched = [pair_answers(a, b, on_missing) for a, b in combinations(systems, 2)]
    contests = [pairs[:limit] for pairs, _ in matched]
    tasks = [task for pairs in contests for task in games(pairs, template, order, seed)]
    path = folder / JUDGMENTS
    _check_template(path, template)
    rows = {row["key"]: row for row in ask_all(tasks, endpoint, path, progress)}
    results = [
        _contest(pairs, missing, rows, template, order, rounds, seed)
        for pairs, (_, missing) in zip(contests, matched, strict=True)
    ]
    for result, adjusted in zip(results, holm([result["p"] for result in results]), strict=True):
        result["p_holm"] = float(adjusted)
    report = {
        "judge": endpoint.model,
        "endpoint": endpoint.url,
        "served": sorted({row["served"] for row in rows.values() if row["served"]}),
        "settings": endpoint.settings,
        "template": {"name": template.name, "hash": template.hash, "system": template.system, "user": template.user},
        "order": order,
        "seed": seed,
        "limit": limit,
        "rounds": rounds,
        "level": 0.95,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "games": _bookkeeping(list(rows.values()), template),
        "pairs": results,
        "failures": [
            {"key": row["key"], "id": row["id"], "first": row["first"], "second": row["second"], "reason": reason}
            for row in rows.values()
            if (reason := _reason(row, template))
        ],
    }
    _write(folder, report, [line for pairs in contests for line in _verdict_lines(pairs, rows, template)])
    return report


def games(pairs: Pairs, template: Template, order: Order, seed: int) -> list[Task]:
    """The questions to ask of ``pairs``: none where both answers are the same but for space around them."""
    tasks = []
    for a, b in pairs:
        if _same(a, b):
            continue
        # Sorted by name before anything is drawn: which system is called a must not change who is shown first.
        one, two = sorted((a, b), key=lambda answer: answer.model)
        shown = [(one, two), (two, one)]
        if order == "single":
            shown = [shown[derive(seed, "order", a.prompt) & 1]]
        for first, second in shown:
            about = {"id": a.id, "first": first.model, "second": second.model}
            about |= {"template": template.name, "template_hash": template.hash}
            messages = template.messages(a.prompt, first.answer, second.answer)
            tasks.append(Task(_key(first, second), messages, about))
    return tasks


def outcome(row: Row | None, template: Template) -> float:
    """1: the first shown answer wins, 0: the second, 1/2: tie; NaN: no game, no reply, or no valid verdict in it."""
    verdict = None if row is None or row["error"] is not None else template.verdict(row["reply"])
    return math.nan if verdict is None else {"A": 1.0, "tie": 0.5, "B": 0.0}[verdict]


def _contest(
    pairs: Pairs,
    missing: tuple[int, int],
    rows: dict[str, Row],
    template: Template,
    order: Order,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    a_first = [outcome(rows.get(_key(a, b)), template) for a, b in pairs]
    b_first = [1 - outcome(rows.get(_key(b, a)), template) for a, b in pairs]
    lengths = ([len(a.answer) for a, _ in pairs], [len(b.answer) for _, b in pairs])
    same = [_same(a, b) for a, b in pairs]
    numbers = pair_statistics(a_first, b_first, same, lengths, order=order, rounds=rounds, seed=seed)
    played = [rows[key] for a, b in pairs for key in (_key(a, b), _key(b, a)) if key in rows]
    cut = [sum(answer.finished is False for answer in side) for side in zip(*pairs, strict=True)]
    return {
        "a": pairs[0][0].model,
        "b": pairs[0][1].model,
        "prompts": len(pairs),
        "without_partner": {"a": missing[0], "b": missing[1]},
        "unfinished": {"a": cut[0], "b": cut[1]},
        "games": _bookkeeping(played, template),
        **numbers,
    }


def _bookkeeping(rows: list[Row], template: Template) -> dict[str, int]:
    failed = sum(row["error"] is not None for row in rows)
    invalid = sum(_reason(row, template) is not None for row in rows) - failed
    return {"played": len(rows), "failed": failed, "invalid": invalid}


def _reason(row: Row, template: Template) -> str | None:
    """Why a game has no verdict."""
    if row["error"] is not None:
        return str(row["error"])
    if not math.isnan(outcome(row, template)):
        return None
    cut = ", cut at max_tokens" if row["finish"] == "length" else ""
    return f"invalid reply{cut}: {row['reply'][-200:]!r}"


def _verdict_lines(pairs: Pairs, rows: dict[str, Row], template: Template) -> list[dict[str, Any]]:
    """One row a prompt: what each game said, as the name of the winner, "tie" or None."""

    def winner(first: Answer, second: Answer) -> str | None:
        won = outcome(rows.get(_key(first, second)), template)
        return None if math.isnan(won) else {1.0: first.model, 0.5: "tie", 0.0: second.model}[won]

    return [
        {
            "id": a.id,
            "prompt": a.prompt,
            "category": a.category or b.category,
            "a": a.model,
            "b": b.model,
            "identical": _same(a, b),
            "a_first": winner(a, b),
            "b_first": winner(b, a),
        }
        for a, b in pairs
    ]


def _same(a: Answer, b: Answer) -> bool:
    return a.answer.strip() == b.answer.strip()


def _key(first: Answer, second: Answer) -> str:
    return f"{first.id} {first.model} > {second.model}"


def _check_template(path: Path, template: Template) -> None:
    for row in read_rows(path):
        if row.get("template_hash") != template.hash:
            raise ValueError(
                f"{path} holds judgments under the template {row.get('template')!r} ({row.get('template_hash')}), not "
                f"{template.name!r} ({template.hash}). They are never mixed: use another folder, or move the file away"
            )


# --- the files ----------------------------------------------------------------------------------------


def _write(folder: Path, report: dict[str, Any], verdicts: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in verdicts)
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    for name, content in ((VERDICTS, lines), (REPORT, text), (TABLE, markdown(report))):
        (folder / name).write_bytes(content.encode("utf-8", "backslashreplace"))


def markdown(report: dict[str, Any]) -> str:
    """The report as tables for people."""
    pairs, settings = report["pairs"], report["settings"]
    rows = [
        [
            *(_cell(pair[side]) for side in "ab"),
            str(pair["n"]),
            f"{pair['wins']} / {pair['ties']} / {pair['losses']}",
            _percent(pair["win_rate"]),
            _percent(pair["win_rate_without_ties"]),
            f"{pair['p']:.3g}",
            f"{pair['p_holm']:.3g}",
            pair["verdict"],
        ]
        for pair in pairs
    ]
    head = ["a", "b", "n", "win / tie / loss", "win rate of a, %", "without ties, %", "p", "p (Holm)", "a is"]
    bias = [
        [
            f"{_cell(pair['a'])} : {_cell(pair['b'])}",
            _percent(pair["position"]["first_share"]),
            _number(pair["position"]["p"], 3),
            _number(pair["position"].get("consistency"), 3),
            _number(pair["position"].get("kappa"), 3),
            f"{_number(pair['length']['a'], 0)} : {_number(pair['length']['b'], 0)}",
            _percent(pair["length"]["longer_wins"]),
            f"{pair['identical']} / {pair['games']['invalid']} / {pair['games']['failed']} / {pair['dropped']}",
        ]
        for pair in pairs
    ]
    bias_head = ["a : b", "first shown wins, %", "p", "consistency", "kappa", "characters", "longer wins, %"]
    bias_head.append("identical / invalid / failed / dropped")
    facts = [
        f"Judge: {report['judge']} (served as {', '.join(report['served']) or 'unknown'}) at {report['endpoint']}, "
        f"{report['date']}",
        f"Template: {report['template']['name']}, hash {report['template']['hash']}",
        f"Order: {report['order']}, seed {report['seed']}; temperature {settings['temperature']:g}, at most "
        f"{settings['max_tokens']} tokens",
        f"Intervals: {report['level']:.0%}; win rate: {report['rounds']} resamples of the prompts; shares: Wilson",
    ]
    parts = ["# Judged pairs", _table(head, rows), _table(bias_head, bias), "\n".join(f"- {fact}" for fact in facts)]
    if failures := report["failures"]:
        shown = [f"- `{row['key']}`: {_cell(row['reason'])}" for row in failures[:_SHOWN]]
        rest = [f"- and {len(failures) - _SHOWN} more, see report.json"] if len(failures) > _SHOWN else []
        parts.append("\n".join([f"## Games without a verdict: {len(failures)}", "", *shown, *rest]))
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(interval: dict[str, Any]) -> str:
    estimate, low, high = (interval[name] for name in ("estimate", "low", "high"))
    if estimate is None:
        return "-"
    spread = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * estimate:.1f}{spread}"
