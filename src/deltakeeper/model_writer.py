"""Write a model folder whose tensors are all known by shape beforehand: any block of any tensor, in any order."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from deltakeeper.checkpoint import INDEX, WEIGHTS

SHARD_BYTES = 5 * 10**9
"""Size from which a model is written as several files, as transformers does it."""


@dataclass(frozen=True)
class Planned:
    """One tensor to come: its dtype as safetensors spells it, its shape and its bytes."""

    st_dtype: str
    shape: tuple[int, ...]
    nbytes: int


class ModelWriter:
    """A context manager around the safetensors files of one model; `write` may be called from several threads.

    Room on disk is taken at once, so that a full disk shows before the work, and so that the file system does not
    have to look for it block by block, which costs more than the writing.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Planned], shard_bytes: int | None = None) -> None:
        self._folder = folder
        self._shards = _cut(tensors, shard_bytes or SHARD_BYTES)
        self._tensors = tensors
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []

    def __enter__(self) -> Self:
        for number, names in enumerate(self._shards):
            header, offsets, end = _lay_out({name: self._tensors[name] for name in names})
            file = os.open(self._folder / self._file_name(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            self._files.append(file)
            _reserve(file, end)
            os.pwrite(file, header, 0)
            self._places |= {name: (file, offset) for name, offset in offsets.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            os.close(file)
        if error is None and len(self._shards) > 1:
            mapping = {name: self._file_name(i) for i, names in enumerate(self._shards) for name in names}
            total = sum(self._tensors[name].nbytes for name in mapping)
            index = {"metadata": {"total_size": total}, "weight_map": mapping}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Put some bytes of a tensor in their place."""
        file, start = self._places[name]
        done = 0
        while done < len(data):
            done += os.pwrite(file, data[done:], start + offset + done)

    def _file_name(self, number: int) -> str:
        count = len(self._shards)
        return WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _cut(tensors: Mapping[str, Planned], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, planned in tensors.items():
        if shards[-1] and size + planned.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += planned.nbytes
    return shards


def _lay_out(tensors: Mapping[str, Planned]) -> tuple[bytes, dict[str, int], int]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, planned in tensors.items():
        entries[name] = {
            "dtype": planned.st_dtype,
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places: dict[str, int] = {}
    at = len(header)
    for name, planned in tensors.items():
        places[name] = at
        at += planned.nbytes
    return header, places, at


def _reserve(file: int, size: int) -> None:
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.truncate(file, size)


def names_in_order(names: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """Tensor names with each alias right behind the tensor that it is an alias of."""
    found = []
    for name in names:
        if name not in aliases:
            found += [name, *(alias for alias, of in aliases.items() if of == name)]
    return found
