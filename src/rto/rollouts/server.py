"""A scorer of a run behind HTTP: the server side of :mod:`rto.rollouts.http`, for one user and one secret.

Every request needs the bearer token, sizes and waiting are bounded, and a reply never tells a path or a traceback.
It speaks plain HTTP, one request a connection: what leaves the machine belongs behind a proxy with TLS.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ROWS = 1024  # answers of one request
CONNECTIONS = 32  # at a time; further ones are told to come again
LINGER = 2.0  # seconds in which the rest of a refused request is read, so that its sender sees the refusal
GRACE = 10.0  # seconds that requests at work have to end when the server is stopped

Score = Callable[[list[str], list[str], list[list[str]]], list[Any]]


class Refused(ValueError):
    """A request that is at fault. Its words go to the client, so they hold nothing of this machine."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class ScorerServer(ThreadingHTTPServer):
    """``score(prompts, answers, tokens)`` at ``address``, asked by one request at a time.

    ``timeout`` (seconds) holds for reading a whole request, and again for sending its reply.

    Raises:
        ValueError: the host is unknown, or not this machine's loopback without ``allow_remote``.
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(
        self,
        score: Score,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        max_bytes: int = 8 * 2**20,
        timeout: float = 30.0,
        allow_remote: bool = False,
    ) -> None:
        self.address_family, address = _address(host, port, allow_remote)
        self.score, self.max_bytes, self.patience = score, max_bytes, timeout
        self.lock = threading.Lock()  # round the model
        self._token = token.encode()
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, _Handler)
        self.url = f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask the DNS for a name that nobody reads
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def allows(self, authorization: str) -> bool:
        """Whether a header holds the token, in a time that does not depend on where it differs."""
        return hmac.compare_digest(authorization.encode("utf-8", "replace"), b"Bearer " + self._token)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            request.settimeout(0.1)  # this thread takes all connections
            try:
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
            finally:
                self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off concerns nobody; anything else has one line, without the request."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            say(f"a request failed: {type(error).__name__}: {error}")

    def drain(self) -> None:
        """Wait until the requests at work are answered, at most ``GRACE`` seconds."""
        deadline = time.monotonic() + GRACE
        for _ in range(CONNECTIONS):
            if not self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
                break


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: one request a connection."""

    server: ScorerServer
    server_version = "rto"
    sys_version = ""  # nobody needs to know which Python this is

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Timed(self.connection, self.server.patience))

    def do_GET(self) -> None:
        self._answer({"/health": lambda: {"status": "ok"}})

    def do_POST(self) -> None:
        self._answer({"/": self._score})

    def _answer(self, pages: dict[str, Callable[[], dict[str, Any]]]) -> None:
        try:
            if not self.server.allows(self.headers.get("Authorization", "")):
                raise Refused("the header Authorization: Bearer TOKEN is missing or wrong", 401)
            page = pages.get(urllib.parse.urlsplit(self.path).path)
            if page is None:
                raise Refused("there is POST / and GET /health", 404)
            body, status = _json(page()), 200
        except Refused as refusal:
            body, status = _json({"error": str(refusal)}), refusal.status
        except (TimeoutError, ConnectionError):
            self.close_connection = True
            return
        except Exception as error:  # whatever it is, the client learns no more than that, and the owner all
            say(f"a request failed: {type(error).__name__}: {error}")
            body, status = _json({"error": "the scorer failed; its own log says why"}), 500
        self._send(status, body)

    def _score(self) -> dict[str, Any]:
        prompts, answers, tokens = parse(self._body())
        with self.server.lock:
            rewards = self.server.score(prompts, answers, tokens)
        return {"rewards": rewards}

    def _body(self) -> bytes:
        given = self.headers.get_all("Content-Length") or []
        if self.headers.get("Transfer-Encoding") is not None or not given:
            raise Refused("the request needs a Content-Length, and its body in one piece", 411)
        if len(given) > 1 or not (given[0].isascii() and given[0].isdigit() and len(given[0]) < 20):
            raise Refused("the Content-Length is no number")
        size = int(given[0])
        if size > self.server.max_bytes:
            raise Refused(f"the request has {size} bytes; at most {self.server.max_bytes} are read: ask for less", 413)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError
        return body

    def _send(self, status: int, body: bytes) -> None:
        self.connection.settimeout(self.server.patience)
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if status != 200:
            self._linger()

    def _linger(self) -> None:
        """A socket that is closed with unread bytes takes the reply with it: read them, for a while."""
        self.connection.shutdown(socket.SHUT_WR)
        rest = _Timed(self.connection, LINGER)
        try:
            while rest.read(65536):
                pass
        except OSError:  # it went, or its time is up
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses (no HTTP, an unknown method), as JSON and in words of ours."""
        self.close_connection = True
        self.command = self.command or ""
        self._send(code, _json({"error": "not a request that this server knows"}))

    def log_message(self, format: str, *args: Any) -> None:
        """No line a request: addresses and headers are nobody's business."""


class _Timed(io.RawIOBase):
    """What a socket sends, all of it within ``seconds``: a client that drips bytes holds no thread for long."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._deadline = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


def parse(body: bytes) -> tuple[list[str], list[str], list[list[str]]]:
    """Prompts, answers and tokens of a request, each with an entry a row.

    Raises:
        Refused: it is something else.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the request is not JSON") from None
    prompts, answers, tokens = _parts(asked)
    if not (_texts(prompts) and _texts(answers) and isinstance(tokens, list) and all(_texts(row) for row in tokens)):
        raise Refused('the request must be {"prompts": [text, ...], "answers": [text, ...], "tokens": [[text, ...]]}')
    if not len(prompts) == len(answers) == len(tokens):
        raise Refused(f"{len(prompts)} prompts, {len(answers)} answers and {len(tokens)} rows of tokens")
    if len(prompts) > ROWS:
        raise Refused(f"{len(prompts)} answers; at most {ROWS} are read at once: ask for less", 413)
    if (empty := next((i for i, row in enumerate(tokens) if not row), None)) is not None:
        raise Refused(f"answer {empty} has no tokens")
    try:
        "".join([*prompts, *answers, *(token for row in tokens for token in row)]).encode()
    except UnicodeEncodeError:
        raise Refused("a text has half a character in it (a lone surrogate)") from None
    return prompts, answers, tokens


def _json(said: dict[str, Any]) -> bytes:
    """Raises ValueError for NaN and infinity, which JSON has not."""
    return json.dumps(said, allow_nan=False).encode()


def _parts(asked: Any) -> tuple[Any, Any, Any]:
    if not isinstance(asked, dict):
        return None, None, None
    return asked.get("prompts"), asked.get("answers"), asked.get("tokens")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _address(host: str, port: int, allow_remote: bool) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        family, *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} is no address of this machine: {error}") from None
    address = str(found[0])
    if not (allow_remote or ipaddress.ip_address(address.partition("%")[0]).is_loopback):
        raise ValueError(
            f"--host {host} can be reached from other machines: say --allow-remote if that is meant, and put a proxy "
            "with TLS in front, because the token and all texts travel in the clear"
        )
    return family, (address, port)


def say(text: str) -> None:
    print(f"rto serve-scorer: {text}", file=sys.stderr, flush=True)
