"""JSON that has one spelling: no key twice, no number that is none, sorted keys and no spaces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from deltakeeper.errors import AttestationError


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value; ASCII, keys sorted, no spaces.

    Raises:
        ValueError: the value holds something that JSON has no word for.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def parse_canonical(raw: bytes, where: str) -> Any:
    """Read JSON that must be spelled as `canonical` spells it.

    Raises:
        AttestationError: it is no JSON, has a key twice, or is spelled otherwise.
    """
    try:
        value = json.loads(raw.decode("ascii"), object_pairs_hook=_once, parse_constant=_refuse_constant)
        same = canonical(value) == raw
    except RecursionError as error:
        raise AttestationError(f"{where} is nested too deeply to be a statement; get it again.") from error
    except ValueError as error:
        raise AttestationError(f"{where} cannot be read as JSON ({error}); get it again.") from error
    if not same:
        raise AttestationError(f"{where} is not spelled in the one way that is signed; get it again.")
    return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
