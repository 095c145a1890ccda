"""What every table of a recipe is made of."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Field, field_validator
from pydantic_core import PydanticCustomError

Spec = dict[str, Any]
# Types of options: a recipe is refused where a number is out of bounds.
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A table of the recipe: unknown keys fail, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_rewriting(cls, value: Any, info: Any) -> Any:
        """pydantic would take "5" and true for numbers, and "on" and 1 for true."""
        _refuse(cls.model_fields[str(info.field_name)].annotation, value)
        return value


def _refuse(annotation: Any, value: Any) -> None:
    """Raises for what pydantic would make a number or a truth of."""
    if get_origin(annotation) is tuple and isinstance(value, (list, tuple)):
        for part, one in zip(get_args(annotation), value, strict=False):  # how many there may be says pydantic
            _refuse(part, one)
        return
    kinds = _kinds(annotation)
    if kinds & {int, float}:
        if isinstance(value, (str, bool)) and type(value) not in kinds:
            raise PydanticCustomError("number", "this is no number")
    elif bool in kinds and type(value) not in kinds:
        raise PydanticCustomError("bool", "this is neither true nor false")


def _kinds(annotation: Any) -> set[Any]:
    """The types that a field may have: the parts of its union, and the types of literals."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation}


def tagged(default: str) -> Discriminator:
    """Tells the tables of a union apart by their ``type``; without one it is ``default``."""

    def read(value: Any) -> str:
        return str(value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default))

    return Discriminator(read)
