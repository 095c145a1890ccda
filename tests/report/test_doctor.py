from __future__ import annotations

import argparse
import json
import math
import random

import pytest

from rto.commands import doctor
from rto.report import RunLog
from rto.report.doctor import RULES, Finding, diagnose, live
from rto.report.symptoms import Curves, Series, rises


def healthy(count: int = 40, seed: int = 0) -> list[dict]:
    """An RL stage such as the tiny world's: reward, oracle and KL rise and level off, with noise."""
    draw = random.Random(seed).gauss
    rows = []
    for i in range(count):
        grown = 1 - math.exp(-4 * i / count)
        rows.append(
            {
                "stage": "rl/rto",
                "step": i + 1,
                "reward/total": 0.1 + 0.8 * grown + draw(0, 0.03),
                "reward/implicit": -0.1 + 0.2 * grown + draw(0, 0.01),
                "reward/terminal": 0.2 + 0.8 * grown + draw(0, 0.03),
                "reward/kl": -0.1 * grown,
                "reward_share/implicit": 0.15,
                "reward_share/terminal": 0.7,
                "reward_share/kl": 0.15,
                "reward_clip_share/implicit": 0.1,
                "reward_length_correlation/terminal": draw(0, 0.1),
                "kl_per_token": 0.3 * grown + draw(0, 1e-7 if i == 0 else 0.01),
                "length": 15 - 4 * grown + draw(0, 0.3),
                "finished": min(1.0, 0.99 + draw(0, 0.005)),
                "entropy": 2 - 0.5 * grown + draw(0, 0.01),
                "missing": 0.0,
                "policy/clip_share": abs(draw(0, 0.002)),
                "policy/moved": draw(0.001, 0.001),
                "policy/sampler_gap": 4e-7,
                "value/explained_variance": -0.4 + 0.8 * grown + draw(0, 0.05),
                "value/loss": 0.3 - 0.2 * grown,
                "oracle": -0.3 + 1.1 * grown + draw(0, 0.05),
            }
        )
    return rows


def changed(key: str, value, count: int = 40, **others) -> list[dict]:
    """Healthy rows with metrics made anew: a function of the share of the stage that is done, or a number."""
    rows = healthy(count)
    for i, row in enumerate(rows):
        for name, new in {key: value, **others}.items():
            row[name] = new(i / (count - 1)) if callable(new) else new
    return rows


def names(rows: list[dict]) -> set[str]:
    return {finding.rule for finding in diagnose(rows)}


@pytest.mark.parametrize("seed", range(16))
def test_healthy_runs_say_nothing(seed):
    assert diagnose(healthy(seed=seed)) == []


SICK = {
    "kl-mismatch": changed("kl_per_token", 0.1),
    "sampler-gap": changed("policy/sampler_gap", 0.2),
    "kl-explosion": changed("kl_per_token", lambda t: 4 * t),
    "step-size": changed("policy/moved", 0.2),
    "clip-share": changed("policy/clip_share", 0.4),
    "entropy-collapse": changed("entropy", lambda t: 2 * math.exp(-5 * t)),
    "entropy-explosion": changed("entropy", lambda t: 1 + 4 * t),
    "length-hacking": changed("length", lambda t: 10 + 20 * t, oracle=lambda t: -2 * t),
    "reward-hacking": changed("oracle", lambda t: 1 - 8 * (t - 0.4) ** 2),
    "reward-falls": changed("reward/terminal", lambda t: 1 - t),
    "critic-not-learning": changed("value/explained_variance", -0.3),
    "dense-dominates": changed("reward_share/implicit", 0.9, **{"reward_share/terminal": 0.02}),
    "kl-dominates": changed("reward_share/kl", 0.7),
    "term-saturated": changed("reward_clip_share/implicit", 0.9),
    "truncated": changed("finished", lambda t: 1 - 0.8 * t),
    "missing-rewards": changed("missing", 0.05),
    "left-out-steps": changed("skipped", 1.0),
}


@pytest.mark.parametrize("rule", SICK)
def test_a_pathology_is_found_and_nothing_unrelated(rule):
    found = diagnose(SICK[rule])
    assert rule in {finding.rule for finding in found}
    allowed = {"length-hacking": {"reward-hacking"}}.get(rule, set())
    assert {finding.rule for finding in found} - {rule} <= allowed
    for finding in found:
        assert finding.stage == "rl/rto" and 1 <= finding.first <= finding.last <= 40
        assert finding.evidence and all(math.isfinite(value) for value in finding.evidence.values())
        assert finding.cause and finding.remedy


def supervised(loss, accuracy, evaluated: dict[str, float] | None = None, count: int = 100) -> list[dict]:
    draw = random.Random(1).gauss
    rows = [
        {
            "stage": "prefer",
            "step": i + 1,
            "loss": loss(i / count) + draw(0, 0.02),
            "accuracy": accuracy(i / count) + draw(0, 0.04),
        }
        for i in range(count)
    ]
    rows[-1] |= evaluated or {}
    return rows


def test_preference_training():
    learns = {"loss": lambda t: 0.69 - 0.2 * t, "accuracy": lambda t: 0.5 + 0.3 * t}
    assert names(supervised(**learns, evaluated={"eval_accuracy": 0.78, "eval_loss": 0.5})) == set()
    assert names(supervised(**learns, evaluated={"eval_accuracy": 0.5, "eval_loss": 0.55})) == {"at-chance"}
    knows = {"loss": lambda t: 0.69 - 0.6 * t, "accuracy": lambda t: min(1.0, 0.5 + t)}
    assert names(supervised(**knows, evaluated={"eval_accuracy": 0.65, "eval_loss": 0.9})) == {"overfit"}
    diverges = {"loss": lambda t: 0.69 + 2 * t, "accuracy": lambda t: 0.7}
    assert names(supervised(**diverges)) == {"loss-rises"}
    flat = {"loss": lambda t: 0.69, "accuracy": lambda t: 0.5}
    assert names(supervised(**flat)) == {"at-chance"}
    assert names(supervised(**flat)[:50]) == set()  # too early to say
    (swapped,) = diagnose(supervised(**learns, evaluated={"eval_accuracy": 0.3, "eval_loss": 0.55}))
    assert swapped.severity == "fail" and (swapped.first, swapped.last) == (100, 100)


def test_every_rule_is_tried_and_documented(request):
    assert set(RULES) == set(SICK) | {"at-chance", "overfit", "loss-rises"}
    page = (request.config.rootpath / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert [rule for rule in RULES if f"`{rule}`" not in page] == []


def test_a_low_reward_that_is_earned_by_length_needs_no_oracle():
    rows = changed("length", lambda t: 10 + 20 * t, **{"reward_length_correlation/terminal": 0.6})
    for row in rows:
        del row["oracle"]
    (found,) = diagnose(rows)
    assert (found.rule, found.severity) == ("length-hacking", "warn")
    assert found.evidence["reward_length_correlation/terminal"] == pytest.approx(0.6)
    for row in rows:
        row["reward_length_correlation/terminal"] = 0.1
    assert diagnose(rows) == []


def test_longer_answers_that_are_better_are_no_hack():
    assert names(changed("length", lambda t: 10 + 20 * t)) == set()  # the oracle rises


def test_the_kl_of_step_1_is_zero_and_later_negative_kl_is_judged_by_its_noise():
    (found,) = diagnose(changed("kl_per_token", lambda t: 0.01))
    assert (found.rule, found.severity, found.first, found.last) == ("kl-mismatch", "warn", 1, 40)
    draw = random.Random(0).gauss
    assert names(changed("kl_per_token", lambda t: 0.0 if t == 0 else draw(-0.001, 0.01))) == set()
    assert names(changed("kl_per_token", lambda t: 0.0 if t == 0 else draw(-0.05, 0.01))) == {"kl-mismatch"}


def test_absent_null_and_nan_say_nothing():
    keys = [key for key in healthy(1)[0] if key not in ("stage", "step")]
    for bad in (None, math.nan, -math.inf):
        assert diagnose([{**row, **dict.fromkeys(keys, bad)} for row in healthy()]) == []
    assert diagnose([{"stage": "rl/rto", "step": i} for i in range(1, 30)]) == []
    for key in keys:  # each missing, and each alone
        assert live([{**row, key: None} for row in healthy()]) == []
        assert live([{"stage": row["stage"], "step": row["step"], key: row[key]} for row in healthy()]) == []
    assert diagnose([]) == [] and live([]) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9])
def test_short_stages(count):
    assert diagnose(healthy(count)) == []
    for rule, rows in SICK.items():
        early = {finding.rule for finding in diagnose(rows[:count])}
        assert count > 4 or early <= {"kl-mismatch", "sampler-gap", "missing-rewards", "left-out-steps"}, rule


def test_steps_left_out_are_counted_in_steps_and_not_in_rows():
    """20 rows of 1,000 steps, and one for each of the five steps that were left out: 5 / 1,000 is a warning."""
    steps = sorted([*range(50, 1001, 50), 7, 101, 333, 640, 888])
    rows = [{"stage": "prefer", "step": s} | ({"loss": 1.0} if s % 50 == 0 else {"skipped": 1.0}) for s in steps]
    (found,) = live(rows)
    assert (found.rule, found.severity, found.first, found.last) == ("left-out-steps", "warn", 7, 1000)
    assert found.evidence == {"optimiser steps left out": 5.0, "for each step": 0.005}


def test_steps_left_out_are_counted_before_rows_are_thinned():
    """RL: 1,000 iterations, 30 of them in a row lost 2 optimiser steps each; the rules read 120 of the rows."""
    rows = [{"stage": "rl/rto", "step": i} | ({"skipped": 2.0} if 500 <= i < 530 else {}) for i in range(1, 1001)]
    (found,) = live(rows)
    assert found.evidence == {"optimiser steps left out": 60.0, "for each step": 0.06}
    assert (found.severity, found.first) == ("fail", 500)


def test_live_speaks_of_the_running_stage_at_its_last_row():
    other = [{**row, "stage": "rl/ppo"} for row in healthy()]
    sick = SICK["clip-share"]
    (found,) = live([*other, *sick])
    assert (found.rule, found.severity, found.stage, found.last) == ("clip-share", "fail", "rl/rto", 40)
    assert found.evidence == {"policy/clip_share": pytest.approx(0.4)}
    assert live([*sick, *other]) == []  # that stage is over
    (said,) = diagnose([*sick, *other])
    assert said.stage == "rl/rto"
    text = str(found)
    assert text.startswith("fail: clip-share in rl/rto, steps 31 to 40: policy/clip_share 0.4.") and "\n" not in text


def test_what_passed_is_kept_with_its_steps():
    rows = changed("policy/clip_share", lambda t: 0.25 if t < 0.5 else 0.0)
    assert live(rows) == []
    (found,) = diagnose(rows)
    assert (found.rule, found.severity, found.first) == ("clip-share", "warn", 3)  # the first 5 rows: 3, 4 and 5
    assert 20 <= found.last <= 25


def test_a_long_stage_is_thinned_with_its_ends_whole():
    rows = changed("oracle", lambda t: 1 - 8 * (t - 0.4) ** 2, 5000, **{"value/explained_variance": 0.5})
    (found,) = live(rows)
    assert found.rule == "reward-hacking"
    assert found.evidence["oracle"] == pytest.approx(sum(row["oracle"] for row in rows[-20:]) / 20)
    assert names(rows) == {"reward-hacking"}


def test_windows_and_noise_by_hand():
    series = Series([(step, value) for step, value in enumerate([1.0, 2.0, 1.0, 2.0, 9.0, 10.0, 9.0, 10.0], 1)])
    assert series.width == 3
    assert series.noise == pytest.approx(1 / 0.954)  # leaps 1 1 1 7 1 1 1
    head, tail = series.head(), series.tail()
    assert (head.mean, head.first, head.last) == (pytest.approx(4 / 3), 1, 3)
    assert (tail.mean, tail.first, tail.last) == (pytest.approx(29 / 3), 6, 8)
    assert head.error == pytest.approx(series.noise / math.sqrt(3))
    assert rises(head, tail) and not rises(tail, head) and not rises(head, head)


def test_the_reward_is_the_sum_of_the_terms_without_kl():
    rows = [{"stage": "rl/x", "step": 1, "reward/a": 1.0, "reward/b": 2.0, "reward/kl": -9.0, "reward/total": -6.0}]
    series = Curves(rows).reward(1)
    assert series is not None and series.values == [3.0]
    bare = Curves([{"stage": "rl/x", "step": 1, "reward/total": -6.0}]).reward(1)
    assert bare is not None and bare.values == [-6.0]
    assert Curves([{**rows[0], "reward/b": None}]).reward(1) is None


def call(folder, *more: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add(parser)
    return doctor.run(parser.parse_args([str(folder), *more]))


def write(folder, rows: list[dict]) -> None:
    log = RunLog(folder)
    for row in rows:
        log.metrics(row["stage"], row["step"], {k: v for k, v in row.items() if k not in ("stage", "step")})


def test_the_command_prints_findings_or_nothing(tmp_path, capsys):
    write(tmp_path / "well", healthy())
    assert call(tmp_path / "well") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'well'}: nothing found in 1 stage\n"

    write(tmp_path / "ill", [*supervised(lambda t: 0.5, lambda t: 0.8), *SICK["truncated"]])
    assert call(tmp_path / "ill") == 0
    said = capsys.readouterr().out
    assert "1 finding in 2 stages" in said
    assert "FAIL  truncated  in rl/rto" in said and "evidence  finished at the start" in said
    assert "data.max_response" in said

    assert call(tmp_path / "ill", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stages"] == ["prefer", "rl/rto"]
    assert [Finding(**finding) for finding in found["findings"]] == diagnose(SICK["truncated"])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics.jsonl there"):
        call(tmp_path)
    with pytest.raises(ValueError, match=r"no metrics.jsonl there"):
        call(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"no stage": 1}\n{"stage": "sft", "step": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        call(tmp_path)
