"""Write an artifact tensor by tensor under a temporary name, and give it its name when it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch

from deltakeeper.artifact import MANIFEST_NAME, added_rows_key, hash_payload, payload_key
from deltakeeper.errors import ArtifactError
from deltakeeper.layouts import Layout
from deltakeeper.manifest import Manifest, TermRecord
from deltakeeper.payload_writer import SHARD_BYTES, PayloadWriter, as_bytes

__all__ = ["ArtifactWriter", "as_bytes", "explain_writing", "publish", "refuse_existing"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ArtifactWriter:
    """A context manager: payload goes to disk on a thread as it comes, so memory holds a few tensors at a time.

    On any error, an interruption included, nothing is left behind and an existing artifact stays as it was.
    Tensors are to be added in the order of their names, on one thread, and not to be changed afterwards.
    """

    def __init__(
        self, out: Path, overwrite: bool = False, inputs: Sequence[Path] = (), *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.out = out
        self.inputs = inputs
        self.overwrite = overwrite
        self._shard_bytes = shard_bytes

    def __enter__(self) -> Self:
        refuse_existing(self.out, self.overwrite, "artifact", self.inputs)
        with explain_writing(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        self._payload = PayloadWriter(self.folder, self._shard_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._payload.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(
        self, name: str, terms: Sequence[tuple[int | None, Layout]], added_rows: torch.Tensor | None
    ) -> tuple[tuple[TermRecord, ...], int, str | None]:
        """Write a tensor's payload; gives its term records, bytes and hash.

        Raises:
            ArtifactError: this or an earlier tensor could not be written.
        """
        parts: dict[str, torch.Tensor] = {}
        records = []
        for i, (part, term) in enumerate(terms):
            records.append(TermRecord(term.name, term.settings(), part))
            parts |= {payload_key(name, i, suffix): tensor for suffix, tensor in term.tensors().items()}
        if added_rows is not None:
            parts[added_rows_key(name)] = added_rows
        raw = {key: as_bytes(tensor) for key, tensor in parts.items()}
        with explain_writing(self.out):
            self._payload.add(parts)
        return tuple(records), sum(map(len, raw.values())), hash_payload(raw) if raw else None

    def copy(self, file: Path) -> None:
        """Copy a file of the fine-tune into the artifact."""
        with explain_writing(self.out):
            shutil.copyfile(file, self.folder / file.name)

    def write_text(self, name: str, text: str) -> None:
        """Add a text file."""
        with explain_writing(self.out):
            (self.folder / name).write_text(text, encoding="utf-8")

    def finish(self, manifest: Manifest, describe: Callable[[Path], object] | None = None) -> None:
        """Write what is left of the payload and the manifest, and put the artifact in its place.

        Args:
            manifest: the manifest of what was added.
            describe: called with the whole artifact before it gets its name, to add files about it.

        Raises:
            ArtifactError: something could not be written.
        """
        with explain_writing(self.out):
            self._payload.finish()
            self.write_text(MANIFEST_NAME, json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n")
            if describe is not None:
                describe(self.folder)
            publish(self.folder, self.out)


@contextmanager
def explain_writing(out: Path) -> Iterator[None]:
    """Turn a failure to write `out` into a sentence.

    Raises:
        ArtifactError: the block raised OSError; says whether the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ArtifactError(
                f"{out} could not be written, since the disk is full or its quota spent ({error.strerror}); "
                "free some space or give a folder on another disk."
            ) from error
        raise ArtifactError(f"{out} could not be written ({error.strerror}); check the disk and its rights.") from error


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
