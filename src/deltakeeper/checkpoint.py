"""A model folder opened lazily: names, shapes and dtypes from headers, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import torch

from deltakeeper.errors import CheckpointError
from deltakeeper.safetensors_header import DTYPE_NAMES, HeaderEntry, read_header

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its own dtype."""
        return self.numel * self.dtype.itemsize

    @property
    def st_dtype(self) -> str:
        """The dtype as safetensors spells it, for instance `BF16`."""
        return DTYPE_NAMES[self.dtype]


class Checkpoint:
    """An opened model folder; use it as a context manager or call `close`.

    Attributes:
        path: the folder.
        config: its `config.json`, or an empty dictionary.
        tensors: what each tensor is, by name, sorted by name.
        name_or_path: what the checkpoint was asked for by.
        revision: commit on the hub, or the revision that was asked for where the commit is not known.
    """

    def __init__(self, path: Path, name_or_path: str, revision: str | None = None) -> None:
        self.path = path
        self.name_or_path = name_or_path
        self.revision = revision
        self.config = read_config(path)
        self._entries: dict[str, tuple[Path, HeaderEntry]] = {}
        for file in _weight_files(path):
            for name, entry in read_header(file).entries.items():
                if name in self._entries:
                    raise CheckpointError(f"{path} holds tensor '{name}' twice; remove the shard that is too many.")
                self._entries[name] = (file, entry)
        if not self._entries:
            raise CheckpointError(f"{path} holds no tensors; give a folder with a model's safetensors files.")
        self.tensors = {
            name: TensorInfo(name, entry.dtype, entry.shape) for name, (_, entry) in sorted(self._entries.items())
        }
        self._handles: dict[Path, BufferedReader] = {}
        self._opening = Lock()

    def raw(self, name: str) -> memoryview:
        """Bytes of a tensor as stored, little-endian and row-major."""
        return memoryview(self._bytes(name))

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its own dtype and shape, read from disk at each call."""
        return self._tensor(name)

    def stored(self, name: str) -> bool:
        """Whether the file holds this tensor as it is, so that `blocks` reads no more than it gives."""
        return True

    def read_ahead(self, name: str) -> None:
        """Ask the system to have a tensor's bytes in memory soon; nothing waits for it."""
        if name in self._entries and hasattr(os, "posix_fadvise"):
            file, entry = self._entries[name]
            os.posix_fadvise(self._handle(file), entry.start, entry.end - entry.start, os.POSIX_FADV_WILLNEED)

    def blocks(self, name: str, nbytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """A tensor in blocks of whole rows (of its first dimension), each of about `nbytes`, at least one row.

        Gives the rows and their tensor, which is overwritten by the next block.
        """
        info = self.tensors[name]
        rows = info.shape[0] if info.shape else 1
        width = info.nbytes // rows if rows else 0
        step = max(1, nbytes // max(1, width))
        buffer = bytearray(min(step, rows) * width)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            view = memoryview(buffer)[: (stop - start) * width]
            self._fill(name, view, start * width)
            shape = (stop - start, *info.shape[1:])
            yield (
                slice(start, stop),
                torch.frombuffer(view, dtype=info.dtype).view(shape) if view else torch.empty(shape),
            )

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensor(self, key: str) -> torch.Tensor:
        _, entry = self._entries[key]
        raw = self._bytes(key)
        flat = torch.frombuffer(raw, dtype=entry.dtype) if raw else torch.empty(0, dtype=entry.dtype)
        return flat.view(entry.shape)

    def _bytes(self, key: str) -> bytearray:
        _, entry = self._entries[key]
        raw = bytearray(entry.end - entry.start)
        self._fill(key, memoryview(raw), 0)
        return raw

    def _handle(self, file: Path) -> int:
        with self._opening:
            if file not in self._handles:
                self._handles[file] = file.open("rb")
            return self._handles[file].fileno()

    def _fill(self, key: str, view: memoryview, offset: int) -> None:
        # Plain reads, not a memory map: mapped pages would count as memory of the process, tensor after tensor.
        file, entry = self._entries[key]
        handle, done = self._handle(file), 0
        while done < len(view):  # one call reads at most 2 GiB; preadv has no file position, so threads may share it
            got = os.preadv(handle, [view[done:]], entry.start + offset + done)
            if got == 0:
                raise CheckpointError(f"{file} became shorter while it was read; get the file again.")
            done += got


def open_checkpoint(source: str | Path, *, revision: str | None = None, base: Checkpoint | None = None) -> Checkpoint:
    """Open a model from a local folder or the hub; nothing but headers is read.

    Args:
        source: a folder with safetensors files (any sharding), a PEFT LoRA adapter folder (needs `base`), or a hub
            name `organisation/model` or `organisation/model@revision`.
        revision: hub revision.
        base: the model that a LoRA adapter was trained on.

    Raises:
        CheckpointError: there is no such model, it holds no safetensors, or its files do not fit together.
    """
    path = Path(source)
    if not path.is_dir():
        path, revision = _fetch(str(source), revision)
    if (path / "adapter_config.json").is_file() and not _weight_files(path, missing_ok=True):
        from deltakeeper.lora import LoraCheckpoint

        if base is None:
            raise CheckpointError(f"{path} is a LoRA adapter; give the model it was trained on as the base.")
        return LoraCheckpoint(path, str(source), base)
    return Checkpoint(path, str(source), revision)


@contextmanager
def opened(source: Checkpoint | str | Path, base: Checkpoint | None = None) -> Iterator[Checkpoint]:
    """A checkpoint for a `with` block: one that is open already stays open, one that is named is closed afterwards."""
    if isinstance(source, Checkpoint):
        yield source
    else:
        with open_checkpoint(source, base=base) as checkpoint:
            yield checkpoint


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a folder, or an empty dictionary if there is none."""
    return read_json(path / "config.json") if (path / "config.json").is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); get the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; get the file again.")
    return value


def _weight_files(path: Path, missing_ok: bool = False) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        return _indexed_files(index)
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    others = ("adapter_", "consolidated")  # an adapter, and the same weights once more in another layout
    files = sorted(f for f in path.glob("*.safetensors") if not f.name.startswith(others))
    if not files and not missing_ok:
        if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
            raise CheckpointError(f"{path} holds pickle files only, which are never opened; convert to safetensors.")
        raise CheckpointError(f"{path} holds no safetensors files; give the folder of a model.")
    return files


def _indexed_files(index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; get the file again.")
    files = {}
    for shard in sorted(set(mapping.values())):
        file = index.parent / shard
        if Path(shard).name != shard or shard in ("", ".", "..") or len(shard) > 200:
            raise CheckpointError(f"{index} points to '{shard}', outside its folder; do not trust this model.")
        if not file.is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which is missing; get the model again.")
        files[shard] = file
    headers = {shard: read_header(file).entries for shard, file in files.items()}
    for name, shard in mapping.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{index} says that {shard} holds tensor '{name}', but it does not.")
    return list(files.values())


def _fetch(source: str, revision: str | None) -> tuple[Path, str | None]:
    if not HUB_NAME.fullmatch(source) or source.startswith(("./", "../")):
        raise CheckpointError(f"there is no model folder {source}; give a local folder or a hub name like org/name.")
    name, _, tag = source.partition("@")
    revision = revision or tag or None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many kinds; all of them mean that there is no model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no model folder {source}, and the hub did not give one by that name ({reason}); "
            "check the path or the name."
        ) from error
    # A branch moves on; the client keeps a snapshot under the name of the commit that it is.
    commit = folder.name if COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots" else None
    return folder, commit or revision
