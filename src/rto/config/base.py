"""What every table of a recipe is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

Spec = dict[str, Any]
# Types of options: a recipe is refused where a number is out of bounds.
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A table of the recipe: unknown keys fail, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def tagged(default: str) -> Discriminator:
    """Tells the tables of a union apart by their ``type``; without one it is ``default``."""

    def read(value: Any) -> str:
        return str(value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default))

    return Discriminator(read)
