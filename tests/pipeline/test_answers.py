"""Benchmark answers of a tiny model: resumed byte for byte, the same in every batch; and pairs scored by a run."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rto import recipe
from rto.cli import main
from rto.commands import rewardbench
from rto.config import Config
from rto.data.chat import encode_pairs
from rto.data.collate import collate_completions
from rto.evaluation.formats import FORMATS
from rto.evaluation.rewardbench import read_pairs, read_scores
from rto.models.segment import SegmentScorer
from rto.numerics import masked_sum
from rto.pipeline import generate as answers_of
from rto.pipeline.answers import write_answers
from rto.pipeline.job import Job
from rto.pipeline.pairs import score_pairs
from rto.pipeline.readers import open_role
from rto.pipeline.resolve import resolve
from rto.rollouts.generate import generate
from rto.rollouts.score import sentence_scores, token_logprobs

ASKED = ("a b?", "Name a colour.", "Sort.", "a")
QUESTIONS = {
    "jsonl": [{"prompt": [{"role": "user", "content": text}]} for text in ASKED],
    "alpaca": [{"instruction": text, "dataset": "koala"} for text in ASKED],
    "arena": [{"uid": f"u{i}", "category": "c", "prompt": text} for i, text in enumerate(ASKED)],
    "arena-classic": [
        {"question_id": f"q{i}", "category": "c", "turns": [{"content": text}]} for i, text in enumerate(ASKED)
    ],
    "mtbench": [
        {"question_id": 81 + i, "category": category, "turns": [text, "And b?"]}
        for i, (text, category) in enumerate(zip(ASKED, ("writing", "writing", "math", "stem"), strict=True))
    ],
}
REFUSED = [
    (["--prompts", "q.jsonl"], "answers a file into a file: give --prompts FILE and --out FILE"),
    (["--out", "o.jsonl"], "give --prompts FILE and --out FILE"),
    (["--prompts", "q.jsonl", "--out", "o.jsonl", "--prompt", "Hi"], "--prompt goes without --format"),
    (["--prompts", "q.jsonl", "--out", "o.jsonl", "--search", "beams"], "--search beams goes without --format"),
    (["--prompts", "q.jsonl", "--out", "o.jsonl", "--beams", "3"], "--beams goes without --format"),
    (["--prompts", "q.jsonl", "--out", "o.jsonl", "--temperature", "1"], "goes by category: leave --temperature out"),
    (["--prompts", "q.jsonl", "--out", "o.jsonl", "--batch-tokens", "0"], "--batch-tokens: at least 1"),
    (["--prompts", "q.jsonl", "--out", "o.jsonl", "--limit", "0"], "limit: at least 1 question"),
    (["--prompts", "nowhere.jsonl", "--out", "o.jsonl"], "nowhere.jsonl: file not found"),
]


@pytest.fixture(scope="module")
def trained(files_recipe, tiny_model, pairs_file, tmp_path_factory) -> Config:
    """A run with a reference, a guide and two scorers; tests leave it as it is."""
    changes = [("model.name", tiny_model), ("data.pairs", pairs_file), ("data.max_prompt", "96")]
    changes += [("stages", '["sft", "prefer", "reward"]'), ("scorers.segments.cutoff", "4.0")]
    changes += [("output", str(tmp_path_factory.mktemp("runs") / "run"))]
    words = [word for key, value in changes for word in (f"--{key}", value)]
    assert main(["run", files_recipe, "--quiet", *words]) == 0
    return resolve(recipe.load(files_recipe, changes))


def ask(folder: Path, format: str) -> str:
    path = folder / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS[format]))
    return str(path)


def write(config: Config, format: str, out: Path, questions: str, **more):
    return write_answers(
        config, format, questions, out, "dpo", **{"clock": lambda: 1.0, "quiet": True, "model": "mine", **more}
    )


def rows(path: Path) -> list[dict]:
    text = path.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


class Killed(Exception):
    pass


@pytest.mark.parametrize("format", list(FORMATS))
def test_an_interrupted_file_is_completed_to_the_same_bytes(trained, tmp_path, format):
    questions = ask(tmp_path, format)
    whole = tmp_path / "whole" / "answers"
    done = write(trained, format, whole, questions)
    assert (done.made, done.kept) == (4, 0)

    parts, calls = tmp_path / "parts" / "answers", iter([1.0, 1.0])

    def until_killed() -> float:
        time = next(calls, None)
        if time is None:
            raise Killed
        return time

    with pytest.raises(Killed):
        write(trained, format, parts, questions, batch_tokens=1, clock=until_killed)  # a row a batch
    lines = parts.with_name("answers.rows.jsonl") if FORMATS[format].array else parts
    assert len(lines.read_text().splitlines()) == 2
    with lines.open("a") as file:
        file.write('{"half a li')
    again = write(trained, format, parts, questions, batch_tokens=100_000)
    assert (again.made, again.kept) == (2, 2)
    assert parts.read_bytes() == whole.read_bytes()
    assert {path.name for path in parts.parent.iterdir()} == {"answers", "answers.settings.json"}

    before = parts.read_bytes()
    assert (write(trained, format, parts, questions).made, parts.read_bytes()) == (0, before)


def test_answers_do_not_depend_on_the_order_of_the_questions(trained, tmp_path):
    write(trained, "arena", tmp_path / "a", ask(tmp_path, "arena"))
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS["arena"][::-1]))
    write(trained, "arena", tmp_path / "b", str(turned))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")[::-1]
    write(trained, "arena", tmp_path / "c", str(turned), seed=1)
    assert rows(tmp_path / "c") != rows(tmp_path / "b")


def test_a_limit_can_be_raised(trained, tmp_path):
    questions = ask(tmp_path, "alpaca")
    write(trained, "alpaca", tmp_path / "whole.json", questions)
    write(trained, "alpaca", tmp_path / "out.json", questions, limit=1)
    assert [row["instruction"] for row in rows(tmp_path / "out.json")] == ["a b?"]
    assert (again := write(trained, "alpaca", tmp_path / "out.json", questions)).kept == 1 and again.made == 3
    assert rows(tmp_path / "out.json") == rows(tmp_path / "whole.json")


def test_mtbench_sees_its_first_answer_at_the_temperature_of_the_category(trained, tmp_path):
    questions = ask(tmp_path, "mtbench")
    write(trained, "mtbench", tmp_path / "a", questions)
    write(trained, "mtbench", tmp_path / "b", questions, seed=1)
    turns = [[row["choices"][0]["turns"] for row in rows(tmp_path / name)] for name in "ab"]
    assert turns[0][2] == turns[1][2]  # math is greedy
    assert turns[0][:2] != turns[1][:2]

    job = Job(trained, quiet=True)
    role, encoder = job.workshop().open_policy(job.path("prefer"), "generated"), job.rows.encoder
    chat = [{"role": "user", "content": "Sort."}, {"role": "assistant", "content": turns[0][2][0]}]
    chat += [{"role": "user", "content": "And b?"}]
    again = generate(
        role, [encoder.prompt(chat)], [("any", 0)], seed=0, limit=8, end=encoder.end, pad=encoder.pad, temperature=0.0
    ).completions
    assert encoder.decode(again.ids[0][again.mask[0]].tolist()).strip() == turns[0][2][1]


def test_jsonl_answers_as_without_a_format(trained, tmp_path):
    questions = ask(tmp_path, "jsonl")
    write(trained, "jsonl", tmp_path / "a.jsonl", questions)
    call = ["generate", trained.output, "--policy", "dpo", "--prompts", questions, "--out", str(tmp_path / "b.jsonl")]
    assert rto(*call, "--batch-tokens", "50").code == 0
    plain = rows(tmp_path / "b.jsonl")
    assert [row["answer"] for row in plain] == [row["answer"] for row in rows(tmp_path / "a.jsonl")]
    assert rto(*call).code == 0
    assert rows(tmp_path / "b.jsonl") == plain


def test_what_was_made_otherwise_is_refused(trained, tmp_path):
    questions, out = ask(tmp_path, "arena"), tmp_path / "out"
    write(trained, "arena", out, questions)
    for changed, said in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"temperature": 0.5}, "temperature was 1.0 and is 0.5"),
        ({"model": "other"}, "model was 'mine' and is 'other'"),
    ):
        with pytest.raises(ValueError, match=f"made otherwise .{said}.*choose another --out"):
            write(trained, "arena", out, questions, **changed)
    with pytest.raises(ValueError, match="made otherwise .questions was"):
        edited = tmp_path / "edited.jsonl"
        edited.write_text(Path(questions).read_text().replace("Sort.", "Sort it."))
        write(trained, "arena", out, str(edited))
    with pytest.raises(ValueError, match="format was 'arena' and is 'alpaca'"):
        write(trained, "alpaca", out, ask(tmp_path, "alpaca"))
    (tmp_path / "theirs").write_text('{"uid": "u1"}\n')
    with pytest.raises(ValueError, match="was not written by `rto generate --format`"):
        write(trained, "arena", tmp_path / "theirs", ask(tmp_path, "arena"))
    assert (tmp_path / "theirs").read_text() == '{"uid": "u1"}\n'


def test_what_was_cut_is_counted(trained, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"uid": "u", "category": "c", "prompt": "long " * 40}) + "\n")
    done = write(trained, "arena", tmp_path / "out", str(path))
    assert (done.made, done.cut_prompts) == (1, 1)
    assert done.notes == [] or "style metadata is left out" in done.notes[0]
    assert ("metadata" in rows(tmp_path / "out")[0]) == (done.notes == [])


def test_a_prompt_that_is_rejected_is_named(trained, tmp_path):
    """Answers to fewer prompts would be taken for answers to all."""
    strict = trained.model_copy(update={"data": trained.data.model_copy(update={"on_over_long": "reject"})})
    asked = ["a?", "long " * 40]
    with pytest.raises(ValueError, match=r"--prompt, prompt 2: over_long .*none may be left out"):
        answers_of(strict, "dpo", prompts=asked)
    assert [row["prompt"] for row in answers_of(strict, "dpo", prompts=asked, limit=1)] == ["User: a?\n\nAssistant:"]
    assert len(answers_of(trained, "dpo", prompts=asked)) == 2  # cut
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    with pytest.raises(ValueError, match=r"q\.jsonl, prompt 2: over_long"):
        answers_of(strict, "dpo", file=str(path))


def rto(*words: str) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def test_the_command_line_writes_and_counts(trained, tmp_path):
    out = tmp_path / "m.json"
    call = ["generate", trained.output, "--policy", "sft", "--format", "alpaca", "--model-name", "m", "--out", str(out)]
    done = rto(*call, "--prompts", ask(tmp_path, "alpaca"), "--limit", "2")
    assert (done.code, done.out) == (0, "")
    assert done.err.splitlines()[-1].startswith("2 answers made")
    assert [row["generator"] for row in rows(out)] == ["m", "m"]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_flags_that_do_not_fit_are_refused(trained, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTIONS["mtbench"][0]) + "\n")
    refused = rto("generate", trained.output, "--policy", "sft", "--format", "mtbench", *words)
    assert refused.code == 2, refused
    assert said in refused.err
    assert refused.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]
    assert "--model-name goes with --format" in rto("generate", trained.output, "--model-name", "m").err


def test_the_command_line_knows_every_format():
    shown = rto("generate", "nowhere", "--format", "csv")
    assert shown.code == 2
    assert all(f"{format!r}" in shown.err or f" {format}" in shown.err for format in FORMATS)


def test_the_tiny_world_has_no_second_turn(world_recipe, tmp_path):
    with pytest.raises(ValueError, match="needs a chat: the tiny world has none"):
        write_answers(recipe.load(world_recipe), "mtbench", ask(tmp_path, "mtbench"), tmp_path / "out", "sft")


# --- pairs with subsets -------------------------------------------------------------------------------


@pytest.fixture
def benchmark(tmp_path) -> str:
    path = tmp_path / "bench.jsonl"
    pairs = [("a b?", "aa", "AAA", "alpacaeval-easy"), ("b?", "b", "Bbbb", "math-prm"), ("c?", "c", "d", "math-prm")]
    path.write_text(
        "".join(
            json.dumps({"prompt": prompt, "chosen": good, "rejected": bad, "subset": subset}) + "\n"
            for prompt, good, bad, subset in pairs
        )
    )
    return str(path)


@pytest.mark.parametrize("role", ["scorer", "segments", "guide"])
def test_pairs_are_scored_by_a_role(trained, benchmark, role):
    job = Job(trained, quiet=True)
    loaded, _ = read_pairs(benchmark, chat=True)
    pairs = encode_pairs(job.rows.encoder, loaded).rows
    name = "segments" if role == "segments" else None
    chosen, rejected = score_pairs(
        job, pairs, {row.row: row.prompt for row in loaded.rows}, "guide" if role == "guide" else "scorer", name
    )
    shop = job.workshop()
    c = collate_completions(
        [p.prompt for p in pairs], [p.rejected for p in pairs], [p.rejected_finished for p in pairs], 0
    )
    if role == "guide":
        both = [shop.open_policy(job.path("prefer"), "g"), shop.reference()]
        ours, theirs = (token_logprobs(one, c, 4096) for one in both)
        wanted = masked_sum(ours - theirs, c.mask)
    else:
        stage = "reward/segments" if name else "reward"
        scorer = open_role(job, shop, stage)
        raw = sentence_scores(SegmentScorer(scorer, shop.reference(), 4.0) if name else scorer, c, 4096)
        notes = json.loads((job.folder / stage / "scorer.json").read_text())
        wanted = (raw - notes["mean"]) / notes["std"]
    assert rejected == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len(chosen) == 3 and chosen != rejected


def test_rewardbench_scores_a_file_with_a_run(trained, benchmark, tmp_path, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    rewardbench.add(parser)
    call = [trained.output, "--pairs", benchmark, "--out", str(tmp_path / "out")]
    assert rewardbench.run(parser.parse_args([*call, "--role", "guide"])) == 0
    assert "| section Reasoning |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["role"], report["weights"], report["pooled"]["n"]) == ("guide", "published", 3)
    assert report["longer_wins"]["pooled"]["right"] == 0
    stored = read_scores(tmp_path / "out" / "scores.jsonl")
    assert [row.lengths for row in stored] == [(2, 3), (1, 4), (1, 1)]
    with pytest.raises(ValueError, match=r"no scorer 'segment', did you mean segments\?"):
        rewardbench.run(parser.parse_args([*call, "--name", "segment"]))
