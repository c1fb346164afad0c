"""Put a delta on its base: into a checkpoint on disk, or as changes for a live model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from deltakeeper.artifact import SIDE_FILES, DeltaArtifact, open_artifact
from deltakeeper.artifact_writer import as_bytes, publish, refuse_existing
from deltakeeper.attach import Change
from deltakeeper.checkpoint import INDEX, Checkpoint, opened
from deltakeeper.errors import ArtifactError, BaseMismatchError
from deltakeeper.fingerprint import leaf_hash, root_of
from deltakeeper.manifest import TensorRecord
from deltakeeper.reconstruct import dense_delta, reconstruct
from deltakeeper.safetensors_header import DTYPES

SHARD_BYTES = 5 * 10**9


def check_base(base: Checkpoint, delta: DeltaArtifact, name: str, record: TensorRecord) -> torch.Tensor | None:
    """Read the base's tensor for a record, after checking that it is the one the delta was made from.

    Raises:
        BaseMismatchError: the base lacks it, or its bytes differ.
        ArtifactError: the record states another shape than the base's tensor has.
    """
    origin = record.base_name
    if origin is None:
        return None
    if origin not in base.tensors:
        raise BaseMismatchError(
            f"{base.name_or_path} has no tensor '{origin}', so it is not the base of {delta.path}; "
            f"give {delta.manifest.base.name_or_path}."
        )
    info = base.tensors[origin]
    if leaf_hash(origin, info.st_dtype, info.shape, base.raw(origin)) != delta.manifest.base.leaves.get(origin):
        raise BaseMismatchError(
            f"tensor '{origin}' of {base.name_or_path} is not the one that {delta.path} was made from; "
            f"give the very base, {delta.manifest.base.name_or_path}."
        )
    if info.shape != record.base_shape:
        raise ArtifactError(f"{delta.path}: the base shape of tensor '{name}' is wrong; get the artifact again.")
    return base.read(origin)


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
        ArtifactError: the artifact is damaged, does not decode to what it promises, or `out` may not be replaced.
    """
    artifact = delta if isinstance(delta, DeltaArtifact) else open_artifact(delta)
    target = Path(out)
    with opened(base) as origin:
        refuse_existing(target, overwrite, "model", (origin.path, artifact.path))
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            for name in SIDE_FILES:
                source = artifact.path / name if (artifact.path / name).is_file() else origin.path / name
                if source.is_file():
                    shutil.copyfile(source, scratch / name)
            _write_weights(origin, artifact, scratch)
            publish(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_weights(origin: Checkpoint, artifact: DeltaArtifact, folder: Path) -> None:
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    size = 0
    leaves = {}
    for name, tensor in iterate_merged(origin, artifact):
        record = artifact.record(name)
        leaves[name] = leaf_hash(name, record.dtype, record.shape, as_bytes(tensor))
        # An alias is written as the fine-tune had it: a model whose configuration does not tie would miss it.
        aliases = [n for n in artifact.names if artifact.record(n).tied_to == name]
        if shard and size + tensor.nbytes * (1 + len(aliases)) > SHARD_BYTES:
            shards.append(_write_shard(shard, folder, len(shards)))
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        shard |= {alias: tensor.clone().contiguous() for alias in aliases}
        size += tensor.nbytes * (1 + len(aliases))
    shards.append(_write_shard(shard, folder, len(shards)))
    if artifact.manifest.exact and root_of(leaves) != artifact.manifest.reconstruction.root:
        wrong = min(n for n in leaves if leaves[n] != artifact.manifest.reconstruction.leaves.get(n))
        raise ArtifactError(f"{artifact.path}: tensor '{wrong}' does not decode to what the artifact promises.")
    _name_shards(shards, folder)


def _write_shard(shard: dict[str, torch.Tensor], folder: Path, number: int) -> list[str]:
    save_file(shard, folder / f"shard-{number}", metadata={"format": "pt"})
    return list(shard)


def _name_shards(shards: list[list[str]], folder: Path) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    mapping: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        mapping |= dict.fromkeys(names, file)
    total = sum((folder / file).stat().st_size for file in set(mapping.values()))
    index = {"metadata": {"total_size": total}, "weight_map": mapping}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
