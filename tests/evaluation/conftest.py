"""A judge on the loopback: a real HTTP server that speaks chat completions, and does wrong when it is told to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Messages = list[dict[str, str]]


def longer_wins(messages: Messages) -> str:
    """The form of the helpful template; equal lengths tie."""
    asked = messages[-1]["content"]
    a, rest = asked.split("Response A:\n")[1].split("\n\nResponse B:\n")
    b = rest.split("\n\nFirst compare")[0]
    verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return f"Comparison: one is longer.\nMore helpful: {verdict}"


class JudgeServer(ThreadingHTTPServer):
    """``plan(n, game)`` names the fault of a request: n requests for that game came before; None: answer.

    Faults: "hang", "cut" (the connection breaks in the middle of the body), "half" (half a JSON, complete as HTTP),
    "garbage" (a reply without a verdict), and status codes, with ``retry_after`` where set.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.reply: Callable[[Messages], str] = longer_wins
        self.plan: Callable[[int, str], str | int | None] = lambda n, game: None
        self.retry_after: str | None = None
        self.refusal = '{"error": {"message": "not now"}}'
        self.top: list[dict[str, Any]] | None = None
        self.model = "stub-7b"  # as replies name it
        self.delay = 0.0
        self.asked: list[dict[str, Any]] = []
        self.authorization: list[str] = []
        self.games: Counter[str] = Counter()  # requests a game, by the hash of its messages
        self.served: Counter[str] = Counter()  # of these, whole replies
        self.running = self.most = 0  # requests at a time
        self.lock = threading.Lock()
        self.released = threading.Event()  # what hangs waits for it


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        mine = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        game = game_of(body["messages"])
        with mine.lock:
            before = mine.games[game]
            mine.games[game] += 1
            mine.asked.append(body)
            mine.authorization.append(self.headers["Authorization"])
            mine.running += 1
            mine.most = max(mine.most, mine.running)
        mine.released.wait(mine.delay)
        try:
            self._answer(body, game, mine.plan(before, game))
        finally:
            with mine.lock:
                mine.running -= 1

    def _answer(self, body: dict[str, Any], game: str, fault: str | int | None) -> None:
        mine = self.server
        if fault == "hang":
            mine.released.wait(30)
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send(fault, mine.refusal.encode())
            return
        text = "I would rather not say." if fault == "garbage" else mine.reply(body["messages"])
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice |= {"finish_reason": "stop", "logprobs": None}
        if mine.top is not None:
            choice["logprobs"] = {"content": [{"token": "m", "logprob": -0.1, "top_logprobs": mine.top}]}
        whole = json.dumps({"id": "1", "object": "chat.completion", "model": mine.model, "choices": [choice]}).encode()
        if fault == "half":
            whole = whole[: len(whole) // 2]
        self._send(200, whole, cut=fault == "cut")
        if fault is None or fault == "garbage":
            with mine.lock:
                mine.served[game] += 1

    def _send(self, status: int, body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200 and self.server.retry_after is not None:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def game_of(messages: Messages) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


class _Quiet(JudgeServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed breaks its connections."""


@pytest.fixture
def judge_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("rto.evaluation.caller.BACKOFF", 0.01)
    server = _Quiet()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
