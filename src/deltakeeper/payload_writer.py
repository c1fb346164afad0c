"""Write an artifact's payload as it comes: safetensors files that grow in place behind room kept for their header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import BufferedRandom
from pathlib import Path

import torch

from deltakeeper.payload import INDEX_NAME, PAYLOAD_NAME, shard_name
from deltakeeper.safetensors_header import DTYPE_NAMES
from deltakeeper.write_behind import WriteBehind

SHARD_BYTES = 4 * 10**9
HEADER_ROOM = 512 << 10
"""Bytes kept for a file's header; a header that outgrows it begins another file."""
PADDING_SHARE = 1024
"""Unused room may be one in so many bytes of a file; a file with more of it is moved up, which small ones allow."""

_BLOCK = 4 << 20
_FLUSHED = 32 << 20
_OPENING = '{"__metadata__":{"format":"pt"}'


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


class PayloadWriter:
    """Writes payload tensors into one safetensors file, or into shards once they outgrow `shard_bytes`.

    Each byte is written once (files below `HEADER_ROOM * PADDING_SHARE` are moved up behind their header), on a thread.
    Where a shard ends depends on nothing but the tensors and their order, so equal tensors give equal files.
    Tensors must not be changed after they were given.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._shards: list[_Shard] = []
        self._disk = WriteBehind()

    def add(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Write the payload of one tensor, all into the same shard.

        Raises:
            OSError: this or an earlier one could not be written.
        """
        if not parts:
            return
        nbytes = sum(tensor.nbytes for tensor in parts.values())
        shard = self._shards[-1] if self._shards else None
        room = sum(len(_entry(key, tensor, 10**18)) for key, tensor in parts.items())
        if shard is None or shard.size + nbytes > self._limit or shard.header_size + room > shard.room:
            shard = self._begin(room)
        for key, tensor in parts.items():
            raw = as_bytes(tensor)
            shard.enter(key, tensor)
            self._disk.submit(lambda shard=shard, raw=raw: shard.write(raw), len(raw))  # type: ignore[misc]

    def finish(self) -> None:
        """Wait until all is written, and give the files their names.

        Raises:
            OSError: something could not be written.
        """
        if not self._shards:
            self._begin(0)
        self._disk.submit(self._shards[-1].close)
        self._disk.finish()
        count = len(self._shards)
        if count == 1:
            self._shards[0].path.rename(self._folder / PAYLOAD_NAME)
            return
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(self._shards):
            shard.path.rename(self._folder / shard_name(i + 1, count))
            weight_map |= dict.fromkeys(shard.keys, shard_name(i + 1, count))
        index = {"metadata": {"total_size": sum(shard.size for shard in self._shards)}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Stop writing and close the files; what was written stays where it is."""
        self._disk.abandon()
        for shard in self._shards:
            shard.drop()

    def _begin(self, room: int) -> _Shard:
        if self._shards:
            self._disk.submit(self._shards[-1].close)
        shard = _Shard(self._folder / f"shard-{len(self._shards)}", max(HEADER_ROOM, room + len(_OPENING) + 8))
        self._shards.append(shard)
        self._disk.submit(shard.open)
        return shard


class _Shard:
    """One file; `enter` is called by whoever gives tensors, `open`, `write` and `close` on the thread that writes."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.room = room + -room % 8
        self.size = 0
        self.keys: list[str] = []
        self.header_size = len(_OPENING) + 1
        self._entries = [_OPENING]
        self._file: BufferedRandom | None = None
        self._flushed = 0

    def enter(self, key: str, tensor: torch.Tensor) -> None:
        self._entries.append(_entry(key, tensor, self.size))
        self.header_size += len(self._entries[-1])
        self.keys.append(key)
        self.size += tensor.nbytes

    def open(self) -> None:
        self._file = self.path.open("w+b")
        self._file.seek(8 + self.room)

    def write(self, raw: memoryview) -> None:
        assert self._file is not None
        self._file.write(raw)
        self._flushed += len(raw)
        if self._flushed >= _FLUSHED:  # so that the disk works while more is made, not all of it at the end
            self._file.flush()
            os.fdatasync(self._file.fileno())
            self._flushed = 0

    def close(self) -> None:
        assert self._file is not None
        header = ("".join(self._entries) + "}").encode()
        length = len(header) + -len(header) % 8
        if (self.room - length) * PADDING_SHARE > self.size:
            self._move_up(self.room - length)
        else:
            length = self.room
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + header.ljust(length))
        self._file.close()

    def drop(self) -> None:
        """Close the file whatever became of it."""
        if self._file is not None and not self._file.closed:
            self._file.raw.close()  # what is still buffered is not wanted

    def _move_up(self, distance: int) -> None:
        assert self._file is not None
        self._file.flush()
        descriptor, start = self._file.fileno(), 8 + self.room
        for offset in range(start, start + self.size, _BLOCK):
            block = memoryview(os.pread(descriptor, min(_BLOCK, start + self.size - offset), offset))
            done = 0
            while done < len(block):
                done += os.pwrite(descriptor, block[done:], offset - distance + done)
        os.ftruncate(descriptor, start - distance + self.size)


def _entry(key: str, tensor: torch.Tensor, start: int) -> str:
    """As `json.dumps` without spaces would write it, in a tenth of the time: models have thousands of tensors."""
    shape = ",".join(map(str, tensor.shape))
    place = f"[{start},{start + tensor.nbytes}]"
    return f',{json.dumps(key)}:{{"dtype":"{DTYPE_NAMES[tensor.dtype]}","shape":[{shape}],"data_offsets":{place}}}'
