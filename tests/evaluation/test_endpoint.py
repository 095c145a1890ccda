"""Questions to a real server over HTTP: faults, pace, resuming, and no key anywhere."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openai")

from rto.evaluation.endpoint import Endpoint, Task, ask_all, read_rows

KEY = "sk-test-0123456789abcdef"


def tasks(n: int = 4) -> list[Task]:
    return [Task(f"k{i}", [{"role": "user", "content": f"question {i}"}], {"id": str(i)}) for i in range(n)]


@pytest.fixture
def endpoint(judge_server) -> Endpoint:
    judge_server.reply = lambda messages: "reply to " + messages[-1]["content"]
    return Endpoint("judge-1", judge_server.url, timeout=5.0, retries=3, concurrency=4)


def replies(rows) -> list[str | None]:
    return [row["reply"] for row in rows]


EXPECTED = [f"reply to question {i}" for i in range(4)]


def test_rows_are_in_the_order_of_the_tasks_and_on_disk(judge_server, endpoint, tmp_path):
    seen = []
    rows = ask_all(tasks(), endpoint, tmp_path / "deep" / "rows.jsonl", lambda done, all: seen.append((done, all)))
    assert replies(rows) == EXPECTED
    assert [row["id"] for row in rows] == list("0123")
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert rows[0]["judge"] == "judge-1" and rows[0]["endpoint"] == judge_server.url
    assert rows[0]["served"] == "stub-7b" and rows[0]["finish"] == "stop" and rows[0]["top"] is None
    assert rows[0]["settings"] == {"temperature": 0.0, "max_tokens": 2048, "top_logprobs": 0, "seed": 0}
    on_disk = sorted(read_rows(tmp_path / "deep" / "rows.jsonl"), key=lambda row: row["key"])
    assert on_disk == rows


def test_what_is_sent(judge_server, endpoint, tmp_path):
    ask_all(tasks(1), replace(endpoint, temperature=0.7, max_tokens=5, seed=None), tmp_path / "rows.jsonl")
    [body] = judge_server.asked
    assert body == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": "question 0"}],
        "temperature": 0.7,
        "max_tokens": 5,
    }
    assert judge_server.authorization == ["Bearer none"]


def test_log_probs_of_the_first_token(judge_server, endpoint, tmp_path):
    judge_server.top = [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -2.5}, {"token": "m", "logprob": -9}]
    [row] = ask_all(tasks(1), replace(endpoint, top_logprobs=5, max_tokens=1), tmp_path / "rows.jsonl")
    assert row["top"] == {"m": -0.1, "M": -2.5}
    assert judge_server.asked[0]["logprobs"] is True and judge_server.asked[0]["top_logprobs"] == 5


# --- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [429, 500, 503, 408, "cut", "half"])
def test_what_can_pass_is_tried_again(judge_server, endpoint, tmp_path, fault):
    judge_server.plan = lambda n, game: fault if n < 2 else None
    assert replies(ask_all(tasks(), endpoint, tmp_path / "rows.jsonl")) == EXPECTED
    assert set(judge_server.games.values()) == {3}


def test_a_server_that_hangs_is_tried_again(judge_server, endpoint, tmp_path):
    judge_server.plan = lambda n, game: "hang" if n == 0 else None
    assert replies(ask_all(tasks(), replace(endpoint, timeout=0.3), tmp_path / "rows.jsonl")) == EXPECTED


def test_retry_after_is_honoured(judge_server, endpoint, tmp_path):
    judge_server.plan = lambda n, game: 429 if n == 0 else None
    judge_server.retry_after = "0.4"
    start = time.monotonic()
    ask_all(tasks(1), endpoint, tmp_path / "rows.jsonl")
    assert time.monotonic() - start > 0.4


def test_what_fails_for_good_is_listed_and_asked_again_by_the_next_call(judge_server, endpoint, tmp_path):
    bad = "question 2"
    judge_server.plan = lambda n, game: 500 if judge_server.asked[-1]["messages"][0]["content"] == bad else None
    path = tmp_path / "rows.jsonl"
    rows = ask_all(tasks(), replace(endpoint, concurrency=1), path)
    assert replies(rows) == [*EXPECTED[:2], None, EXPECTED[3]]
    assert rows[2]["error"].startswith("status 500") and len(judge_server.asked) == 3 + 4
    judge_server.plan = lambda n, game: None
    assert replies(ask_all(tasks(), endpoint, path)) == EXPECTED
    assert len(judge_server.asked) == 3 + 4 + 1
    assert len(path.read_text().splitlines()) == 5 and len(read_rows(path)) == 4


def test_a_bad_request_is_not_repeated(judge_server, endpoint, tmp_path):
    judge_server.plan = lambda n, game: 400
    [row] = ask_all(tasks(1), endpoint, tmp_path / "rows.jsonl")
    assert row["reply"] is None and "status 400" in row["error"] and len(judge_server.asked) == 1


def test_a_server_that_has_gone_is_not_waited_for_by_every_task(judge_server, endpoint, tmp_path):
    judge_server.plan = lambda n, game: 503
    rows = ask_all(tasks(20), replace(endpoint, concurrency=1), tmp_path / "rows.jsonl")
    assert all(row["error"] for row in rows)
    assert len(judge_server.asked) == 8 * 4 + 12


def test_nobody_there(endpoint, tmp_path):
    [row] = ask_all(tasks(1), replace(endpoint, base_url="http://127.0.0.1:9/v1", retries=1), tmp_path / "rows.jsonl")
    assert row["error"].startswith("no connection")


def test_a_newer_name_of_max_tokens_is_found(judge_server, endpoint, tmp_path):
    judge_server.plan = lambda n, game: 400 if "max_tokens" in judge_server.asked[-1] else None
    judge_server.refusal = '{"error": {"message": "Use \'max_completion_tokens\' instead."}}'
    rows = ask_all(tasks(), replace(endpoint, concurrency=1), tmp_path / "rows.jsonl")
    assert replies(rows) == EXPECTED and len(judge_server.asked) == 5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_at_once(judge_server, endpoint, tmp_path, status):
    judge_server.plan = lambda n, game: status
    with pytest.raises(ValueError, match=f"status {status}.*OPENAI_API_KEY is not set") as caught:
        ask_all(tasks(50), endpoint, tmp_path / "rows.jsonl")
    assert "\n" not in str(caught.value) and len(judge_server.asked) < 20


# --- the key ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400, 401])
def test_no_key_in_any_written_byte(judge_server, endpoint, tmp_path, monkeypatch, status, capfd):
    """Even where the server sends it back."""
    monkeypatch.setenv("MY_KEY", KEY)
    judge_server.reply = lambda messages: f"your key is {KEY}"
    judge_server.refusal = f"bad key {KEY}"
    judge_server.plan = lambda n, game: status if status != 200 else None
    said = ""
    try:
        rows = ask_all(tasks(), replace(endpoint, key_env="MY_KEY"), tmp_path / "rows.jsonl")
        assert "[key]" in (rows[0]["reply"] or rows[0]["error"])
    except ValueError as error:
        said = str(error)
        assert "[key]" in said
    assert set(judge_server.authorization) == {f"Bearer {KEY}"}
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY.encode() not in written and KEY not in said + "".join(capfd.readouterr())


@pytest.mark.parametrize("fault", [400, "half", None])
def test_a_key_is_taken_out_before_a_text_is_cut(judge_server, endpoint, tmp_path, monkeypatch, fault):
    """Errors show 300 characters of a refusal, and 100 of what is no chat completion or no text: each ends in a key."""
    monkeypatch.setenv("MY_KEY", KEY)
    judge_server.refusal = "x" * 290 + KEY
    judge_server.model = "z" * 40 + KEY  # half of the JSON has it from its 92nd character on
    judge_server.reply = lambda messages: "y" * 300 if fault == "half" else ["x" * 93 + KEY]
    judge_server.plan = lambda n, game: fault
    (row,) = ask_all(tasks(1), replace(endpoint, key_env="MY_KEY", retries=0), tmp_path / "rows.jsonl")
    assert "[key]" in row["error"] and KEY[:4] not in (tmp_path / "rows.jsonl").read_text()


def test_openai_itself_needs_a_key(endpoint, tmp_path):
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        ask_all(tasks(1), replace(endpoint, base_url=None), tmp_path / "rows.jsonl")


@pytest.mark.parametrize("url", ["http://user:pass@host/v1", "http://host/v1?key=1", "ftp://host", "host:8000"])
def test_an_address_is_only_an_address(url):
    with pytest.raises(ValueError, match="base_url"):
        Endpoint("m", url)


BAD_PORTS = {"http://host:8000O/v1": "'8000O'", "http://host:99999": "0-65535", "http://[1": "IPv6"}


@pytest.mark.parametrize(("url", "said"), BAD_PORTS.items())
def test_an_address_with_a_bad_port_is_named(url, said):
    with pytest.raises(ValueError, match=f"base_url is no address.*{said}"):
        Endpoint("m", url)


@pytest.mark.parametrize("wrong", [{"model": ""}, {"concurrency": 0}, {"retries": -1}, {"per_minute": 0}])
def test_settings_are_checked(endpoint, wrong):
    with pytest.raises(ValueError):
        replace(endpoint, **wrong)


def test_openai_is_an_extra(endpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'rto-rlhf\[judge\]'"):
        ask_all(tasks(1), endpoint, tmp_path / "rows.jsonl")


# --- pace ---------------------------------------------------------------------------------------------


def test_no_more_questions_at_a_time_than_allowed(judge_server, endpoint, tmp_path):
    judge_server.delay = 0.05
    ask_all(tasks(12), replace(endpoint, concurrency=3), tmp_path / "rows.jsonl")
    assert 1 < judge_server.most <= 3


def test_the_rate_is_kept(judge_server, endpoint, tmp_path):
    start = time.monotonic()
    ask_all(tasks(6), replace(endpoint, per_minute=600), tmp_path / "rows.jsonl")
    assert time.monotonic() - start >= 0.5  # five gaps of 0.1 s


# --- resuming -----------------------------------------------------------------------------------------


def test_an_interrupt_keeps_what_is_there(judge_server, endpoint, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask_all(tasks(10), replace(endpoint, concurrency=1), path, stop)
    assert len(read_rows(path)) == 3
    had = len(judge_server.asked)
    assert len(ask_all(tasks(10), endpoint, path)) == 10
    assert len(judge_server.asked) <= had + 7


@pytest.mark.parametrize("rest", [b'{"key": "k9", "repl', b'{"key": "k9"}', b"\xff\xfe"])
def test_a_half_written_line_is_cut_off(judge_server, endpoint, tmp_path, rest):
    path = tmp_path / "rows.jsonl"
    ask_all(tasks(2), endpoint, path)
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert len(read_rows(path)) == 2
    assert replies(ask_all(tasks(), endpoint, path)) == EXPECTED
    assert path.read_bytes().startswith(whole) and rest not in path.read_bytes() and len(judge_server.asked) == 4


def test_a_line_that_lacks_only_its_end_counts(judge_server, endpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    ask_all(tasks(2), endpoint, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert replies(ask_all(tasks(), endpoint, path)) == EXPECTED
    assert len(judge_server.asked) == 4 and len(read_rows(path)) == 4


def test_a_broken_line_in_the_middle_is_an_error(endpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    ask_all(tasks(2), endpoint, path)
    path.write_bytes(b"oops\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1"):
        ask_all(tasks(), endpoint, path)


@pytest.mark.parametrize("other", [{"model": "judge-2"}, {"temperature": 1.0}, {"seed": 1}])
def test_replies_of_another_judge_are_not_mixed_in(endpoint, tmp_path, other):
    path = tmp_path / "rows.jsonl"
    ask_all(tasks(2), endpoint, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="never mixed"):
        ask_all(tasks(), replace(endpoint, **other), path)
    assert path.read_bytes() == before


def test_replies_to_other_messages_are_not_taken(endpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    ask_all(tasks(2), endpoint, path)
    changed = [replace(task, messages=[{"role": "user", "content": "other"}]) for task in tasks(2)]
    with pytest.raises(ValueError, match="other messages"):
        ask_all(changed, endpoint, path)


def test_one_process_writes(endpoint, tmp_path):
    path = tmp_path / "rows.jsonl"

    def again(done: int, total: int) -> None:
        with pytest.raises(ValueError, match="another process"):
            ask_all(tasks(), endpoint, path)

    ask_all(tasks(2), endpoint, path, again)


def test_keys_and_names_are_the_tasks_own(endpoint, tmp_path):
    with pytest.raises(ValueError, match="two tasks"):
        ask_all([*tasks(2), *tasks(1)], endpoint, tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="'reply' in about"):
        ask_all([Task("k", [], {"reply": 1})], endpoint, tmp_path / "rows.jsonl")


def test_half_characters_are_sent_and_written(judge_server, endpoint, tmp_path):
    path = Path(tmp_path / "rows.jsonl")
    task = Task("k", [{"role": "user", "content": "\ud800 and \u00e9"}], {"id": "\ud800"})
    [row] = ask_all([task], endpoint, path)
    assert row["reply"] == "reply to ? and \u00e9"
    assert json.loads(path.read_text(encoding="utf-8"))["id"] == "\ud800"
    assert ask_all([task], endpoint, path) == [row]
