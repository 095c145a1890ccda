"""The options of every verb that asks a judge over an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when the verb runs: `rto --help` must be quick
    from rto.evaluation.endpoint import Endpoint


def add_judge(parser: Any, *, required: bool = False, max_tokens: int | None) -> None:
    """``max_tokens``: the default length of a reply; None where a benchmark fixes length and temperature."""
    parser.add_argument("--model", required=required, help="the judge, as the endpoint calls it")
    parser.add_argument("--base-url", help="default: $OPENAI_BASE_URL, else OpenAI")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="variable with the key; default: OPENAI_API_KEY")
    parser.add_argument("--concurrency", type=int, default=8, help="questions at a time; default: 8")
    parser.add_argument("--per-minute", type=int, help="at most so many requests a minute; default: no limit")
    parser.add_argument("--retries", type=int, default=6, help="further tries of a question; default: 6")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds without a byte that end a try; default: 60"
    )
    parser.add_argument("--no-seed", action="store_true", help="send no seed to the judge: some servers refuse it")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    if max_tokens is not None:
        parser.add_argument("--temperature", type=float, default=0.0, help="of the judge; default: 0")
        parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"of a reply; default: {max_tokens}")


def endpoint_of(known: argparse.Namespace, seed: int = 0, **fixed: Any) -> Endpoint:
    """The endpoint that these options name. ``fixed``: what the benchmark says and not the command line."""
    from rto.evaluation.endpoint import Endpoint

    sampling = fixed or {"temperature": known.temperature, "max_tokens": known.max_tokens}
    return Endpoint(
        known.model,
        known.base_url,
        known.key_env,
        timeout=known.timeout,
        retries=known.retries,
        concurrency=known.concurrency,
        per_minute=known.per_minute,
        seed=None if known.no_seed else seed,
        **sampling,
    )
