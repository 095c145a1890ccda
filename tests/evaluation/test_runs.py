"""Finished runs side by side: small run folders are written by hand and read back through `rto compare`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rto.commands import compare
from rto.evaluation.combine import Table, combine
from rto.evaluation.runs import group_runs, read_run, recipe_key, used_in_training
from rto.evaluation.winrate import (
    Interval,
    across_seeds,
    holm,
    paired_bootstrap,
    paired_t_test,
    sign_test,
    win_probability,
)

WORLD = "the tiny world's own reward, exact"


def write_run(
    folder: Path,
    policies: dict[str, Any],
    *,
    seed: int = 0,
    samples: int = 1,
    prompts: list[str] | None = None,
    oracle: str = WORLD,
    lengths: dict[str, Any] | None = None,
    kls: dict[str, Any] | None = None,
    aucs: dict[str, float | None] | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A run folder with these scores, a list a policy; lengths default to 3 tokens, mean KL to 1."""
    (folder / "evaluation").mkdir(parents=True)
    settings = {"bootstrap": 200, "samples": samples, "oracle": {"type": "world"}}
    method = {"method": list(policies)[-1]}
    config = {"output": str(folder), "seed": seed, "policy": method, "evaluation": settings} | (changes or {})
    (folder / "config.json").write_text(json.dumps(config))
    means = {name: {"kl": 1.0 if kls is None else float(np.mean(kls[name]))} for name in policies}
    comparison = {"names": list(policies), "policies": means}
    (folder / "evaluation.json").write_text(json.dumps({"comparison": comparison, "oracle": oracle}))
    methods = {name: {"auc": auc, "auc_low": None, "auc_high": None} for name, auc in (aucs or {}).items()}
    (folder / "credit.json").write_text(json.dumps({"methods": methods or None, "answers": []}))
    for name, scores in policies.items():
        rows = []
        for i, score in enumerate(scores):
            asked = prompts[i // samples] if prompts else f"prompt {i // samples}"
            row = {"prompt": asked, "answer": f"{name} {score}", "score": score}
            row["answer_ids"] = [7] * int(lengths[name][i] if lengths else 3)
            rows.append(row if kls is None else row | {"kl": kls[name][i]})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "evaluation" / f"answers-{name}.jsonl").write_text(text)
    return folder


def table(*folders: Path, by: Any = "method", against: str = "sft") -> Table:
    return combine(group_runs([read_run(folder) for folder in folders], by), against)


def scores(seed: int, gain: float = 0.0, n: int = 40) -> list[float]:
    return [round(float(x), 1) for x in np.random.default_rng(seed).normal(gain, 1, n)]


# --- one run ------------------------------------------------------------------------------------------


def test_one_run_has_the_numbers_of_the_evaluation(tmp_path):
    sft, rto = scores(0), scores(1, 1.5)
    tokens = {"sft": [3] * 20 + [5] * 20, "rto": [4] * 40}
    nats = {"sft": [0.0] * 40, "rto": [1.0, 3.0] * 20}
    folder = write_run(tmp_path / "a", {"sft": sft, "rto": rto}, lengths=tokens, kls=nats, aucs={"rto": 0.75})
    found = table(folder)
    one, two = found.rows
    assert (one.name, two.name, two.method, found.prompts, found.oracles) == ("sft", "rto", True, (40,), (WORLD,))
    assert set(one.measures) == {"score", "kl", "length"}
    assert vars(two.measures["score"]) == pytest.approx(vars(paired_bootstrap(rto, 200, 0)))
    assert two.measures["kl"].estimate == 2.0 and two.measures["kl"].low < 2 < two.measures["kl"].high
    assert one.measures["length"].estimate == 4.0 and two.measures["length"].estimate == 4.0
    assert two.measures["auc"].estimate == 0.75 and math.isnan(two.measures["auc"].low)
    chances = win_probability(rto, sft)
    assert vars(two.measures["win_rate"]) == pytest.approx(vars(paired_bootstrap(chances, 200, 0)))
    (pair,) = found.pairs
    won, lost = int((chances > 0.5).sum()), int((chances < 0.5).sum())
    assert (pair.a, pair.b, pair.unit, pair.n, pair.won, pair.lost) == ("rto", "sft", "prompts", 40, won, lost)
    assert pair.difference.estimate == pytest.approx(np.mean(rto) - np.mean(sft))
    assert pair.p == pair.p_holm == sign_test(won, lost)
    assert pair.verdict == "better"


def test_samples_of_a_prompt_stay_together(tmp_path):
    folder = write_run(tmp_path / "a", {"sft": [0.0, 4.0, 1.0, 1.0], "rto": [2.0, 2.0, 3.0, None]}, samples=2)
    found = table(folder)
    assert read_run(folder).prompts == ("prompt 0", "prompt 1")
    assert found.rows[1].measures["score"].estimate == 2.0  # the prompt with a missing answer is left out
    assert found.pairs[0].n == 1 and found.pairs[0].win_rate.estimate == 0.5


def test_identical_answers_tie_and_are_no_news(tmp_path):
    same = scores(0)
    found = table(write_run(tmp_path / "a", {"sft": same, "dpo": same, "rto": scores(1, 3)}))
    pair = found.pairs[0]
    assert (pair.difference.estimate, pair.win_rate.estimate, pair.won, pair.lost, pair.p) == (0.0, 0.5, 0, 0, 1.0)
    assert pair.verdict == "not distinguishable"
    assert found.rows[1].measures["length_controlled"].estimate == 0.5


def test_mean_and_sign_must_agree(tmp_path):
    # 30 small losses and 10 huge wins: the mean is clearly better, most prompts are clearly worse.
    found = table(write_run(tmp_path / "a", {"sft": [0.0] * 40, "rto": [-0.1] * 30 + [50.0] * 10}))
    (pair,) = found.pairs
    assert pair.difference.low > 0 and pair.p_holm < 0.05
    assert pair.verdict == "not distinguishable"


def test_win_rates_and_their_mirrors_sum_to_one(tmp_path):
    one = {"sft": scores(0), "dpo": scores(1, 0.3), "rto": scores(2, 0.6)}
    there = table(write_run(tmp_path / "a", one))
    back = table(write_run(tmp_path / "b", dict(reversed(one.items()))))
    mirror = {"better": "worse", "worse": "better", "not distinguishable": "not distinguishable"}
    other = {(pair.b, pair.a): pair for pair in back.pairs}
    for pair in there.pairs:
        turned = other[pair.a, pair.b]
        assert pair.win_rate.estimate + turned.win_rate.estimate == pytest.approx(1, abs=1e-12)
        assert pair.difference.low == pytest.approx(-turned.difference.high)
        assert (pair.won, pair.lost, pair.p_holm) == (turned.lost, turned.won, turned.p_holm)
        assert pair.verdict == mirror[turned.verdict]
    assert [pair.p_holm for pair in there.pairs] == list(holm([pair.p for pair in there.pairs]))


# --- seeds --------------------------------------------------------------------------------------------


def seeds(tmp_path: Path, name: str = "", gain: float = 1.0, **more: Any) -> list[Path]:
    """Three seeds of one recipe; each seed has its own prompts and, as a held-out oracle has, its own words."""
    folders = []
    for seed in range(3):
        policies = {"sft": scores(seed), "rto": scores(10 + seed, gain)}
        own = {"prompts": [f"{seed} {i}" for i in range(40)], "oracle": f"right on {60 + seed} %"}
        folders.append(write_run(tmp_path / f"{name}seed{seed}", policies, seed=seed, **own, **more))
    return folders


def test_seeds_of_a_recipe_are_the_unit(tmp_path):
    folders = seeds(tmp_path / "mine", aucs={"rto": 0.7})
    found = table(*folders)
    assert found.recipes == {"mine": (0, 1, 2)}
    means = [[float(np.mean(scores(base + seed, gain))) for seed in range(3)] for base, gain in ((0, 0.0), (10, 1.0))]
    row = found.rows[1]
    assert [row.each["score"][seed] for seed in range(3)] == pytest.approx(means[1])
    assert row.measures["kl"].low == row.measures["kl"].high == 1.0
    assert row.measures["auc"].estimate == pytest.approx(0.7)
    (pair,) = found.pairs
    assert (pair.unit, pair.n) == ("seeds", 3)
    assert vars(pair.difference) == pytest.approx(vars(across_seeds(means[1], means[0])))
    assert pair.p == pytest.approx(paired_t_test(means[1], means[0]))
    again = table(*reversed(folders))
    assert again.pairs[0].difference.estimate == pytest.approx(pair.difference.estimate)


def test_a_key_without_a_value_makes_no_other_recipe():
    """Runs of an earlier version do not have the newest keys."""
    new = {"seed": 1, "data": {"pairs": "a.jsonl", "config": None}, "scorers": [{"cutoff": None}]}
    old = {"seed": 2, "data": {"pairs": "a.jsonl"}, "scorers": [{}]}
    assert recipe_key(new) == recipe_key(old) != recipe_key(old | {"data": {"pairs": "b.jsonl"}})


def test_two_recipes_are_matched_by_seed(tmp_path):
    first = seeds(tmp_path, "a-", 1.0, changes={"note": 1})
    second = seeds(tmp_path, "b-", 2.0, changes={"note": 2})
    found = table(*first, *second)
    # The references of both have the same answers in every seed: one row.
    assert [row.name for row in found.rows] == ["sft", "rto (a)", "rto (b)"]
    assert [(pair.a, pair.b, pair.n) for pair in found.pairs][-1] == ("rto (b)", "rto (a)", 3)
    one = table(*first, second[1])  # a single seed in common: its prompts are the unit
    assert (one.pairs[-1].a, one.pairs[-1].unit, one.pairs[-1].n) == ("rto (b-seed1)", "prompts", 40)
    with pytest.raises(ValueError, match="no seed in common"):
        table(*first[:2], second[2])


def test_paired_t_test_by_hand():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom, p = 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    assert paired_t_test([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert paired_t_test([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert paired_t_test([2.0, 3.0], [1.0, 2.0]) == 0.0
    with pytest.raises(ValueError, match="two or more"):
        paired_t_test([1.0], [0.0])


# --- what is refused ----------------------------------------------------------------------------------


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    one = write_run(tmp_path / "one", {"sft": [1.0, 2.0]})
    other = write_run(tmp_path / "other", {"sft": [1.0, 2.0]}, oracle="another", changes={"note": 1})
    asked = write_run(tmp_path / "asked", {"sft": [1.0, 2.0]}, prompts=["x", "y"], changes={"note": 2})
    with pytest.raises(ValueError, match="different oracles: another; the tiny world"):
        table(one, other)
    with pytest.raises(ValueError, match="different prompts"):
        table(one, asked)
    with pytest.raises(ValueError, match="one recipe and seed"):
        table(one, one)
    more = write_run(tmp_path / "more", {"dpo": [1.0, 2.0], "sft": [1.0, 2.0]}, seed=1)
    with pytest.raises(ValueError, match="lacks dpo: finish it"):
        table(one, more)
    for folder, settings in ((one, {"lr": 1}), (other, {"lr": 2})):  # held-out oracles that look alike in words
        (folder / "stages.json").write_text(json.dumps({"oracle": {"inputs": settings}}))
    text = (one / "evaluation.json").read_text()
    (other / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match="each trained its own"):
        table(one, other)
    with pytest.raises(ValueError, match=r"one has no policy 'ppo' to win against: it has sft"):
        table(one, against="ppo")


def test_servers_are_told_apart_by_the_whole_url(tmp_path):
    """Words leave out the query, where a key may stand; it can also choose the model that judges."""

    def judged_by(query: str, words: str) -> Path:
        oracle = {"type": "http", "url": f"http://h/s{query}"}
        settings = {"evaluation": {"bootstrap": 200, "samples": 1, "oracle": oracle}, "note": query + words}
        return write_run(tmp_path / f"{query}{words}", {"sft": [1.0, 2.0]}, oracle=words, changes=settings)

    small, large = (judged_by(f"?model={size}", "the server h/s") for size in ("small", "large"))
    with pytest.raises(ValueError, match="different oracles: their urls differ in the query"):
        table(small, large)
    earlier = judged_by("?model=small", "the server h/s?model=small")  # as it was written once
    assert table(small, earlier).oracles == ("the server h/s", "the server h/s?model=small")
    flag = used_in_training({"policy": {"rewards": [{"url": "http://h/s?key=me"}]}}, {"url": "http://h/s?key=me"})
    assert flag == "the oracle http://h/s was used in training: it is policy.rewards"


def test_seeds_with_their_own_prompts_are_refused_run_by_run(tmp_path):
    folders = [write_run(tmp_path / str(seed), {"sft": [1.0]}, seed=seed, prompts=[f"of {seed}"]) for seed in range(2)]
    assert len(table(*folders).rows) == 1
    with pytest.raises(ValueError, match="different prompts"):
        table(*folders, by="run")


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "a", {"sft": [1.0, 2.0, 3.0], "rto": [1.0, 2.0, 3.0]})
    answers = folder / "evaluation" / "answers-rto.jsonl"
    whole = answers.read_text()
    for text, said in (
        (whole.replace("answer_ids", "ids"), "answers-rto.jsonl:1: no 'answer_ids'"),
        (whole.replace("prompt 1", "prompt 7"), "other prompts than those of sft"),
        (whole + "{", "answers-rto.jsonl:4: not readable"),
        ("", "0 answers are not 1 a prompt"),
    ):
        answers.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_run(folder)
    answers.unlink()
    with pytest.raises(ValueError, match="no such file: run rto evaluate"):
        read_run(folder)
    (folder / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="no evaluation.json there"):
        read_run(folder)


def test_answers_may_hold_the_line_ends_of_unicode(tmp_path):
    """JSON leaves U+2028, U+2029 and U+0085 in a text as they are; a blank line is no row."""
    folder = write_run(tmp_path / "a", {"sft": [1.0, 2.0], "rto": [3.0, 4.0]})
    for name in ("sft", "rto"):
        path = folder / "evaluation" / f"answers-{name}.jsonl"
        rows = [json.loads(line) | {"answer": "a\u2028b\u2029c\x85d"} for line in path.read_text().split("\n") if line]
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_run(folder).policies["rto"].scores.tolist() == [[3.0], [4.0]]


# --- the oracle ---------------------------------------------------------------------------------------


def test_an_oracle_that_was_used_in_training_is_told():
    model = {"type": "model", "name": "models/judge"}
    config = {"reward": {"checkpoint": None, "model": None}, "scorers": {"big": {"checkpoint": "./models/judge/"}}}
    assert (
        used_in_training(config, model) == "the oracle models/judge was used in training: it is scorers.big.checkpoint"
    )
    assert used_in_training({"reward": {"model": {"name": "models/judge"}}}, model).endswith("it is reward.model")
    assert used_in_training({"reward": {"model": {"name": "models/other"}}}, model) is None
    for oracle in ({"type": "world"}, {"type": "heldout"}):
        assert used_in_training(config, oracle) is None
    terms = {"baselines": {"a": {"rewards": [{"type": "http", "url": "http://judge"}]}}}
    assert used_in_training(terms, {"url": "http://judge"}).endswith("it is baselines.a.rewards")


def test_the_flag_stands_under_the_table(tmp_path):
    settings = {"bootstrap": 200, "samples": 1, "oracle": {"type": "model", "name": "judge"}}
    changes = {"evaluation": settings, "reward": {"checkpoint": "judge"}}
    found = table(write_run(tmp_path / "a", {"sft": scores(0), "rto": scores(1)}, changes=changes))
    assert "WARNING: the oracle judge was used in training" in compare.shown(found, "text")


# --- the command --------------------------------------------------------------------------------------


def test_a_value_that_is_missing_is_a_dash():
    assert compare.interval(Interval(math.nan, math.nan, math.nan), 100, 1) == "-"
    assert compare.interval(Interval(0.5, math.nan, math.nan), 100, 1) == "50.0"


def test_the_command_writes_its_files(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    compare.add(parser)
    folder = write_run(tmp_path / "a", {"sft": scores(0), "my_rto": scores(1, 2)}, aucs={"my_rto": None})
    words = [str(folder), "--out", str(tmp_path / "out"), "--format", "markdown"]
    assert compare.run(parser.parse_args(words)) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.strip() in printed and "| my_rto against sft |" in text and "credit AUC" not in text
    assert r"my\_rto" in (tmp_path / "out" / "table.tex").read_text()
    read = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert read["pairs"][0]["verdict"] == "better" and read["rows"][1]["measures"]["kl"]["low"] is None
    for name in ("score-against-kl.png", "win-rates.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
