"""Strict reading of JSON objects: every field is asked for by name and type, and nothing unknown is let through."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn, TypeGuard

from deltakeeper.errors import RunError


class Fields:
    """One JSON object being read; `where` names it in error sentences, for instance `cell.probes.goal`.

    Use as a context manager: leaving it without an error refuses the fields that nobody asked for.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise RunError(f"{where} is {_kind(value)} where an object is expected; write it again with this version.")
        self._value = value
        self._where = where
        self._asked: set[str] = set()

    def __enter__(self) -> Fields:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None and (unknown := sorted(set(map(str, self._value)) - self._asked)):
            raise RunError(
                f"{self._where} has the unknown field {unknown[0]!r}; write it again with this version of deltakeeper."
            )

    def raw(self, name: str) -> Any:
        """The value of a field that must be there, of any type."""
        self._asked.add(name)
        if name not in self._value:
            raise RunError(f"{self._where} lacks the field {name!r}; write it again with this version of deltakeeper.")
        return self._value[name]

    def text(self, name: str) -> str:
        """A string."""
        value = self.raw(name)
        return value if isinstance(value, str) else self._refuse(name, value, "a string")

    def optional_text(self, name: str) -> str | None:
        """A string or null."""
        return None if self.raw(name) is None else self.text(name)

    def choice(self, name: str, allowed: Collection[str]) -> str:
        """A string out of `allowed`."""
        value = self.raw(name)
        if isinstance(value, str) and value in allowed:
            return value
        return self._refuse(name, value, "one of " + ", ".join(sorted(allowed)))

    def flag(self, name: str) -> bool:
        """A boolean."""
        value = self.raw(name)
        return value if isinstance(value, bool) else self._refuse(name, value, "true or false")

    def count(self, name: str) -> int:
        """A whole number, zero or more."""
        value = self.raw(name)
        return value if _is_count(value) else self._refuse(name, value, "a whole number from 0")

    def optional_count(self, name: str) -> int | None:
        """A whole number from zero, or null."""
        return None if self.raw(name) is None else self.count(name)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.raw(name)
        return float(value) if _is_number(value) else self._refuse(name, value, "a finite number")

    def optional_number(self, name: str) -> float | None:
        """A finite number or null."""
        return None if self.raw(name) is None else self.number(name)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self.raw(name)
        if isinstance(value, list) and all(map(_is_number, value)):
            return tuple(map(float, value))
        return self._refuse(name, value, "a list of finite numbers")

    def counts(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers from zero."""
        value = self.raw(name)
        if isinstance(value, list) and all(map(_is_count, value)):
            return tuple(value)
        return self._refuse(name, value, "a list of whole numbers from 0")

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self.raw(name)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        return self._refuse(name, value, "a list of strings")

    def scalars(self, name: str) -> dict[str, Any]:
        """An object whose values are strings, numbers, booleans, null, or flat lists of these."""
        value = self.raw(name)
        if isinstance(value, Mapping) and all(isinstance(k, str) and _is_plain(v) for k, v in value.items()):
            return dict(value)
        return self._refuse(name, value, "an object of plain values")

    def flags(self, name: str) -> dict[str, bool]:
        """An object whose values are booleans."""
        value = self.raw(name)
        if isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, bool) for k, v in value.items()):
            return dict(value)
        return self._refuse(name, value, "an object of true and false")

    def optional_mapping(self, name: str) -> dict[str, Any] | None:
        """An object of JSON values, nested as they may be, or null."""
        value = self.raw(name)
        if value is None or (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
            return None if value is None else dict(value)
        return self._refuse(name, value, "an object or null")

    def objects(self, name: str) -> Iterator[tuple[str, Fields]]:
        """The items of a list of objects, each as its place and its fields."""
        value = self.raw(name)
        if not isinstance(value, list):
            self._refuse(name, value, "a list of objects")
        for index, item in enumerate(value):
            place = f"{self._where}.{name}[{index}]"
            yield place, Fields(item, place)

    def named(self, name: str) -> Iterator[tuple[str, Fields]]:
        """The members of an object of objects, each as its key and its fields."""
        value = self.raw(name)
        if not isinstance(value, Mapping):
            self._refuse(name, value, "an object of objects")
        for key, item in value.items():
            yield str(key), Fields(item, f"{self._where}.{name}.{key}")

    def optional_object(self, name: str) -> Fields | None:
        """An object, or null."""
        value = self.raw(name)
        return None if value is None else Fields(value, f"{self._where}.{name}")

    def _refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        shown = repr(value) if isinstance(value, (str, int, float, bool)) else _kind(value)
        raise RunError(f"{self._where}: {name!r} is {shown[:60]} where {expected} is expected; write it again.")


def check_version(read: Fields, where: str, known: int) -> None:
    """Refuse a record of another version with RunError."""
    version = read.raw("version")
    if version != known or isinstance(version, bool):
        raise RunError(
            f"{where} has version {version!r} and this deltakeeper reads version {known}; "
            "use the matching release or run the study again."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) and not isinstance(item, (list, tuple)) for item in value)
    return value is None or isinstance(value, (str, bool)) or _is_number(value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {"dict": "an object", "list": "a list", "str": "a string"}.get(type(value).__name__, type(value).__name__)
