"""Rewards from a server on the loopback that does everything a server can do wrong."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

import rto.rollouts.http
from rto.rollouts.http import HttpScorer, asked_wait

PROMPTS = ["a", "b", "\u00e9\ud800"]  # the last one is half a character
ANSWERS = ["x y.", "z.", "w."]
TOKENS = [["x", " y", "."], ["z", "."], ["w", "."]]
NAN = math.nan


class Server(ThreadingHTTPServer):
    """Answers the n-th request with the n-th of ``replies``, further ones with the last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Callable[[Handler], None]] = [lengths]
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.released = threading.Event()  # what hangs waits for it
        self.url = f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        mine = self.server
        mine.times.append(time.monotonic())
        mine.asked.append(json.loads(body))
        mine.headers.append(dict(self.headers))
        mine.replies[min(len(mine.asked), len(mine.replies)) - 1](self)

    def do_GET(self) -> None:
        raise AssertionError("a POST became a GET")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def reply(body: bytes | str, status: int = 200, **headers: str) -> Callable[[Handler], None]:
    def send(to: Handler) -> None:
        data = body.encode() if isinstance(body, str) else body
        to.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            to.send_header(name.replace("_", "-"), value)
        to.end_headers()
        to.wfile.write(data)

    return send


def lengths(to: Handler) -> None:
    """The number of tokens as every answer's reward."""
    rewards = [len(row) for row in to.server.asked[-1]["tokens"]]
    reply(json.dumps({"rewards": rewards}))(to)


def hang(to: Handler) -> None:
    to.server.released.wait(20)
    to.close_connection = True


def drip(to: Handler) -> None:
    """A byte at a time: no single wait is long."""
    to.send_response(200)
    to.send_header("Content-Length", "1000")
    to.end_headers()
    while not to.server.released.wait(0.05):
        try:
            to.wfile.write(b" ")
        except OSError:
            break
    to.close_connection = True


def drop(to: Handler) -> None:
    to.close_connection = True


def break_off(to: Handler) -> None:
    to.send_response(200)
    to.send_header("Content-Length", "1000")
    to.end_headers()
    to.wfile.write(b'{"rewards": [')
    to.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "RTO_SCORER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def scorer(server: Server, **options: Any) -> HttpScorer:
    return HttpScorer(server.url, **{"timeout": 5.0, "retries": 2, "batch": 2, "backoff": 0.01} | options)


def score(of: HttpScorer) -> list[list[float]]:
    found = of.score(PROMPTS, ANSWERS, TOKENS)
    assert found.dtype == torch.float32
    return [[None if math.isnan(x) else x for x in row] for row in found.tolist()]


# --- a server that works ------------------------------------------------------------------------------


def test_numbers_lists_and_null(server):
    server.replies = [reply('{"rewards": [2, null]}'), reply('{"rewards": [[0.5, -1]], "model": "mine"}')]
    asking = scorer(server)
    assert score(asking) == [[0, 0, 2], [None, None, 0], [0.5, -1, 0]]
    assert asking.failures == 0 and asking.last_failure is None


def test_the_request_in_batches(server):
    assert score(scorer(server)) == [[0, 0, 3], [0, 2, 0], [0, 2, 0]]
    assert server.asked == [
        {"prompts": PROMPTS[:2], "answers": ANSWERS[:2], "tokens": TOKENS[:2]},
        {"prompts": PROMPTS[2:], "answers": ANSWERS[2:], "tokens": TOKENS[2:]},
    ]
    assert server.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in server.headers[0]


def test_no_answers_no_request(server):
    assert scorer(server).score([], [], []).shape == (0, 0)
    assert not server.asked


def test_the_token_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("RTO_SCORER_TOKEN", "secret\n")
    monkeypatch.setenv("OTHER", "other")
    score(scorer(server))
    score(scorer(server, token_env="OTHER"))
    assert [headers["Authorization"] for headers in server.headers[::2]] == ["Bearer secret", "Bearer other"]


# --- what passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [reply("busy", 500), reply("", 503), reply("", 429), reply("", 408), drop, break_off])
def test_passing_faults_are_tried_again(server, fault):
    server.replies = [fault, fault, lengths]
    asking = scorer(server)
    assert score(asking) == [[0, 0, 3], [0, 2, 0], [0, 2, 0]]
    assert len(server.asked) == 4 and server.asked[0] == server.asked[2]
    assert asking.failures == 0


def test_pauses_grow(server):
    server.replies = [reply("", 500)]
    score(scorer(server, backoff=0.05, batch=3, retries=3))
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 3
    for gap, pause in zip(gaps, (0.05, 0.1, 0.2), strict=True):
        assert gap >= 0.5 * pause


def test_the_server_may_ask_for_time(server):
    server.replies = [reply("", 429, Retry_After="0.4"), lengths]
    score(scorer(server, batch=3))
    assert server.times[1] - server.times[0] >= 0.4


def test_the_time_may_be_a_date():
    def asked(seconds: float) -> float:
        when = datetime.now(timezone.utc) + timedelta(seconds=seconds)
        return asked_wait({"Retry-After": format_datetime(when, usegmt=True)})

    assert 80 < asked(100) <= 100
    assert asked(-100) == asked_wait({}) == asked_wait({"Retry-After": "nan"}) == 0.0


def test_but_not_for_ever(server, monkeypatch):
    monkeypatch.setattr(rto.rollouts.http, "MAX_WAIT", 0.1)
    server.replies = [reply("", 429, Retry_After="86400"), reply("", 429, Retry_After="soon"), lengths]
    begun = time.monotonic()
    score(scorer(server, batch=3))
    assert time.monotonic() - begun < 5


# --- what stays: missing, never 0 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (reply("", 500), "status 500", 3),
        (drop, "closed connection", 3),
        (break_off, "IncompleteRead", 3),
        (reply("sorry"), "not JSON: 'sorry'", 1),
        (reply(b"\xff\xfe"), "not JSON", 1),
        (reply("[" * 100_000), "not JSON", 1),
        (reply("[1, 2]"), 'has no "rewards"', 1),
        (reply('{"scores": [1, 2]}'), 'has no "rewards"', 1),
        (reply('{"rewards": [1]}'), "gave 1 rewards for 2 answers", 1),
        (reply('{"rewards": "good"}'), "gave a str", 1),
        (reply('{"rewards": [1, NaN]}'), "row 1: nan is no finite", 1),
        (reply('{"rewards": [1, 1e999]}'), "row 1: inf is no finite", 1),
        (reply('{"rewards": [[1, 2], 1]}'), "row 0: 2 token rewards for an answer of 3 tokens", 1),
        (reply('{"rewards": [1, "2"]}'), "row 1: '2' is a str", 1),
    ],
)
def test_a_batch_that_fails_is_missing(server, fault, reason, requests):
    server.replies = [fault] * requests + [lengths]
    asking = scorer(server)
    assert score(asking) == [[None, None, None], [None, None, 0], [0, 2, 0]]
    assert len(server.asked) == requests + 1
    assert asking.failures == 1
    assert reason in asking.last_failure and server.url in asking.last_failure


@pytest.mark.parametrize("slow", [hang, drip])
def test_a_server_that_does_not_finish(server, slow):
    server.replies = [slow, slow, lengths]
    asking = scorer(server, timeout=0.3, retries=1)
    begun = time.monotonic()
    assert score(asking) == [[None, None, None], [None, None, 0], [0, 2, 0]]
    assert time.monotonic() - begun < 5
    assert "no reply within 0.3 s" in asking.last_failure


def test_a_reply_without_end(server, monkeypatch):
    monkeypatch.setattr(rto.rollouts.http, "MAX_BYTES", 2**20)
    server.replies = [reply(b" " * (2**20 + 1)), lengths]
    asking = scorer(server)
    assert score(asking)[0] == [None, None, None]
    assert "longer than 1 MiB" in asking.last_failure


def test_nobody_there(server):
    server.shutdown()
    server.server_close()
    asking = scorer(server, retries=1)
    assert score(asking) == [[None, None, None], [None, None, 0], [None, None, 0]]
    assert asking.failures == 2 and "refused" in asking.last_failure


# --- what ends the run --------------------------------------------------------------------------------


def test_a_refusal_is_an_error(server):
    server.replies = [reply("no such model " + "x" * 300, 404)]
    with pytest.raises(ValueError, match="/score refuses the request with status 404: no such model x") as caught:
        score(scorer(server))
    assert str(caught.value).endswith("x" * 186) and "x" * 187 not in str(caught.value)
    assert len(server.asked) == 1


def test_redirects_are_not_followed(server, monkeypatch):
    """The token would go with them."""
    monkeypatch.setenv("RTO_SCORER_TOKEN", "secret")
    server.replies = [reply("", 302, Location="http://127.0.0.1:1/elsewhere")]
    with pytest.raises(ValueError, match="answers 302: it has moved to http://127.0.0.1:1/elsewhere; give that url"):
        score(scorer(server))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "file:///etc/passwd", "ftp://host/x", "http://", "//host/score", "http://host:80O0/x"],
)
def test_other_schemes_are_refused(url):
    with pytest.raises(ValueError, match="is not an http:// or https:// address"):
        HttpScorer(url)


def test_secrets_stay_out_of_messages(server, monkeypatch):
    with pytest.raises(ValueError, match=r"has a user in it: give a token in \$RTO_SCORER_TOKEN") as caught:
        HttpScorer("https://me:secret@host/score")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("RTO_SCORER_TOKEN", "sec\nret")
    with pytest.raises(ValueError, match="has characters") as caught:
        HttpScorer(server.url)
    assert "sec" not in str(caught.value).replace("SCORER", "")
    monkeypatch.delenv("RTO_SCORER_TOKEN")
    server.replies = [reply("", 500)]
    asking = HttpScorer(f"{server.url}?key=secret", retries=0)
    asking.score(PROMPTS, ANSWERS, TOKENS)
    assert "secret" not in asking.last_failure


@pytest.mark.parametrize(("code", "before"), [(200, 92), (404, 190)])
def test_a_token_that_comes_back_across_the_cut_stays_out_too(server, monkeypatch, code, before):
    """Of what is no JSON 100 characters are told, of a refusal 200."""
    monkeypatch.setenv("RTO_SCORER_TOKEN", "sesame-open-sesame")
    server.replies = [reply("x" * before + "sesame-open-sesame", code)]
    asking = scorer(server, batch=5)
    if code == 200:
        score(asking)
        told = str(asking.last_failure)
    else:
        with pytest.raises(ValueError) as caught:
            score(asking)
        told = str(caught.value)
    assert "x" * before + "***" in told and "sesame" not in told


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}, {"batch": 0}])
def test_settings_that_make_no_sense(options):
    with pytest.raises(ValueError, match="only retries may be 0"):
        HttpScorer("http://localhost/", **options)
