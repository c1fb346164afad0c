"""Strict reading of the fields of an artifact's JSON: it is untrusted, and every refusal names the field."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from deltakeeper.errors import ArtifactError

MAX_ELEMENTS = 1 << 40
MAX_DEPTH = 32
MAX_TEXT = 10_000


def parse_json(raw: bytes, where: str) -> Any:
    """Parse JSON strictly: UTF-8, no name twice in an object, no NaN, no half characters, no endless depth or length.

    Raises:
        ArtifactError: it is not such JSON.
    """
    try:
        value = json.loads(raw.decode(), object_pairs_hook=lambda pairs: _unique(pairs, where), parse_constant=_refuse)
        _check_tree(value)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not JSON, or not of this format; get the artifact again.") from error
    return value


def _check_tree(value: Any) -> None:
    """Refuse what an error sentence could not quote: nests deeper than `MAX_DEPTH`, long or half-character texts."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and (len(item) > MAX_TEXT or not item.isascii()):
                if len(item) > MAX_TEXT:
                    raise ValueError("a text is too long")
                item.encode()  # raises for half characters, which no name can hold
        if not below:
            return
        level = below
    raise ValueError("the nesting is too deep")


class FieldReader:
    """One JSON object being read, with the path to it for error sentences."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise ArtifactError(f"{where} is not an object; get the artifact again.")
        self.value, self.where = value, where

    def fail(self, name: str, wanted: str) -> ArtifactError:
        """An error that says what the field `name` must be."""
        return ArtifactError(f"{self.where}: '{name}' must be {wanted}; get the artifact again.")

    def text(self, name: str) -> str:
        """A text."""
        found = self.value.get(name)
        if not isinstance(found, str):
            raise self.fail(name, "a text")
        return found

    def optional_text(self, name: str) -> str | None:
        """A text, or None where the field is null or missing."""
        return None if self.value.get(name) is None else self.text(name)

    def texts(self, name: str) -> list[str]:
        """A list of texts, empty where the field is missing."""
        found = self.value.get(name, [])
        if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
            raise self.fail(name, "a list of texts")
        return found

    def flag(self, name: str) -> bool:
        """True or false; false where the field is missing."""
        found = self.value.get(name, False)
        if not isinstance(found, bool):
            raise self.fail(name, "true or false")
        return found

    def count(self, name: str) -> int:
        """A size; 0 where the field is missing."""
        found = self.value.get(name, 0)
        if not is_count(found):
            raise self.fail(name, "a whole number")
        return int(found)

    def choice(self, name: str, known: tuple[str, ...] | dict[str, Any]) -> str:
        """One of the known texts."""
        found = self.value.get(name)
        if not isinstance(found, str) or found not in known:
            raise self.fail(name, f"one of {', '.join(known)}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """A shape of at most 8 dimensions and `MAX_ELEMENTS` entries."""
        found = self.value.get(name)
        if not isinstance(found, list) or len(found) > 8 or not all(map(is_count, found)):
            raise self.fail(name, "a list of whole numbers")
        if math.prod(found) > MAX_ELEMENTS:
            raise self.fail(name, f"a shape of at most {MAX_ELEMENTS} entries")
        return tuple(found)

    def object(self, name: str) -> FieldReader:
        """The object in the field `name`."""
        return FieldReader(self.value.get(name), f"{self.where}: '{name}'")

    def objects(self, name: str) -> list[FieldReader]:
        """The list of objects in the field `name`."""
        found = self.value.get(name, [])
        if not isinstance(found, list):
            raise self.fail(name, "a list")
        return [FieldReader(item, f"{self.where}: '{name}[{i}]'") for i, item in enumerate(found)]

    def hash(self, name: str) -> str:
        """A SHA-256 in hex."""
        found = self.text(name)
        if not is_hash(found):
            raise self.fail(name, "a SHA-256 in hex")
        return found


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ArtifactError(f"{where} names {twice!r} twice in one object; get the artifact again.")
    return found


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number that a size may have; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ELEMENTS


def is_hash(value: str) -> bool:
    """Whether a text is a SHA-256 in lower-case hex."""
    return len(value) == 64 and all(c in "0123456789abcdef" for c in value)
