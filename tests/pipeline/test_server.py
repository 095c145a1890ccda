"""A run's own scorer over HTTP: the same scores as its terms, and nothing for anybody without the token."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rto.rollouts.server
from rto import pipeline, recipe
from rto.batch import Signals
from rto.commands.serve_scorer import read_token
from rto.data.chat import PromptRow
from rto.data.collate import collate_completions
from rto.data.rows import make_rows, make_tokenizer
from rto.pipeline.job import Job
from rto.pipeline.readers import make_reader
from rto.pipeline.server import RunScorer
from rto.recipe import complete
from rto.rewards import TERMS
from rto.rollouts.server import Refused, ScorerServer, parse

SECRET = "a-secret-of-this-test"
SRC = Path(__file__).resolve().parents[2] / "src"
ONE = {"prompts": ["p"], "answers": ["a"], "tokens": [["a"]]}


@pytest.fixture(scope="module")
def run(world_recipe, tmp_path_factory) -> recipe.Config:
    """A run with a sentence scorer and a segment scorer; "raw" has the same weights, unnormalised."""
    folder = tmp_path_factory.mktemp("served") / "run"
    changes = [("output", str(folder)), ("sft.max_steps", "2"), ("scorers.pieces.cutoff", "1.0")]
    config = recipe.load(world_recipe, [*changes, ("stages", '["sft", "reward"]')])
    pipeline.run(config, quiet=True, fit_normaliser=True)
    pipeline.run(config, ["reward"], quiet=True, fit_normaliser=True)
    return config


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RTO_SCORER_TOKEN", SECRET)


class Serving:
    """A server in a thread of this process."""

    def __init__(self, score: Any, **options: Any) -> None:
        self.server = ScorerServer(score, SECRET, **options)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> ScorerServer:
        self.thread.start()
        return self.server

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.server.drain()


@pytest.fixture
def echo(quiet) -> Iterator[ScorerServer]:
    """Scores an answer by its length."""
    with Serving(lambda prompts, answers, tokens: [len(a) for a in answers], max_bytes=1000, timeout=0.5) as server:
        yield server


def ask(server: ScorerServer, body: Any = ONE, path: str = "", token: str | None = SECRET, **headers: str) -> Any:
    """Status and JSON reply; a GET where the body is None."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = headers if token is None else {"Authorization": f"Bearer {token}", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, given), timeout=10) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def raw(server: ScorerServer, request: bytes) -> bytes:
    """All that comes back for these bytes."""
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        connection.sendall(request)
        found = b""
        while piece := connection.recv(65536):
            found += piece
    return found


# --- the scores ---------------------------------------------------------------------------------------


def answers_of(config: recipe.Config) -> tuple[Any, list[PromptRow]]:
    """Answers as a policy may sample them: whole, cut, and of nothing but the end."""
    rows = make_rows(config, make_tokenizer(config, None))
    pairs = rows.pairs[:6]
    ids = [pair.chosen for pair in pairs]
    finished = [pair.chosen_finished for pair in pairs]
    ids[1], finished[1] = [i for i in ids[1] if i != rows.encoder.end], False
    ids[2], finished[2] = [rows.encoder.end], True
    c = collate_completions([pair.prompt for pair in pairs], ids, finished, rows.encoder.pad)
    return c, [PromptRow(pair.row, pair.prompt_text, pair.prompt) for pair in pairs]


def signals(config: recipe.Config, terms: list[dict[str, Any]], scorer: str | None) -> Signals:
    job = Job(pipeline.resolve(config), quiet=True)
    c, prompts = answers_of(config)
    shop = job.workshop()
    reader = make_reader(job, shop, job.config.policy.model_copy(update={"scorer": scorer}), terms)
    return Signals(**reader.read(c, torch.zeros(c.ids.shape), shop.reference(), prompts))


def term(kind: str, **options: Any) -> dict[str, Any]:
    return complete({"type": kind, **options}, {name: row.function for name, row in TERMS.items()}, "test")


def reward(spec: dict[str, Any], read: Signals) -> torch.Tensor:
    return TERMS[spec["type"]].function(read, **{key: value for key, value in spec.items() if key != "type"})


def test_the_http_term_gives_what_the_terminal_term_gives(run, quiet):
    with Serving(RunScorer(run)) as server:
        over = term("http", url=server.url, retries=0, batch=4)
        read = signals(run, [over, term("terminal", clip=None)], None)
    there, here = reward(over, read), reward(term("terminal", clip=None), read)
    assert here.abs().sum() > 0.1 and len(set(here.sum(-1).tolist())) > 3
    torch.testing.assert_close(there, here, atol=1e-5, rtol=0)


def test_a_segment_scorer_gives_its_normalised_segments(run, quiet):
    with Serving(RunScorer(run, "reward/pieces")) as server:
        read = signals(run, [term("http", url=server.url, retries=0), term("segment"), term("terminal")], "pieces")
    assert read.segments is not None and read.http is not None
    assert (read.segments != 0).sum() > 8
    torch.testing.assert_close(read.http, read.segments, atol=1e-5, rtol=0)


def test_foreign_tokens_get_the_sentence_score(run, capsys):
    c, prompts = answers_of(run)
    scorer = RunScorer(run, "reward/pieces")
    read = signals(run, [term("segment"), term("terminal")], "pieces")
    texts = [scorer.encoder.decode(ids[mask].tolist()) for ids, mask in zip(c.ids, c.mask, strict=True)]
    end = scorer.encoder.tokenizer.decode([scorer.encoder.end])
    tokens = [[f"{text}!", end] if done else [f"{text}!"] for text, done in zip(texts, c.finished, strict=True)]
    found = scorer([row.text for row in prompts], texts, tokens)
    assert read.scores is not None
    torch.testing.assert_close(torch.tensor(found), read.scores, atol=1e-5, rtol=0)
    assert "the tokens of 6 answers are not this run's" in capsys.readouterr().err


def test_tokens_tell_ids_that_the_tokenizer_would_not_choose(run):
    scorer = RunScorer(run)
    words = [i for i in range(len(scorer.encoder.tokenizer)) if i not in scorer.encoder.tokenizer.all_special_ids]
    ids = [*words[:3], scorer.encoder.end]
    texts = [scorer.encoder.tokenizer.decode([i]) for i in ids]
    assert scorer._ids("p", scorer.encoder.decode(ids), texts) == (ids, True, True)
    assert scorer._ids("p", scorer.encoder.decode(ids), texts[:-1]) == (ids[:-1], False, True)


def test_what_is_too_long_is_refused_and_nothing_is_nothing(run):
    scorer = RunScorer(run)
    c, prompts = answers_of(run)
    word = scorer.encoder.decode(c.ids[0][:1].tolist())
    long = " ".join([word.strip()] * 13)
    with pytest.raises(Refused, match="answer 0 has more than the 12 tokens"):
        scorer([prompts[0].text], [long], [[word] * 13])
    assert scorer([], [], []) == []


def test_a_scorer_that_is_not_there_is_named(run):
    with pytest.raises(ValueError, match="no scorer 'reward/peices', did you mean reward/pieces"):
        RunScorer(run, "reward/peices")
    with pytest.raises(ValueError, match="is not finished: do `rto"):
        RunScorer(run.model_copy(update={"output": run.output + "-none"}))


# --- the door -----------------------------------------------------------------------------------------


def test_health_and_scores_need_the_token(echo):
    assert ask(echo, None, "health") == (200, {"status": "ok"})
    assert ask(echo) == (200, {"rewards": [1]})
    for token in (None, "", SECRET[:-1], SECRET + "x", "\u00e9"):
        for body, path in ((None, "health"), (ONE, ""), (None, "nowhere")):
            status, said = ask(echo, body, path, token)
            assert (status, list(said)) == (401, ["error"])
            assert SECRET not in str(said)


def test_a_server_needs_a_loopback_address_or_a_word():
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(ValueError, match="--allow-remote"):
            ScorerServer(lambda *_: [], SECRET, host or "192.0.2.1")
    with pytest.raises(ValueError, match="is no address"):
        ScorerServer(lambda *_: [], SECRET, "no.such.host.invalid")
    with ScorerServer(lambda *_: [], SECRET, "0.0.0.0", allow_remote=True) as server:
        assert server.url.startswith("http://0.0.0.0:")


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 900, 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        ([], 400, "the request must be"),
        ({}, 400, "the request must be"),
        (ONE | {"prompts": "p"}, 400, "the request must be"),
        (ONE | {"tokens": [["a", 1]]}, 400, "the request must be"),
        (ONE | {"tokens": ["a"]}, 400, "the request must be"),
        (ONE | {"prompts": []}, 400, "0 prompts, 1 answers and 1 rows of tokens"),
        (ONE | {"tokens": [[]]}, 400, "answer 0 has no tokens"),
        (ONE | {"answers": ["\ud800"]}, 400, "half a character"),
        (b" " * 1001, 413, "1001 bytes; at most 1000"),
        (b" " * 3_000_000, 413, "at most 1000"),
    ],
)
def test_a_bad_request_is_told_in_json(echo, body, status, said):
    code, reply = ask(echo, body)
    assert code == status and list(reply) == ["error"] and said in reply["error"]


def test_the_number_of_rows_is_bounded(monkeypatch):
    monkeypatch.setattr(rto.rollouts.server, "ROWS", 2)
    many = {key: value * 3 for key, value in ONE.items()}
    with pytest.raises(Refused, match="3 answers; at most 2") as refusal:
        parse(json.dumps(many).encode())
    assert refusal.value.status == 413


HEAD = f"POST / HTTP/1.1\r\nAuthorization: Bearer {SECRET}\r\n".encode()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (HEAD + b"\r\n", 411),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1e3\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n", 413),
        (HEAD.replace(b"POST /", b"POST /../../etc/passwd") + b"\r\n", 404),
        (HEAD.replace(b"POST", b"PUT") + b"\r\n", 501),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_odd_requests_are_refused_without_a_word_of_this_machine(echo, request_, status):
    reply = raw(echo, request_)
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.0 {status} ".encode())
    assert list(json.loads(body)) == ["error"]
    assert b"Python" not in head and b"Server: rto" in head
    assert b"passwd" not in reply and b"Traceback" not in reply


def test_what_is_no_http_is_answered_and_closed(echo):
    assert b"not a request" in raw(echo, b"\x16\x03\x01 what\r\n\r\n")


@pytest.mark.parametrize("begun", [b"", b"POST / HT", HEAD, HEAD + b"Content-Length: 500\r\n\r\n{"])
def test_a_slow_client_is_cut_off(echo, begun):
    start = time.monotonic()
    with socket.create_connection(echo.server_address[:2], timeout=10) as connection:
        connection.sendall(begun)
        while time.monotonic() - start < 5:  # a byte now and then does not win more time
            try:
                connection.sendall(b"x")
                time.sleep(0.1)
            except OSError:
                break
    assert time.monotonic() - start < 3
    assert ask(echo)[0] == 200


def test_a_failure_of_the_scorer_stays_at_home(quiet, capsys):
    def fail(prompts: Any, answers: Any, tokens: Any) -> Any:
        if answers == ["a"]:
            raise ValueError("/home/me/model is broken")
        return [float("nan")]

    with Serving(fail) as server:
        assert ask(server) == (500, {"error": "the scorer failed; its own log says why"})
        assert "/home/me/model is broken" in capsys.readouterr().err
        assert ask(server, ONE | {"answers": ["b"]})[0] == 500  # NaN is no JSON


def test_the_model_is_asked_by_one_at_a_time(quiet):
    inside, most = [0], [0]

    def score(prompts: list[str], answers: list[str], tokens: Any) -> list[float]:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return [1.0]

    with Serving(score) as server:
        threads = [threading.Thread(target=ask, args=(server,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1]


def test_too_many_connections_are_sent_away_for_a_while(monkeypatch, quiet):
    monkeypatch.setattr(rto.rollouts.server, "CONNECTIONS", 1)
    with Serving(lambda *_: [1.0], timeout=5.0) as server:
        with socket.create_connection(server.server_address[:2]):
            time.sleep(0.1)
            assert raw(server, b"").startswith(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n")
        time.sleep(0.1)
        assert ask(server)[0] == 200


# --- the command --------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_told_to_end(run):
    words = "from rto.commands import serve_scorer as s; import argparse, sys; p = argparse.ArgumentParser(); s.add(p)"
    words += "; sys.exit(s.run(p.parse_args()))"
    environment = {key: value for key, value in os.environ.items() if key != "RTO_SCORER_TOKEN"}
    environment |= {"PYTHONPATH": str(SRC), "TRANSFORMERS_VERBOSITY": "error"}
    call = [sys.executable, "-c", words, run.output]
    process = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        told = next(line for line in process.stderr if "RTO_SCORER_TOKEN=" in line)
        token = told.partition("RTO_SCORER_TOKEN=")[2].split()[0]
        assert len(token) > 40
        request = urllib.request.Request(url + "health", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            assert json.loads(reply.read()) == {"status": "ok"}
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    assert process.returncode == 0
    assert token not in rest and "ended" in rest and "Traceback" not in rest


def test_the_token_of_the_environment(monkeypatch):
    monkeypatch.setenv("RTO_SCORER_TOKEN", f" {SECRET}\n")
    assert read_token() == (SECRET, True)
    monkeypatch.setenv("RTO_SCORER_TOKEN", "")
    assert read_token()[0] != read_token()[0] and not read_token()[1]
    for bad in ("short-secret", "s\u00e9cret-of-some-length", "secret\nof some length"):
        monkeypatch.setenv("RTO_SCORER_TOKEN", bad)
        with pytest.raises(ValueError, match="16 or more printable") as refusal:
            read_token()
        assert bad not in str(refusal.value)
