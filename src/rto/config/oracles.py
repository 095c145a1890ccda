"""[evaluation.oracle]: who says which answer is better."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from rto.config.base import Section, tagged


class WorldOracle(Section):
    """The tiny world's own reward: exact."""

    type: Literal["world"]


class HeldoutOracle(Section):
    """A scorer trained with [reward]'s settings on pairs that no other stage saw (``data.oracle``)."""

    type: Literal["heldout"] = "heldout"


class ModelOracle(Section):
    """A ready sequence classifier with one label and the policy's tokenizer."""

    type: Literal["model"]
    name: str
    trust_remote_code: bool = False


class FunctionOracle(Section):
    """A Python function of yours, as in the reward term ``function``: an answer's score, or one a token (summed)."""

    type: Literal["function"]
    function: str


class HttpOracle(Section):
    """A server, as in the reward term ``http``."""

    type: Literal["http"]
    url: str
    timeout: float = Field(30.0, gt=0)
    retries: int = Field(3, ge=0)
    batch: int = Field(32, ge=1)


Oracle = Annotated[
    Annotated[WorldOracle, Tag("world")]
    | Annotated[HeldoutOracle, Tag("heldout")]
    | Annotated[ModelOracle, Tag("model")]
    | Annotated[FunctionOracle, Tag("function")]
    | Annotated[HttpOracle, Tag("http")],
    tagged("heldout"),
]
