"""What all bodies are made of: fields that stop at their first fault, or a bad body would cost more than a good one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

MOST_TEXTS = 1024
MOST_TOKENS = 1 << 20
MOST_PAIRS = 64

Text = Annotated[str, Field(max_length=1 << 23)]
"""With a length, since measuring it is what refuses halves of characters, which no tokenizer takes."""
Texts = Annotated[list[Text], Field(fail_fast=True, max_length=MOST_TEXTS)]
Tokens = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]], Field(fail_fast=True, max_length=MOST_TOKENS)
]
Prompts = Annotated[list[Tokens], Field(fail_fast=True, max_length=MOST_TEXTS)]
Nothing = Annotated[list[Any], Field(max_length=0)]
"""A list that must be empty, since what would stand in it is not served."""


def _few(value: Any) -> Any:
    if isinstance(value, Mapping) and len(value) > MOST_PAIRS:
        raise ValueError(f"{len(value)} pairs are too many; give at most {MOST_PAIRS}.")
    return value


Pairs = Annotated[dict[str, str], BeforeValidator(_few), Field(json_schema_extra={"maxProperties": MOST_PAIRS})]
"""Few enough that a fault in each is soon told: a dictionary does not stop at the first one."""


class Body(BaseModel):
    """An object in a body: nothing in it is ignored in silence, and null is as good as left out."""

    model_config = ConfigDict(extra="forbid", strict=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _narrowed(cls, value: Any) -> Any:
        """Without nulls, and with the first stranger alone: of a million unknown keys pydantic would report each."""
        if not isinstance(value, dict):
            return value
        known = {name: value[name] for name in cls.model_fields if value.get(name) is not None}
        strangers = (name for name, one in value.items() if one is not None and name not in cls.model_fields)
        return known | {name: value[name] for name in (next(strangers, None),) if name is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The document allows null where it is taken: wherever a field, known or not, may be left out."""
        shown = handler(schema)
        found = handler.resolve_ref_schema(shown)
        for name, field in found.get("properties", {}).items():
            if name not in found.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                found["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        found["additionalProperties"] = {"type": "null"}
        return shown
