"""Rewards from a server: POST {"prompts", "answers", "tokens"} as JSON, {"rewards": [...]} comes back."""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rto.rollouts.functions import token_rewards

MAX_BYTES = 64 * 2**20  # of one reply
MAX_WAIT = 60.0  # seconds between two tries, whatever the server asks for


class Unavailable(Exception):
    """This batch has no rewards. ``wait``: how long the server asks to wait (seconds), None: trying again is vain."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class HttpScorer:
    """A reward server at ``url``, asked ``batch`` answers at a time.

    ``timeout`` is in seconds, for one try of one batch. Connection errors, timeouts, 408, 429 and 5xx are tried
    ``retries`` times more, after pauses that start at ``backoff`` seconds and double. What still fails, and a reply
    that is no proper list of rewards, leaves the batch's rewards missing (NaN), never 0: ``failures`` counts such
    batches, ``last_failure`` is the latest reason. The environment variable ``token_env``, where set, is sent as
    bearer token.

    Raises:
        ValueError: ``url`` is not an http or https address, or the token is unusable; when scoring, the server refuses
            the request (3xx, 4xx): trying again or going on would not help.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 30.0,
        retries: int = 3,
        batch: int = 32,
        *,
        backoff: float = 0.5,
        token_env: str = "RTO_SCORER_TOKEN",
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            _ = parts.port  # read only now, and no number raises
        except ValueError as error:
            raise ValueError(f"url = {url!r} is not an http:// or https:// address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url = {url!r} is not an http:// or https:// address")
        if "@" in parts.netloc:
            raise ValueError(f"the url of {parts.hostname} has a user in it: give a token in ${token_env} instead")
        if timeout <= 0 or retries < 0 or batch < 1:
            raise ValueError(f"timeout = {timeout}, retries = {retries}, batch = {batch}: only retries may be 0")
        self.url = url
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path}"  # for messages: a query may hold a key
        self.timeout, self.retries, self.batch, self.backoff = timeout, retries, batch, backoff
        self.failures = 0
        self.last_failure: str | None = None
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._token = token = os.environ.get(token_env, "").strip()
        if token:
            if not (token.isascii() and token.isprintable()):
                raise ValueError(f"${token_env} has characters that no HTTP header can carry")
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def score(self, prompts: list[str], answers: list[str], tokens: list[list[str]]) -> Float[Tensor, "B T"]:
        """Token rewards as :func:`~rto.rollouts.functions.token_rewards` has them; T is the longest answer."""
        assert len(prompts) == len(answers) == len(tokens)
        out = torch.zeros(len(tokens), max(map(len, tokens), default=0))
        for start in range(0, len(tokens), self.batch):
            rows = slice(start, start + self.batch)
            lengths = [len(row) for row in tokens[rows]]
            body = json.dumps({"prompts": prompts[rows], "answers": answers[rows], "tokens": tokens[rows]})
            try:
                rewards = self._ask(body.encode(), lengths)
            except Unavailable as failure:
                self.failures += 1
                self.last_failure = f"{self.name}: {failure}"
                rewards = token_rewards([None] * len(lengths), lengths, self.name)
            out[rows, : rewards.shape[1]] = rewards
        return out

    def _ask(self, body: bytes, lengths: list[int]) -> Float[Tensor, "b t"]:
        for attempt in range(self.retries + 1):
            try:
                return self._rewards(self._post(body), lengths)
            except Unavailable as failure:
                if failure.wait is None or attempt == self.retries:
                    raise
                # The pause is no part of the result, so it need not be repeatable; processes should differ.
                pause = self.backoff * 2**attempt * random.SystemRandom().uniform(0.5, 1.5)
                time.sleep(min(max(pause, failure.wait), MAX_WAIT))
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes) -> bytes:
        """One try. Raises Unavailable, or ValueError for a refusal."""
        request = urllib.request.Request(self.url, body, self._headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                return _read(reply, deadline)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (408, 429) or error.code >= 500:
                    raise Unavailable(f"status {error.code}", asked_wait(error.headers)) from error
                raise ValueError(self._refusal(error)) from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            text = f"no reply within {self.timeout:g} s" if isinstance(reason, TimeoutError) else str(reason)
            raise Unavailable(text or type(reason).__name__, 0.0) from error

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if error.code < 400:
            there = self._clean(str(error.headers.get("Location")))
            return f"{self.name} answers {error.code}: it has moved to {there}; give that url"
        try:
            said = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = "(its reason could not be read)"
        return f"{self.name} refuses the request with status {error.code}: {self._clean(said)[:200]}"

    def _clean(self, said: str) -> str:
        """Without the token, which a server may repeat. To be cut afterwards: half a token would be found no more."""
        return said.replace(self._token, "***") if self._token else said

    def _rewards(self, reply: bytes, lengths: list[int]) -> Float[Tensor, "b t"]:
        """Raises Unavailable for a reply that is not what was asked for; the server would say the same again."""
        try:
            found = json.loads(reply)
        except (ValueError, RecursionError) as error:
            said = self._clean(reply.decode("utf-8", "replace"))
            raise Unavailable(f"the reply is not JSON: {said[:100]!r}") from error
        if not isinstance(found, dict) or "rewards" not in found:
            raise Unavailable('the reply has no "rewards"')
        try:
            return token_rewards(found["rewards"], lengths, "the reply")
        except ValueError as error:
            raise Unavailable(self._clean(str(error))) from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would follow to other hosts and schemes, the token in its hands, and turn the POST into a GET."""

    def redirect_request(self, *args: Any, **more: Any) -> None:
        return None


def _read(reply: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body. The socket's timeout holds for each piece, the deadline for all of them."""
    pieces, size = [], 0
    while piece := reply.read1(65536):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_BYTES:
            raise Unavailable(f"the reply is longer than {MAX_BYTES // 2**20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError
    if reply.length:  # read1 does not tell of a connection that broke off
        raise http.client.IncompleteRead(b"", reply.length)
    return b"".join(pieces)


def asked_wait(headers: Any) -> float:
    """Retry-After in seconds, as a number or a date; 0 where there is none."""
    text = headers.get("Retry-After") or "0"
    try:
        wait = float(text)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            wait = 0.0
    return wait if math.isfinite(wait) and wait > 0 else 0.0
