"""``rto serve-scorer``: a scorer of a run behind HTTP, for the ``http`` term of other runs."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import threading
from pathlib import Path
from types import FrameType

HELP = "serve a scorer of a run over HTTP, on this machine and behind a token"
TOKEN = "RTO_SCORER_TOKEN"
SHORTEST = 16  # characters of a token


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--stage", default="reward", help="reward, or reward/NAME of [scorers]; default: reward")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="default: a free one, which is printed")
    parser.add_argument("--max-bytes", type=int, default=8 * 2**20, help="of one request; default: 8388608")
    parser.add_argument("--allow-remote", action="store_true", help="let --host be reached from other machines")
    parser.epilog = f"The token comes from ${TOKEN}; without it a random one is made and printed once."


def run(known: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    if not 0 <= known.port < 2**16:
        raise ValueError(f"--port {known.port}: a number from 0 (any free one) to 65535")
    if known.max_bytes < 1:
        raise ValueError(f"--max-bytes {known.max_bytes}: at least 1")
    folder = Path(known.run)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json there: not a run folder")
    token, given = read_token()

    from rto import recipe
    from rto.pipeline.server import RunScorer
    from rto.rollouts.server import ScorerServer, say

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = recipe.build(stored | {"output": str(folder), "trackers": []}, known.run)
    scorer = RunScorer(config, known.stage)
    server = ScorerServer(
        scorer, token, known.host, known.port, max_bytes=known.max_bytes, allow_remote=known.allow_remote
    )

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=server.shutdown).start()  # it waits for the loop, which is this thread's

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with server:
            if not given:
                say(f"{TOKEN}={token} (made up for this server; it is shown only now)")
            say(f"{known.stage} of {folder} at {server.url}; Ctrl-C ends it")
            print(server.url, flush=True)
            server.serve_forever(poll_interval=0.1)
        server.drain()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    say("ended")
    return 0


def read_token() -> tuple[str, bool]:
    """The token of the environment and True, or a random one and False.

    Raises:
        ValueError: it is too short, or no HTTP header can carry it. Its own text is not told.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        return secrets.token_urlsafe(32), False
    if len(token) < SHORTEST or not (token.isascii() and token.isprintable()):
        raise ValueError(
            f"${TOKEN} must be {SHORTEST} or more printable ASCII characters, for example from `openssl rand -hex 32`; "
            "unset it for a random one"
        )
    return token, True
