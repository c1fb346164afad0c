"""Sizes as people write them: `400MB`, `1.5 GiB`, `16x`."""

from __future__ import annotations

import re
from decimal import Decimal

from deltakeeper.errors import CodecError

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", re.ASCII)
_RATIO = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*[xX×]?", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as `400MB` (decimal), `1.5GiB` (binary) or `65536`; rounded down to whole bytes.

    Raises:
        CodecError: it is no size, its unit is unknown, or it is less than one byte.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise CodecError(f"'{text}' is not a size; write it as 400MB, 1.5GiB or a number of bytes.")
    number, unit = found.groups()
    if unit.lower() not in UNITS:
        raise CodecError(f"'{text}' has the unknown unit '{unit}'; use kB, MB, GB, KiB, MiB, GiB or bytes alone.")
    size = int(Decimal(number) * UNITS[unit.lower()])
    if size < 1:
        raise CodecError(f"'{text}' is less than one byte; give the size that the artifact may have.")
    return size


def parse_ratio(text: str, full_bytes: int) -> int:
    """Bytes of an artifact that is `text` times smaller than a fine-tune of `full_bytes`; `16` or `16x`.

    Raises:
        CodecError: it is no number of at least 1.
    """
    found = _RATIO.fullmatch(text.strip())
    if not found or Decimal(found.group(1)) < 1:
        raise CodecError(f"'{text}' is not a ratio; write how many times smaller to get, for example 16.")
    return int(full_bytes / Decimal(found.group(1)))
