"""The payload of an artifact: one safetensors file, or shards with an index; untrusted, so headers come first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deltakeeper.errors import ArtifactError, CheckpointError, UnreadableError, is_of_disk
from deltakeeper.manifest_fields import parse_json
from deltakeeper.safetensors_header import HeaderEntry, read_header

PAYLOAD_NAME = "delta_model.safetensors"
INDEX_NAME = "delta_model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20

_SHARD = re.compile(r"delta_model-([0-9]{5})-of-([0-9]{5})\.safetensors")


def shard_name(number: int, count: int) -> str:
    """File name of the shard `number`, counted from 1, of `count`."""
    return f"delta_model-{number:05d}-of-{count:05d}.safetensors"


def is_payload_name(name: str) -> bool:
    """Whether a file of an artifact may hold payload, or say which shard holds what."""
    return name in (PAYLOAD_NAME, INDEX_NAME) or _SHARD.fullmatch(name) is not None


class Payload:
    """The payload tensors of a folder by key; each is read from disk when it is asked for.

    Attributes:
        entries: dtype, shape and place of each payload tensor.

    Raises:
        ArtifactError: files are missing, too many, outside the folder, or do not describe their bytes exactly.
        UnreadableError: the disk does not give one of them now.
    """

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, HeaderEntry] = {}
        self._files: dict[str, Path] = {}
        shards = _shards(folder)
        for file, keys in shards.items():
            try:
                entries = read_header(file).entries
            except CheckpointError as error:
                raise _kind(error.__cause__)(str(error)) from error
            if keys is not None and keys != set(entries):
                odd = min(keys ^ set(entries))
                where = "the index lists it there" if odd in keys else "the index does not list it there"
                raise ArtifactError(f"{file} and its index do not agree on '{odd}' ({where}); get the artifact again.")
            self.entries |= entries
            self._files |= dict.fromkeys(entries, file)

    def read(self, key: str) -> bytearray:
        """Bytes of one payload tensor."""
        file, entry = self._files[key], self.entries[key]
        raw = bytearray(entry.end - entry.start)
        view, done = memoryview(raw), 0
        try:
            with file.open("rb", buffering=0) as source:
                source.seek(entry.start)
                while done < len(raw):  # one call reads at most 2 GiB
                    got = source.readinto(view[done:])
                    if not got:
                        raise ArtifactError(f"{file} became shorter while it was read; get the artifact again.")
                    done += got
        except OSError as error:
            raise _kind(error)(f"{file} cannot be read ({error.strerror}); check the disk.") from error
        return raw


def _kind(error: BaseException | None) -> type[ArtifactError]:
    return UnreadableError if is_of_disk(error) else ArtifactError


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Files of the payload and the keys that the index gives each; None where there is no index."""
    index, found = folder / INDEX_NAME, {f.name for f in folder.glob("delta_model*.safetensors")}
    if not index.exists():
        if found - {PAYLOAD_NAME}:
            raise ArtifactError(f"{folder} holds {min(found - {PAYLOAD_NAME})} but no {INDEX_NAME}; get it again.")
        return {folder / PAYLOAD_NAME: None}
    keys: dict[str, set[str]] = {}
    for key, shard in _weight_map(index).items():
        keys.setdefault(shard, set()).add(key)
    odd = sorted(shard for shard in keys if not _SHARD.fullmatch(shard))
    if odd:
        raise ArtifactError(
            f"{index} points to {odd[0][:100]!r}, which is no shard in its folder; do not trust this artifact."
        )
    wanted = {shard_name(i + 1, len(keys)) for i in range(len(keys))}
    for names, fault in (
        (set(keys) ^ wanted, f"{index} does not number its shards from 1 to their count, as seen at"),
        (wanted - found, f"{folder} lacks a shard that its index names:"),
        (found - wanted, f"{folder} holds a file that its index does not name:"),
    ):
        if names:
            raise ArtifactError(f"{fault} {min(names)}; get the artifact again.")
    return {folder / shard: keys[shard] for shard in sorted(keys)}


def _weight_map(index: Path) -> dict[str, str]:
    if not index.is_file() or index.stat().st_size > MAX_INDEX_BYTES:
        raise ArtifactError(f"{index} is no file of at most {MAX_INDEX_BYTES} bytes; get the artifact again.")
    value: Any = parse_json(index.read_bytes(), str(index))
    mapping = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(shard, str) for shard in mapping.values()):
        raise ArtifactError(f"{index} has no weight_map from payload to shards; get the artifact again.")
    return mapping
