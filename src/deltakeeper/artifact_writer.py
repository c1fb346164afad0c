"""Write an artifact tensor by tensor under a temporary name, and give it its name when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from deltakeeper.artifact import MANIFEST_NAME, PAYLOAD_NAME, added_rows_key, hash_payload, payload_key
from deltakeeper.errors import ArtifactError
from deltakeeper.layouts import Layout
from deltakeeper.manifest import Manifest, TermRecord
from deltakeeper.safetensors_header import DTYPE_NAMES


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


class ArtifactWriter:
    """A context manager: payload goes to a spool as it comes, so memory holds one tensor at a time.

    On any error, an interruption included, nothing is left behind and an existing artifact stays as it was.
    """

    def __init__(self, out: Path, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
        self.out = out
        self.inputs = inputs
        self.overwrite = overwrite
        self._header: dict[str, dict[str, Any]] = {}
        self._size = 0

    def __enter__(self) -> Self:
        refuse_existing(self.out, self.overwrite, "artifact", self.inputs)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        self._spool = (self.folder / "spool").open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(
        self, name: str, terms: Sequence[tuple[int | None, Layout]], added_rows: torch.Tensor | None
    ) -> tuple[tuple[TermRecord, ...], int, str | None]:
        """Write a tensor's payload; gives its term records, bytes and hash."""
        parts: dict[str, torch.Tensor] = {}
        records = []
        for i, (part, term) in enumerate(terms):
            records.append(TermRecord(term.name, term.settings(), part))
            parts |= {payload_key(name, i, suffix): tensor for suffix, tensor in term.tensors().items()}
        if added_rows is not None:
            parts[added_rows_key(name)] = added_rows
        raw = {key: as_bytes(tensor) for key, tensor in parts.items()}
        for key, tensor in parts.items():
            self._spool.write(raw[key])
            end = self._size + len(raw[key])
            self._header[key] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self._size, end],
            }
            self._size = end
        return tuple(records), sum(map(len, raw.values())), hash_payload(raw) if raw else None

    def copy(self, file: Path) -> None:
        """Copy a file of the fine-tune into the artifact."""
        shutil.copyfile(file, self.folder / file.name)

    def write_text(self, name: str, text: str) -> None:
        """Add a text file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def finish(self, manifest: Manifest) -> None:
        """Write payload and manifest, and put the artifact in its place."""
        self._spool.close()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        spool = self.folder / "spool"
        with (self.folder / PAYLOAD_NAME).open("wb") as file, spool.open("rb") as packed:
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(packed, file, 1 << 22)
        spool.unlink()
        self.write_text(MANIFEST_NAME, json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n")
        publish(self.folder, self.out)


def refuse_existing(
    out: Path, overwrite: bool, kind: Literal["artifact", "model"], inputs: Sequence[Path] = ()
) -> None:
    """Raise ArtifactError if `out` exists and may not be replaced by something of `kind`, made from `inputs`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ArtifactError(f"{out} exists; give another folder, or --overwrite to replace it.")
    if not (out / MANIFEST_NAME).is_file() and not (out / "config.json").is_file():
        raise ArtifactError(f"{out} is neither an artifact nor a model, so it is not replaced; give another folder.")
    found = "artifact" if (out / MANIFEST_NAME).is_file() else "model"
    if found != kind:
        raise ArtifactError(
            f"{out} is of another kind ({found}, not {kind}), so it is not replaced; give another folder."
        )
    if any(source.resolve().is_relative_to(out.resolve()) for source in inputs):
        raise ArtifactError(f"{out} holds what the {kind} is made from, so it is not replaced; give another folder.")


def publish(folder: Path, out: Path) -> None:
    """Flush a finished folder to disk and rename it to `out`, in the place of what may be there."""
    for file in (*folder.iterdir(), folder):
        _flush(file)
    folder.chmod(0o755)
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
        try:
            out.rename(old / "replaced")
            folder.rename(out)
        except BaseException:
            if not out.exists() and (old / "replaced").exists():
                (old / "replaced").rename(out)
            raise
        finally:
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)
    _flush(out.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
