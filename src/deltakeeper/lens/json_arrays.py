"""Strict reading of arrays and texts out of JSON that nobody has checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deltakeeper.errors import DataError
from deltakeeper.lens.trace import Numbers, Whole

MOST_TEXT = 2000
MOST_NAMES = 256
MOST_WHOLE = 2**31 - 1
MOST_NUMBER = 1e38
"""A float32 holds it."""


class ArrayReader:
    """Reads values and refuses them by name; `where` is what the file is called in an error.

    A list is measured, and each of its items looked at, before an array is made of it.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    def refusal(self, why: str) -> DataError:
        """The error that says what is wrong."""
        return DataError(f"{self._where} is not a sound lens trace: {why}; trace it again.")

    def length(self, value: Any, name: str, most: int) -> int:
        """How long a list is: at least 1, at most `most`."""
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise self.refusal(f"'{name}' is not a list of 1 to {most}")
        return len(value)

    def whole(self, value: Any, name: str, shape: tuple[int, ...]) -> Whole:
        """Whole numbers from 0 to 2³¹ − 1, int32 of the given shape."""
        return np.array(self._nested(value, name, shape, self._as_whole), dtype=np.int32)

    def numbers(self, value: Any, name: str, shape: tuple[int, ...]) -> Numbers:
        """Finite numbers, float32 of the given shape, with NaN for null."""
        return np.array(self._nested(value, name, shape, self._as_number), dtype=np.float32)

    def named(self, value: Any, name: str) -> dict[str, Any]:
        """An object of at most 256 names."""
        if not isinstance(value, dict) or len(value) > MOST_NAMES:
            raise self.refusal(f"'{name}' is not an object of at most {MOST_NAMES} names")
        return {self.text(key, name): item for key, item in value.items()}

    def by_token(self, value: Any, name: str, most: int) -> dict[int, Any]:
        """An object of at most `most` names that are token ids, written without leading zeros."""
        if not isinstance(value, dict) or len(value) > most:
            raise self.refusal(f"'{name}' is not an object of at most {most} tokens")
        found = {}
        for key, item in value.items():
            if not (len(key) <= 10 and key.isascii() and key.isdigit() and str(int(key)) == key):
                raise self.refusal(f"'{name}' has a name that is no token id")
            found[self._as_whole(int(key), name)] = item
        return found

    def text(self, value: Any, name: str) -> str:
        """A text of at most 2000 characters, none of them half of a pair."""
        if not isinstance(value, str) or len(value) > MOST_TEXT or any("\ud800" <= c <= "\udfff" for c in value):
            raise self.refusal(f"'{name}' holds something else than a text of at most {MOST_TEXT} characters")
        return value

    def texts(self, value: Any, name: str, most: int) -> tuple[str, ...]:
        """A list of at most `most` texts."""
        if not isinstance(value, list) or len(value) > most:
            raise self.refusal(f"'{name}' is not a list of at most {most} texts")
        return tuple(self.text(item, name) for item in value)

    def _nested(self, value: Any, name: str, shape: tuple[int, ...], leaf: Callable[[Any, str], Any]) -> list[Any]:
        """Lists of lists in the given shape, each item looked at."""
        if not isinstance(value, list) or len(value) != shape[0]:
            raise self.refusal(f"'{name}' does not have the shape that its layers and positions ask for")
        if len(shape) == 1:
            return [leaf(item, name) for item in value]
        return [self._nested(item, name, shape[1:], leaf) for item in value]

    def _as_whole(self, value: Any, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_WHOLE:
            raise self.refusal(f"'{name}' holds something else than whole numbers from 0")
        return value

    def number(self, value: Any, name: str) -> float:
        """A finite number; null is refused."""
        if value is None:
            raise self.refusal(f"'{name}' is null")
        return self._as_number(value, name)

    def _as_number(self, value: Any, name: str) -> float:
        if value is None:
            return math.nan
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < MOST_NUMBER:
            raise self.refusal(f"'{name}' holds something else than finite numbers")
        return float(value)
