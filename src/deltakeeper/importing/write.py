"""Write a foreign delta as an artifact, tensor by tensor, bound to its base like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from deltakeeper.artifact import SIDE_FILES, open_artifact
from deltakeeper.artifact_writer import ArtifactWriter, as_bytes
from deltakeeper.card import write_card
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.delta import role_of
from deltakeeper.errors import CheckpointError
from deltakeeper.fingerprint import leaf_hash, root_of
from deltakeeper.importing.adapter import Adapter
from deltakeeper.importing.bitdelta import BitDeltaFile
from deltakeeper.importing.source import ForeignDelta, Imported
from deltakeeper.lora import LoraCheckpoint
from deltakeeper.manifest import Manifest, Source, TensorRecord
from deltakeeper.reconstruct import reconstruct


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote: the format it read, bytes of the artifact and of the model, and tensors by treatment."""

    kind: str
    nbytes: int
    full_bytes: int
    changed: int
    unchanged: int


def import_delta(
    source: str | Path,
    base: Checkpoint | str | Path,
    out: str | Path,
    *,
    files: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> ImportReport:
    """Write an artifact that decodes to what another tool's delta makes of its base.

    The fine-tune itself is not needed. Nothing in a foreign file is executed.

    Args:
        source: a PEFT LoRA adapter (folder or hub name), or BitDelta's `.pt` file.
        base: the model that it belongs to.
        out: artifact folder to write; nothing is left there if anything fails.
        files: folder with tokenizer and configuration of the fine-tune; the adapter's own by default.
        overwrite: replace an artifact that is there.
        progress: called before each tensor with (tensors done, tensors in all, name of the next).

    Raises:
        CheckpointError: the source is in no known format, is damaged, or does not fit the base.
        ArtifactError: `out` may not be replaced.
    """
    with opened(base) as origin, _opened(source, origin) as foreign:
        folder = Path(files) if files is not None else foreign.path if foreign.path.is_dir() else None
        inputs = [path for path in (origin.path, foreign.path, folder) if path is not None]
        with ArtifactWriter(Path(out), overwrite, inputs) as writer:
            run = _Import(origin, foreign, writer)
            for i, name in enumerate(foreign.tensors):
                if progress:
                    progress(i, len(foreign.tensors), name)
                run.add(name)
            manifest = run.manifest()
            for file in _side_files(origin.path, folder):
                writer.copy(file)
            _grow_config(origin, foreign, writer)
            writer.finish(manifest)
    write_card(out)
    artifact = open_artifact(out)
    changed = sum(record.encoding == "terms" for record in manifest.tensors.values())
    return ImportReport(foreign.kind, artifact.nbytes, artifact.full_bytes, changed, len(manifest.tensors) - changed)


class _Import:
    """One import under way: records and hashes as they come."""

    def __init__(self, base: Checkpoint, foreign: ForeignDelta, writer: ArtifactWriter) -> None:
        self.base, self.foreign, self.writer = base, foreign, writer
        self.records: dict[str, TensorRecord] = {}
        self.base_leaves: dict[str, str] = {}
        self.decoded_leaves: dict[str, str] = {}
        self.exact = True

    def add(self, name: str) -> None:
        """Write one tensor, and hash the base's and what the artifact will decode to."""
        info = self.foreign.tensors[name]
        origin = self.base.tensors.get(name)
        before = None if origin is None else self.base.read(name)
        if origin is not None and before is not None:
            self.base_leaves[name] = leaf_hash(name, origin.st_dtype, origin.shape, as_bytes(before))
        found = self.foreign.read(name)
        if found is not None and before is not None and _is_same(found, before):
            found = None
        record = TensorRecord(
            shape=info.shape,
            dtype=info.st_dtype,
            role=role_of(name, info.shape),
            encoding="unchanged" if found is None else "terms",
            base_name=None if origin is None else name,
            base_shape=None if origin is None else origin.shape,
        )
        terms = () if found is None else tuple(found.terms)
        if found is not None:
            records, nbytes, digest = self.writer.add(name, [(None, term) for term in terms], None)
            own = {"transposed": found.transposed, "terms": records, "stored_bytes": nbytes, "sha256": digest}
            record = TensorRecord(**{**vars(record), **own})
            self.exact = self.exact and all(term.exact for term in terms)
        self.records[name] = record
        decoded = reconstruct(record, terms, before, None, info.dtype)
        self.decoded_leaves[name] = leaf_hash(name, record.dtype, record.shape, as_bytes(decoded))

    def manifest(self) -> Manifest:
        """The manifest; there is no fine-tune to compare with, so the target is what the artifact decodes to."""
        root = root_of(self.decoded_leaves)
        return Manifest(
            created_by=f"deltakeeper {version('deltakeeper')}",
            codec=f"import-{self.foreign.kind}",
            base=Source(self.base.name_or_path, self.base.revision, root_of(self.base_leaves), self.base_leaves),
            target=Source(self.foreign.name_or_path, None, root),
            reconstruction=Source(self.foreign.name_or_path, None, root, self.decoded_leaves),
            exact=self.exact,
            tensors=self.records,
        )


def _is_same(found: Imported, before: torch.Tensor) -> bool:
    term = found.terms[0]
    if not term.replaces or term.shape != tuple(before.shape):
        return False
    return as_bytes(term.to_dense()) == as_bytes(before)


@contextmanager
def _opened(source: str | Path, base: Checkpoint) -> Iterator[ForeignDelta]:
    path = Path(source)
    if path.is_file():
        yield BitDeltaFile(path, base)
        return
    with opened(source, base=base) as adapter:
        if not isinstance(adapter, LoraCheckpoint):
            raise CheckpointError(f"{source} is a whole model; compress it with `deltakeeper compress`.")
        yield Adapter(adapter)


def _side_files(base: Path, folder: Path | None) -> list[Path]:
    found = [] if folder is None else [folder / name for name in SIDE_FILES if (folder / name).is_file()]
    return [f for f in found if not (base / f.name).is_file() or (base / f.name).read_bytes() != f.read_bytes()]


def _grow_config(base: Checkpoint, foreign: ForeignDelta, writer: ArtifactWriter) -> None:
    """Where the fine-tune has more tokens than the base's configuration says, and brought none of its own, say it."""
    size = base.config.get("vocab_size")
    rows = {info.shape[0] for name, info in foreign.tensors.items() if role_of(name, info.shape) == "embedding"}
    if (writer.folder / "config.json").exists() or not isinstance(size, int) or len(rows) != 1:
        return
    before = {info.shape[0] for name, info in base.tensors.items() if role_of(name, info.shape) == "embedding"}
    if rows != before:
        config = base.config | {"vocab_size": rows.pop()}
        writer.write_text("config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
