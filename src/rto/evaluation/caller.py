"""One question to an OpenAI-compatible endpoint: paced, tried again where that can help, its reply taken apart."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rto.rollouts.http import MAX_WAIT, asked_wait

if TYPE_CHECKING:
    from rto.evaluation.endpoint import Endpoint

BACKOFF = 0.5  # seconds before the second try; doubled for each further one
AGAIN = (408, 409, 425, 429)  # and 5xx: another try can help
REFUSED = (401, 402, 403, 404, 405)  # the next question would fare no better
NO_KEY = "none"  # what servers without keys get
SHORTEST_KEY = 8  # a shorter one is no secret, and would be found in ordinary text


class Failure(Exception):
    """A try that gave no reply. ``wait``: how long the server asks to wait (seconds); None: trying again is vain."""

    def __init__(self, reason: str, wait: float | None = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Caller:
    """Asks; may be used from many threads. Once ``stopped`` is set nothing is asked or tried again.

    Raises:
        ValueError: openai is not installed; OpenAI itself is asked and there is no key.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import openai
        except ImportError as error:
            raise ValueError("a judge needs the openai package: pip install 'rto-rlhf[judge]'") from error
        key = os.environ.get(endpoint.key_env, "").strip()
        if not key and (urlsplit(endpoint.url).hostname or "").endswith("openai.com"):
            raise ValueError(f"no key for {endpoint.url}: set the environment variable {endpoint.key_env}")
        if not (key.isascii() and (key.isprintable() or not key)):
            raise ValueError(f"${endpoint.key_env} has characters that no HTTP header can carry")
        self.endpoint = endpoint
        self.stopped = threading.Event()
        self._openai = openai
        self._key = key
        # Trying again is done here: the client's own tries know neither our pace nor half replies.
        self._client = openai.OpenAI(api_key=key or NO_KEY, base_url=endpoint.url, max_retries=0)
        self._pace = _Pace(endpoint.per_minute)
        self._limit_name = "max_tokens"
        self._silent = 0  # questions in a row that nothing answered

    def ask(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """reply, top, finish, served and error. Raises ValueError when the endpoint refuses."""
        # A server that has gone is not waited for a thousand times: what is left gets one try each.
        tries = 1 if self._silent >= max(8, self.endpoint.concurrency) else 1 + self.endpoint.retries
        failure = Failure("not asked")
        for attempt in range(tries):
            if attempt:
                # The pause is no part of the result, so it need not be repeatable; threads should differ.
                pause = BACKOFF * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
                self.stopped.wait(min(max(pause, failure.wait or 0.0), MAX_WAIT))
            self._pace.wait(self.stopped)
            if self.stopped.is_set():
                break
            try:
                fields = self._once(messages)
            except Failure as said:
                failure = said
                if failure.wait is None:
                    break
                self._pace.hold(min(failure.wait, MAX_WAIT))
            else:
                self._silent = 0
                return fields | {"error": None}
        self._silent = self._silent + 1 if failure.wait is not None else 0
        nothing = {"reply": None, "top": None, "finish": None, "served": None}
        return nothing | {"error": self._clean(str(failure))}

    def close(self) -> None:
        self._client.close()

    def _once(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """One try. Raises Failure, or ValueError for a refusal."""
        endpoint, openai = self.endpoint, self._openai
        clean: list[Any] = [{name: _utf8(text) for name, text in message.items()} for message in messages]
        more: dict[str, Any] = {self._limit_name: endpoint.max_tokens}
        if endpoint.seed is not None:
            more["seed"] = endpoint.seed
        if endpoint.top_logprobs:
            more |= {"logprobs": True, "top_logprobs": endpoint.top_logprobs}
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=endpoint.model,
                messages=clean,
                temperature=endpoint.temperature,
                timeout=endpoint.timeout,
                **more,
            )
            body = raw.content
        except openai.APITimeoutError as error:
            raise Failure(f"no reply within {endpoint.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise Failure(f"no connection, or it broke off: {error.__cause__ or error}") from error
        except openai.APIStatusError as error:
            raise self._refusal(error.status_code, error.response.headers, error.response.text, more) from error
        return _fields(body, self._clean)

    def _refusal(self, status: int, headers: Any, text: str, sent: dict[str, Any]) -> Exception:
        said = " ".join(self._clean(text).split())[:300]  # half a key, cut first, would be found no more
        if status in AGAIN or status >= 500:
            return Failure(f"status {status}: {said}", asked_wait(headers))
        if status in REFUSED:
            key = f"${self.endpoint.key_env} is {'set' if self._key else 'not set'}"
            return ValueError(
                f"{self.endpoint.url} refuses with status {status}: {said} (model {self.endpoint.model!r}, {key})"
            )
        if "max_completion_tokens" in text and "max_tokens" in sent:
            self._limit_name = "max_completion_tokens"  # newer models of OpenAI know it by this name only
            return Failure(f"status {status}: {said}")
        return Failure(f"status {status}: {said}", None)

    def _clean(self, text: str) -> str:
        """Servers have been seen to send the key back."""
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_KEY else text


class _Pace:
    """Requests evenly in time, ``per_minute`` of them; and none while the server asks for a pause."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stopped: threading.Event) -> None:
        with self._lock:
            now = time.monotonic()
            mine = max(self._next, now)
            self._next = mine + self._gap
        if mine > now:
            stopped.wait(mine - now)

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _fields(body: bytes, clean: Callable[[str], str]) -> dict[str, Any]:
    """The first choice of a chat completion, its texts ``clean``. Raises Failure for half a reply, and for what is
    none."""
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        content = choice["message"].get("content")
        told = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        top = {str(one["token"]): float(one["logprob"]) for one in reversed(told) if math.isfinite(one["logprob"])}
        served, finish = data.get("model"), choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        said = clean(body.decode("utf-8", "replace"))[:100]
        raise Failure(f"the reply is no chat completion: {said!r}") from error
    if content is not None and not isinstance(content, str):
        raise Failure(f"the reply is no text: {clean(str(content))[:100]!r}")
    texts = {"reply": content or "", "top": top or None, "finish": finish, "served": served}
    return {name: clean(value) if isinstance(value, str) else value for name, value in texts.items()}


def _utf8(text: str) -> str:
    """Lone surrogates have no UTF-8 form: they become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
