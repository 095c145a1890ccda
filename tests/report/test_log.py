from __future__ import annotations

import io
import json
import logging
import math

import pytest

from rto.report import Progress, RunLog, read_metrics, read_samples


def test_rows_come_back_in_order_and_by_stage(tmp_path):
    log = RunLog(tmp_path / "run")
    log.metrics("sft", 1, {"loss": 2.5})
    log.metrics("rl/rto", 1, {"kl": 0.25, "reward/total": -1.0})
    log.metrics("sft", 2, {"loss": 2})
    log.sample("rl/rto", 1, {"prompt": "名前?", "answer": 'a "b"\n', "score": 0.5})
    assert read_metrics(tmp_path / "run") == [
        {"stage": "sft", "step": 1, "loss": 2.5},
        {"stage": "rl/rto", "step": 1, "kl": 0.25, "reward/total": -1.0},
        {"stage": "sft", "step": 2, "loss": 2.0},
    ]
    assert [row["step"] for row in read_metrics(tmp_path / "run", "sft")] == [1, 2]
    assert read_metrics(tmp_path / "run", "rl") == []
    sample = {"stage": "rl/rto", "step": 1, "prompt": "名前?", "answer": 'a "b"\n', "score": 0.5}
    assert read_samples(tmp_path / "run", "rl/rto") == [sample]


def test_nothing_logged_reads_as_nothing(tmp_path):
    assert read_metrics(tmp_path) == [] and read_samples(tmp_path) == []
    RunLog(tmp_path).drop_stage("sft")
    assert read_metrics(tmp_path) == []


def test_numbers_that_are_not_finite_are_null_and_listed(tmp_path):
    log = RunLog(tmp_path)
    log.metrics("prefer", 3, {"loss": math.nan, "margin": -math.inf, "accuracy": 0.5})
    log.sample("prefer", 3, {"score": math.inf, "terms": {"kl": [0.0, math.nan]}})

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {
        "stage": "prefer",
        "step": 3,
        "loss": None,
        "margin": None,
        "accuracy": 0.5,
        "nonfinite": ["loss", "margin"],
    }
    (sample,) = read_samples(tmp_path)
    assert sample["score"] is None and sample["terms"] == {"kl": [0.0, None]}
    assert sample["nonfinite"] == ["score", "terms.kl.1"]


def test_a_lone_surrogate_survives(tmp_path):
    RunLog(tmp_path).sample("rl/rto", 1, {"answer": "a\ud83db"})
    assert read_samples(tmp_path)[0]["answer"] == "a\ud83db"


def test_reserved_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl, stage 'sft', step 7: the key 'step'"):
        RunLog(tmp_path).metrics("sft", 7, {"step": 1.0})


def test_half_written_last_line_is_dropped_with_a_log_message(tmp_path, caplog):
    RunLog(tmp_path).metrics("sft", 1, {"loss": 2.5})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"stage": "sft", "note": "é'.encode()[:-1])
    with caplog.at_level(logging.WARNING):
        assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert "metrics.jsonl" in caplog.text and "half-written" in caplog.text
    RunLog(tmp_path).metrics("sft", 2, {"loss": 2.0})  # a run that continues does not append to the broken line
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}')
    RunLog(tmp_path).metrics("sft", 2, {})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "line",
    ["[1]", '{"stage": "a"}', '{"stage": "a", "step": "1"}', '{"stage": "a", "step": true}', '{"stage": 3, "step": 1}']
    + ["[" * 100_000],
    ids=range(6),
)
def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"stage": "a", "step": 1}}\n{line}\n{{"stage": "a", "step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_drop_stage_keeps_the_others_and_cut_what_a_checkpoint_covers(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.metrics("sft", step, {"loss": 1.0})
        log.metrics("rl/rto", step, {"kl": math.nan})
        log.sample("sft", step, {"answer": "x"})
    log.cut("rl/rto", 2)
    assert [row["step"] for row in read_metrics(tmp_path, "rl/rto")] == [1, 2]
    assert read_metrics(tmp_path, "rl/rto")[0]["nonfinite"] == ["kl"]
    log.drop_stage("sft")
    assert {row["stage"] for row in read_metrics(tmp_path)} == {"rl/rto"}
    assert read_samples(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_cut_leaves_all_other_bytes_alone(tmp_path):
    others = [b'{"stage":"sft","step":9,"loss":1e0}', b'{ "step": 3, "stage": "rl/rto", "note": "\xc3\xa9" }']
    later = [b'{"stage": "rl/rto", "step": 4}', b'{"stage": "rl/rto", "step": 5, "kl": null, "nonfinite": ["kl"]}']
    rows = [others[0], later[0], others[1], later[1], others[0]]
    half = b'{"stage": "rl/rto", "step": 6, "k'
    log = RunLog(tmp_path)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_bytes(b"".join(row + b"\n" for row in rows) + half)
    log.cut("rl/rto", 3)
    kept = b"".join(row + b"\n" for row in (others[0], others[1], others[0]))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == kept
    log.cut("rl/rto", 3)
    log.cut("rl", 0)  # another stage
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept
    log.metrics("rl/rto", 4, {"kl": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path, "rl/rto")] == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_cut_removes_a_half_written_line_even_when_no_row_goes(tmp_path):
    log = RunLog(tmp_path)
    log.metrics("sft", 1, {"loss": 2.5})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"stage"')
    log.cut("sft", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole and not (tmp_path / "samples.jsonl").exists()


def test_cut_refuses_a_broken_line_in_the_middle_and_changes_nothing(tmp_path):
    log = RunLog(tmp_path)
    text = b'{"stage": "a", "step": 1}\n[1]\n{"stage": "a", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        log.cut("a", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == text


def test_progress_without_a_terminal_prints_a_plain_line_a_tenth(capsys):
    with Progress(True) as progress:
        progress.start("prefer", 200)
        for step in range(1, 201):
            progress.update(step, {"loss": 0.5, "tokens_per_second": 1234.4})
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/200" for step in range(20, 201, 20)]
    assert all(line.startswith("prefer ") and "loss 0.5  1,234 tokens/s" in line for line in lines)
    assert "\x1b" not in text and "\r" not in text


def test_progress_of_few_steps_and_of_a_continued_stage(capsys):
    with Progress(True) as progress:
        progress.start("sft", 3)
        for step in (1, 2, 3):
            progress.update(step, {})
        progress.start("rl/rto", 100, done=57)
        for step in range(58, 101):
            progress.update(step, {})
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == [
        *("1/3", "2/3", "3/3"),
        *("60/100", "70/100", "80/100", "90/100", "100/100"),
    ]


def test_progress_is_silent_when_off_and_live_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for enabled in (False, True):
        stream = Terminal()
        monkeypatch.setattr("sys.stderr", stream)
        with Progress(enabled) as progress:
            progress.start("[sft]", 2)
            progress.update(1, {"loss": math.nan})
            progress.start("prefer", 2)
            progress.update(2, {"loss": 0.25})
        shown[enabled] = stream.getvalue()
    assert shown[False] == ""
    assert "[sft]" in shown[True] and "prefer" in shown[True] and "2/2" in shown[True]
