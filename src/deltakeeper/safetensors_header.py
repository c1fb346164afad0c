"""The header of a safetensors file, read from untrusted bytes before any tensor is touched."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from deltakeeper.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20
MAX_DIMENSIONS = 8
MAX_NAME = 1000
_MAX_ENTRIES = 1 << 60
"""Entries of a tensor, dimensions of size zero counted as one: strides of more do not fit 64 bits."""
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a file: dtype, shape, and where its bytes lie, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """All tensors of a file by name, and its free metadata."""

    entries: dict[str, HeaderEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header does not describe its bytes exactly.
    """
    try:
        size = path.stat().st_size
        if size < 8 and not path.is_dir():  # before it is opened: to open a pipe is to wait
            raise CheckpointError(f"{path} is truncated or no safetensors file; get it again.")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is truncated or no safetensors file; get it again.")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    return parse_header(raw, size - 8 - length, 8 + length, str(path))


def parse_header(raw: bytes, data_bytes: int, offset: int, where: str) -> Header:
    """Check header bytes against the number of data bytes that follow them; `offset` is where the data starts."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=lambda pairs: _unique(pairs, where))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} has a header that is not JSON; get the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} has a header that is no JSON object; get the file again.")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where} has metadata that is not text; get the file again.")
    if not all(map(is_name, value)):
        raise CheckpointError(f"{where} has a tensor name that is no printable text; get the file again.")
    entries = {name: _entry(name, item, data_bytes, offset, where) for name, item in value.items()}
    end = offset
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end)):
        if entry.start != end:
            raise CheckpointError(f"{where}: tensor '{name}' overlaps another or leaves a gap; get the file again.")
        end = entry.end
    if end != offset + data_bytes:
        raise CheckpointError(f"{where} has {offset + data_bytes - end} bytes that no tensor owns; get it again.")
    return Header(entries, metadata)


def _entry(name: str, item: Any, data_bytes: int, offset: int, where: str) -> HeaderEntry:
    bad = CheckpointError(f"{where}: the header entry of tensor '{name}' is malformed; get the file again.")
    if not isinstance(item, dict):
        raise bad
    dtype = item.get("dtype")
    shape, offsets = item.get("shape"), item.get("data_offsets")
    if not isinstance(dtype, str) or len(dtype) > 16 or not _is_shape(shape):
        raise bad
    if not _is_counts(offsets) or len(offsets) != 2:
        raise bad
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: tensor '{name}' has the dtype {dtype!r}, which is not supported; "
            f"convert it to one of {', '.join(DTYPES)}."
        )
    start, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if not start <= end <= data_bytes or end - start != wanted:
        raise CheckpointError(
            f"{where}: tensor '{name}' needs {wanted} bytes but its place is {start} to {end} of {data_bytes}; "
            "the file is truncated or altered, get it again."
        )
    return HeaderEntry(DTYPES[dtype], tuple(shape), offset + start, offset + end)


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_ENTRIES for n in value
    )


def _is_shape(value: Any) -> TypeGuard[list[int]]:
    short = isinstance(value, list) and len(value) <= MAX_DIMENSIONS
    return short and _is_counts(value) and math.prod(max(1, n) for n in value) <= _MAX_ENTRIES


def is_name(name: str) -> bool:
    """Whether a text may name a tensor: printable, so that an error that quotes it cannot play with a terminal."""
    return 0 < len(name) <= MAX_NAME and name.isprintable()


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError(f"{where} names something twice in its header; get the file again.")
    return found
