"""Put a delta on its base: into a checkpoint on disk, or as changes for a live model."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from deltakeeper.artifact import SIDE_FILES, DeltaArtifact, open_artifact
from deltakeeper.artifact_writer import as_bytes, explain_writing, publish, refuse_existing
from deltakeeper.attach import Change
from deltakeeper.checkpoint import Checkpoint, TensorInfo, opened
from deltakeeper.errors import ArtifactError, BaseMismatchError
from deltakeeper.fingerprint import begin_leaf, hash_tensor, leaf_hash
from deltakeeper.manifest import TensorRecord
from deltakeeper.model_writer import ModelWriter, Planned, names_in_order
from deltakeeper.reconstruct import dense_delta, merge_block, reconstruct
from deltakeeper.safetensors_header import DTYPES
from deltakeeper.workers import map_in_order, one_thread_each

BLOCK_BYTES = 1 << 20
"""Tensors are put together in blocks of rows of about this size, which stay in the cache of one core."""


def check_base(base: Checkpoint, delta: DeltaArtifact, name: str, record: TensorRecord) -> torch.Tensor | None:
    """Read the base's tensor for a record, after checking that it is the one the delta was made from.

    Raises:
        BaseMismatchError: the base lacks it, or its bytes differ.
        ArtifactError: the record states another shape than the base's tensor has.
    """
    if record.base_name is None:
        return None
    info = base_tensor(base, delta, record, name)
    tensor = base.read(info.name)
    if leaf_hash(info.name, info.st_dtype, info.shape, base.raw(info.name)) != delta.manifest.base.leaves.get(
        info.name
    ):
        raise mismatch(base, delta, info.name)
    return tensor


def base_tensor(base: Checkpoint, delta: DeltaArtifact, record: TensorRecord, name: str) -> TensorInfo:
    """What the header of the base says of the tensor that a record is a delta to.

    Raises:
        BaseMismatchError: the base lacks it.
        ArtifactError: the record states another shape than the base's tensor has.
    """
    origin = str(record.base_name)
    if origin not in base.tensors:
        raise BaseMismatchError(
            f"{base.name_or_path} has no tensor '{origin}', so it is not the base of {delta.path}; "
            f"give {delta.manifest.base.name_or_path}."
        )
    info = base.tensors[origin]
    if info.shape != record.base_shape:
        # A base of another size is the likelier mistake than a manifest at odds with its own hashes.
        leaf = hash_tensor(base, origin)
        if leaf != delta.manifest.base.leaves.get(origin):
            raise mismatch(base, delta, origin)
        raise ArtifactError(f"{delta.path}: the base shape of tensor '{name}' is wrong; get the artifact again.")
    return info


def mismatch(base: Checkpoint, delta: DeltaArtifact, origin: str) -> BaseMismatchError:
    """The error for a base that is not the one a delta was made from."""
    return BaseMismatchError(
        f"tensor '{origin}' of {base.name_or_path} is not the one that {delta.path} was made from; "
        f"give the very base, {delta.manifest.base.name_or_path}."
    )


def iterate_changes(base: Checkpoint, delta: DeltaArtifact) -> Iterator[Change]:
    """What a delta does to each tensor of its base, for `deltakeeper.attach`; unchanged and tied tensors are left out.

    Deltas are float32 and never rounded to the dtype of the weights.

    Raises:
        BaseMismatchError: a tensor of the base is not the one the delta was made from.
    """
    for name in delta.names:
        record = delta.record(name)
        if record.encoding != "terms":
            continue
        origin = check_base(base, delta, name, record)
        terms = delta.terms(name)
        if terms[0].replaces or record.shape != record.base_shape:
            dtype = DTYPES[record.dtype]
            yield Change(name, "value", reconstruct(record, terms, origin, delta.added_rows(name), dtype))
        else:
            yield Change(name, "delta", dense_delta(record, terms))


def iterate_merged(
    base: Checkpoint, delta: DeltaArtifact, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The fine-tuned tensors as the artifact gives them back, one at a time; aliases are left out.

    Args:
        base: the base that the delta was made from.
        delta: the artifact.
        dtype: dtype of all results; the dtype of each tensor in the fine-tune by default.

    Raises:
        BaseMismatchError: a tensor of the base is not the one the delta was made from.
    """
    for name in delta.names:
        record = delta.record(name)
        if record.encoding != "tied":
            origin = check_base(base, delta, name, record)
            wanted = dtype or DTYPES[record.dtype]
            yield name, reconstruct(record, delta.terms(name), origin, delta.added_rows(name), wanted)


def merge_survival(base: Checkpoint, delta: DeltaArtifact) -> float:
    """Share of the non-zero entries of the decoded delta that still change the weight after the merge is rounded."""
    moved = survived = 0
    for name in delta.names:
        record = delta.record(name)
        if record.encoding != "terms" or record.base_name is None:
            continue
        terms = delta.terms(name)
        if terms[0].replaces:
            continue
        change = dense_delta(record, terms)
        origin = base.read(record.base_name)[: len(change)]
        merged = torch.add(change, origin).to(DTYPES[record.dtype])
        moved += int(torch.count_nonzero(change))
        survived += int(torch.count_nonzero(merged != origin.to(DTYPES[record.dtype])))
    return survived / moved if moved else 1.0


def apply_delta(
    base: Checkpoint | str | Path, delta: DeltaArtifact | str | Path, out: str | Path, *, overwrite: bool = False
) -> Path:
    """Write the fine-tune that a delta makes of its base: a folder that transformers loads.

    Raises:
        BaseMismatchError: this is not the base that the delta was made from.
        ArtifactError: the artifact is damaged or does not decode to what it promises, or `out` cannot be written or may
            not be replaced.
    """
    artifact = delta if isinstance(delta, DeltaArtifact) else open_artifact(delta)
    target = Path(out)
    with opened(base) as origin, one_thread_each() as threads, explain_writing(target):
        refuse_existing(target, overwrite, "model", (origin.path, artifact.path))
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            for name in SIDE_FILES:
                source = artifact.path / name if (artifact.path / name).is_file() else origin.path / name
                if source.is_file():
                    shutil.copyfile(source, scratch / name)
            _write_weights(origin, artifact, scratch, threads)
            publish(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_weights(origin: Checkpoint, artifact: DeltaArtifact, folder: Path, workers: int) -> None:
    aliases = {n: str(artifact.record(n).tied_to) for n in artifact.names if artifact.record(n).tied_to}
    planned = {name: _planned(artifact.record(name)) for name in names_in_order(artifact.names, aliases)}
    stored = [name for name in artifact.names if name not in aliases]
    for name in stored:
        if (record := artifact.record(name)).base_name is not None:
            base_tensor(origin, artifact, record, name)  # before room on disk is taken for a shape that is made up
    with ModelWriter(folder, planned) as writer:

        def write(name: str) -> str:
            # An alias is written as the fine-tune had it: a model whose configuration does not tie would miss it.
            copies = [name, *(alias for alias, of in aliases.items() if of == name)]
            record = artifact.record(name)
            leaf, at = begin_leaf(name, record.dtype, record.shape), 0
            for data in merged_bytes(origin, artifact, name):
                leaf.update(data)
                for copy in copies:
                    writer.write(copy, at, data)
                at += len(data)
            return leaf.hexdigest()

        def cost(name: str) -> int:
            return BLOCK_BYTES if _in_blocks(origin, artifact.record(name)) else 4 * planned[name].nbytes

        found = dict(zip(stored, map_in_order(write, stored, cost=cost, workers=workers), strict=True))
    promised = artifact.manifest.reconstruction.leaves
    wrong = [name for name in stored if found[name] != promised.get(name)]
    if artifact.manifest.exact and wrong:
        raise ArtifactError(f"{artifact.path}: tensor '{wrong[0]}' does not decode to what the artifact promises.")


def _planned(record: TensorRecord) -> Planned:
    return Planned(record.dtype, record.shape, math.prod(record.shape) * DTYPES[record.dtype].itemsize)


def _in_blocks(base: Checkpoint, record: TensorRecord) -> bool:
    """Whether a tensor can be put together block by block: the base as it is, or planes of signs on top of it."""
    origin = record.base_name
    if origin is None or not base.stored(origin) or record.transposed:
        return False
    if not record.terms:
        return True
    return len(record.terms) == 1 and record.terms[0].layout == "signs" and record.terms[0].slice is None


def merged_bytes(base: Checkpoint, delta: DeltaArtifact, name: str) -> Iterator[memoryview]:
    """The bytes of one fine-tuned tensor as the artifact gives it back, in blocks; the base is checked on the way.

    Raises:
        BaseMismatchError: the tensor of the base is not the one the delta was made from; raised at the latest after the
            last block, so nothing may be believed before the end.
    """
    record = delta.record(name)
    dtype = DTYPES[record.dtype]
    if not _in_blocks(base, record) or record.base_name is None:
        origin = check_base(base, delta, name, record)
        yield as_bytes(reconstruct(record, delta.terms(name), origin, delta.added_rows(name), dtype))
        return
    info = base_tensor(base, delta, record, name)
    terms, shared = delta.terms(name), record.shape[0] - record.added_rows if record.shape else 1
    leaf = begin_leaf(info.name, info.st_dtype, info.shape)
    for rows, block in base.blocks(info.name, BLOCK_BYTES):
        leaf.update(as_bytes(block))
        kept = block[: max(0, shared - rows.start)] if record.shape else block
        if len(record.shape) == 0 or len(kept):
            within = slice(rows.start, rows.start + len(kept)) if record.shape else rows
            yield as_bytes(merge_block(terms, kept, within, dtype) if terms else kept.to(dtype))
    if leaf.hexdigest() != delta.manifest.base.leaves.get(info.name):
        raise mismatch(base, delta, info.name)
    added = delta.added_rows(name)
    if added is not None:
        yield as_bytes(added.to(dtype))
