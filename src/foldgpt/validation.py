"""What pydantic found wrong, in words a user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from foldgpt.errors import did_you_mean

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

#: What pydantic calls a value that should have been a JSON list.
_NOT_A_LIST = ("tuple_type", "list_type", "set_type")


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """A pydantic error as one readable line: place, problem, given value, nearest choice.

    Args:
        error: what validation raised.
        model: what was validated; with it an unknown key is answered by the nearest known one.
    """
    return "; ".join(_line(item, model) for item in error.errors())


def _line(item: ErrorDetails, model: type[BaseModel] | None) -> str:
    place = ".".join(str(part) for part in item["loc"])
    message = _message(item, model)
    if item["type"] == "value_error" and f"{place}." in message:
        return message  # it names its place itself
    return f"{place}: {message}" if place else message


def _message(item: ErrorDetails, model: type[BaseModel] | None) -> str:
    kind, given = item["type"], item["input"]
    if kind == "extra_forbidden":
        known = None if model is None else _section_at(model, item["loc"][:-1])
        near = "" if known is None else did_you_mean(str(item["loc"][-1]), known.model_fields)
        return f"unknown key.{near}" if near else "unknown key"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, (dict, list)) else f" (got {given!r})"
    if kind in _NOT_A_LIST:
        return f"must be a list{shown}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must hold keys and values{shown}"
    near = ""
    if kind == "literal_error" and isinstance(given, str):
        near = did_you_mean(given, _choices(item))
        near = near if near.startswith(" Did") else ""
    return f"{item['msg']}{shown}{'.' if near else ''}{near}"


def _choices(item: ErrorDetails) -> list[str]:
    """The strings that would have been valid, as the message lists them in quotes."""
    return str(item.get("ctx", {}).get("expected", "")).split("'")[1::2]


def _section_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel] | None:
    """The section of a model in which a place lies; None where there is no single one."""
    for part in place:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inside = None if field is None else _model_in(field.annotation)
        if inside is None:
            return None
        model = inside
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The one kind of section that a field holds: itself, in a list of them, or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [model for model in map(_model_in, get_args(annotation)) if model is not None]
    return found[0] if len(found) == 1 else None
