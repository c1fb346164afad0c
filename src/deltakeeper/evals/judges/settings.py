"""Strict reading of judges' settings from YAML or JSON: unknown keys are refused with the key that was meant."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from deltakeeper.errors import DataError, first_line

MAX_BYTES = 1 << 20


class Settings(BaseModel):
    """A frozen record that knows no other keys than its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


S = TypeVar("S", bound=Settings)


def read_bytes(path: Path, what: str) -> bytes:
    """The bytes of a small file; raises DataError if it is absent or larger than such a file is."""
    if not path.is_file():
        raise DataError(f"there is no {what} at {path}; check the path.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES} bytes, which no {what} is; check the path.")
    return path.read_bytes()


def parse_mapping(raw: bytes, where: str) -> dict[str, Any]:
    """A mapping from untrusted YAML (of which JSON is a part); raises DataError if it is anything else."""
    try:
        value = yaml.safe_load(raw.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"{where} cannot be read as YAML or JSON ({first_line(error)}); correct it.") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise DataError(f"{where} is not a mapping of names to values; write it as 'name: value' lines.")
    return value


def check(settings: type[S], value: dict[str, Any], where: str) -> S:
    """Validate a mapping; raises DataError that names the key at fault and never repeats its value."""
    try:
        return settings.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"]) or "it"
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, settings.model_fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(settings.model_fields)}."
            raise DataError(f"{where} has an unknown key '{key}'; {hint}") from None
        text = fault["msg"].removeprefix("Value error, ").rstrip(".")
        raise DataError(f"{where}: '{key}' cannot be used ({text[:1].lower() + text[1:]}); correct it.") from None


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
