"""What is wrong with a file, as one sentence to a person, with the name that was probably meant."""

from __future__ import annotations

import dataclasses
import types
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError

from deltakeeper.suggestion import spelled_out, suggest

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def sentence(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """One mistake of a validation, unknown names first: where it is, what is wrong, what was probably meant."""
    first = min(error.errors(include_url=False), key=lambda mistake: mistake["type"] not in UNKNOWN)
    place = [spelled_out(part) for part in first["loc"]]
    if first["type"] in UNKNOWN:
        known = _names(model, place[:-1])
        within = f" in {'.'.join(_without_tags(model, place[:-1]))}" if place[:-1] else ""
        return f"{where} has an unknown setting '{place[-1]}'{within}; {suggest(place[-1], known)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        told = first["ctx"]
        tags = str(told["expected_tags"]).replace("'", "").split(", ")
        message = f"there is no kind '{spelled_out(told['tag'])}', {suggest(str(told['tag']), tags)[:-1]}"
    if first["type"] == "union_tag_not_found":
        message = "it has no 'kind', which says what attack it is"
    path = ".".join(_without_tags(model, place))
    return f"{where} is not valid{f' at {path}' if path else ''}: {message[:1].lower()}{message[1:]}."


def _without_tags(model: type[Any], place: list[str]) -> list[str]:
    """A place without the tags that pydantic puts in for members of a union."""
    kept, level = [], [model]
    for part in place:
        if any(part in _fields(kind) for kind in level) or part.isdigit():
            kept.append(part)
            level = [inner for kind in level for inner in _kinds(_fields(kind).get(part))] or level
    return kept or place


def _names(model: type[Any], place: list[str]) -> set[str]:
    """Names of the settings at a place."""
    level: list[type[Any]] = [model]
    for part in place:
        inner = [kind for parent in level for kind in _kinds(_fields(parent).get(part))]
        tagged = [kind for kind in level if part == getattr(kind, "kind", None)]
        level = inner or tagged or level
    return {name for kind in level for name in _fields(kind)}


def _fields(kind: type[Any]) -> dict[str, Any]:
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return {}


def _kinds(annotation: Any) -> list[type[Any]]:
    """Classes with fields that an annotation allows."""
    if annotation is None:
        return []
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [kind for inner in get_args(annotation) for kind in _kinds(inner)]
    return [annotation] if _fields(annotation) else []
