"""Compress a fine-tune into an artifact, tensor by tensor, in memory of a few times the largest tensor."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from deltakeeper.artifact import REPORT_NAME, SIDE_FILES, open_artifact
from deltakeeper.artifact_writer import ArtifactWriter, as_bytes
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.codecs import Codec, parse_codec, spell
from deltakeeper.delta import DeltaPair, TensorDelta, pair
from deltakeeper.errors import CodecError, RunError
from deltakeeper.fidelity import Fidelity, Sums, compare, summarise
from deltakeeper.fingerprint import leaf_hash, root_of
from deltakeeper.layouts import Layout
from deltakeeper.layouts.dense import Dense
from deltakeeper.manifest import Manifest, Source, TensorRecord
from deltakeeper.plan import treat
from deltakeeper.reconstruct import dense_delta, reconstruct

Progress = Callable[[int, int, str], None]
"""Called before each tensor with (tensors done, tensors in all, name of the next)."""

HASHERS = 2
"""Threads that hash while the main thread encodes."""

INEXACT = ("lowrank",)
"""Layouts that decode through a matrix product, whose order of summation differs between machines."""


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a compression."""

    encoding: str
    stored_bytes: int
    fidelity: Fidelity | None


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    `nbytes` counts every file of the artifact but tokenizer files and model card; `full_bytes` is the fine-tune in its
    own dtypes; `total` is over all packed tensors; `seconds` is wall time; `peak_rss` is the most memory in bytes that
    the process had held by the end, None in reports of releases that did not record it.
    """

    codec: str
    nbytes: int
    full_bytes: int
    bits_per_weight: float
    seconds: float
    total: Fidelity
    tensors: dict[str, TensorReport]
    peak_rss: int | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller the artifact is than the fine-tune."""
        return self.full_bytes / self.nbytes

    @classmethod
    def load(cls, folder: Path) -> CompressionReport:
        """Read the report that a compression left in its artifact; sizes are taken from the files."""
        try:
            value = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
            tensors = {name: _tensor_report(item) for name, item in value["tensors"].items()}
            total, codec, seconds = Fidelity(**value["total"]), str(value["codec"]), float(value["seconds"])
            peak = None if value.get("peak_rss") is None else int(value["peak_rss"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder / REPORT_NAME} cannot be read ({error}); compress again.") from error
        delta = open_artifact(folder)
        return cls(codec, delta.nbytes, delta.full_bytes, delta.bits_per_weight, seconds, total, tensors, peak)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {**asdict(self), "ratio": self.ratio}


def compress(
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path,
    out: str | Path,
    codec: Codec | str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress the difference between two models into the artifact folder `out`.

    Args:
        base: the base model, opened or by name.
        tuned: its fine-tune, opened or by name; a LoRA adapter folder will do.
        out: folder to write; nothing is left there if anything fails.
        codec: a codec or its spelling, such as `bitdelta:bits=2` or `bitdelta+svd:rank=8`.
        overwrite: replace an artifact that is there.
        progress: called before each tensor.

    Raises:
        CheckpointError: a model cannot be read, or the two do not belong together.
        CodecError: a setting of the codec does not fit, or a difference is not finite.
        ArtifactError: `out` exists and may not be replaced.
    """
    started = time.monotonic()
    method = parse_codec(codec) if isinstance(codec, str) else codec
    with (
        _leave_cores(HASHERS),
        opened(base) as origin,
        opened(tuned, base=origin) as target,
        ArtifactWriter(Path(out), overwrite, (origin.path, target.path)) as writer,
        ThreadPoolExecutor(HASHERS) as pool,
    ):
        models = pair(origin, target)
        run = _Run(models, method, writer, pool)
        for i, name in enumerate(models.names()):
            if progress:
                progress(i, len(models.names()), name)
            run.add(name)
            run.wait_for_hashes(name)
        manifest = run.manifest(origin, target, spell(method))
        for file in _side_files(origin.path, target.path):
            writer.copy(file)
        report = {
            "codec": spell(method),
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss": _peak_rss(),
            "total": asdict(run.total()),
            "tensors": {name: asdict(item) for name, item in run.reports.items()},
        }
        writer.write_text(REPORT_NAME, json.dumps(report, indent=1, sort_keys=True) + "\n")
        writer.finish(manifest)
    return CompressionReport.load(Path(out))


class _Run:
    """One compression under way: records, sums and hashes as they come."""

    def __init__(self, models: DeltaPair, codec: Codec, writer: ArtifactWriter, pool: ThreadPoolExecutor) -> None:
        self.models, self.codec, self.writer, self.pool = models, codec, writer, pool
        self.records: dict[str, TensorRecord] = {}
        self.reports: dict[str, TensorReport] = {}
        self.sums: list[Sums] = []
        self.exact = True
        self._waiting: list[Future[str]] = []
        self._base_leaves: dict[str, Future[str]] = {}
        self._target_leaves: dict[str, Future[str]] = {}
        self._decoded_leaves: dict[str, Future[str]] = {}

    def add(self, name: str) -> None:
        """Encode one tensor, write it, and hash what went in and what will come out."""
        models = self.models
        delta = models.tensor(name)
        info = models.tuned.tensors[name]
        base_name = models.base_name(name)
        treatment = treat(models, delta)
        value = delta.tuned.to(info.dtype)
        self._hash_sources(delta, value, base_name)
        shared = TensorRecord(
            shape=info.shape,
            dtype=info.st_dtype,
            role=delta.role,
            encoding="tied" if treatment == "tied" else "unchanged" if treatment == "unchanged" else "terms",
            base_name=base_name,
            base_shape=None if delta.base is None else tuple(delta.base.shape),
            transposed=delta.transposed and treatment != "tied",
            tied_to=models.tied.get(name),
        )
        if treatment == "tied":
            self._store(name, shared)
            return
        if treatment == "unchanged":
            self._decoded_leaves[name] = self._target_leaves[name]
            self._store(name, shared)
            return
        if not torch.isfinite(value.sum(dtype=torch.float32)):
            raise CodecError(f"tensor '{name}' of {models.tuned.name_or_path} is not finite; the fine-tune is broken.")
        self._pack(name, shared, delta, value, treatment == "terms")

    def _pack(self, name: str, record: TensorRecord, delta: TensorDelta, value: torch.Tensor, encode: bool) -> None:
        true = delta.matrix() if encode else None
        terms: list[tuple[int | None, Layout]]
        if true is None:
            terms = [(None, Dense(record.shape, "value", value.contiguous()))]
        else:
            terms = _encode(self.codec, true, name, value)
        packed = [term for _, term in terms]
        replaced = packed[0].replaces
        added = None if replaced or record.base_name is None else delta.added_rows()
        added = None if added is None else added.to(self.models.tuned.tensors[name].dtype).contiguous()
        records, nbytes, digest = self.writer.add(name, terms, added)
        record = TensorRecord(
            **{
                **record.__dict__,
                "terms": records,
                "added_rows": 0 if added is None else len(added),
                "stored_bytes": nbytes,
                "sha256": digest,
            }
        )
        self.exact = self.exact and not any(term.name in INEXACT for term in packed)
        dtype = self.models.tuned.tensors[name].dtype
        figures = None
        if true is not None and not replaced:
            decoded = dense_delta(record, packed)
            oriented = decoded.T if record.transposed else decoded
            sums = compare(true, oriented.contiguous())
            figures = summarise([sums])
            self.sums.append(sums)
            base = delta.base
            if base is None or not math.isfinite(sums.decoded_square):
                raise CodecError(f"the codec gave values for '{name}' that are not finite; choose another setting.")
            del true, oriented  # the largest tensors: free them before the next one is made
            result = decoded.add_(base[: len(decoded)]).to(dtype)
            result = result if added is None else torch.cat([result, added])
        else:
            result = reconstruct(record, packed, delta.base, added, dtype)
            if true is not None:
                self.sums.append(compare(true, true))
        self._decoded_leaves[name] = self._hash(name, record, result)
        self._store(name, record, figures)

    def _store(self, name: str, record: TensorRecord, figures: Fidelity | None = None) -> None:
        self.records[name] = record
        self.reports[name] = TensorReport(record.encoding, record.stored_bytes, figures)

    def _hash(self, name: str, record: TensorRecord, tensor: torch.Tensor) -> Future[str]:
        raw = as_bytes(tensor)
        return self.pool.submit(leaf_hash, name, record.dtype, record.shape, raw)

    def _hash_sources(self, delta: TensorDelta, value: torch.Tensor, base_name: str | None) -> None:
        if delta.name not in self.models.tied:
            info = self.models.tuned.tensors[delta.name]
            raw = as_bytes(value)
            self._target_leaves[delta.name] = self.pool.submit(leaf_hash, delta.name, info.st_dtype, info.shape, raw)
        if base_name is not None and delta.base is not None:
            origin = self.models.base.tensors[base_name]
            raw = as_bytes(delta.base)
            self._base_leaves[base_name] = self.pool.submit(leaf_hash, base_name, origin.st_dtype, origin.shape, raw)

    def wait_for_hashes(self, name: str) -> None:
        """Wait for the hashes of the tensor before `name`, so that no queue of tensors builds up in memory."""
        pending = [leaves[name] for leaves in (self._target_leaves, self._decoded_leaves) if name in leaves]
        for future in self._waiting:
            future.result()
        self._waiting = pending

    def total(self) -> Fidelity:
        """Figures over all packed tensors."""
        return summarise(self.sums)

    def manifest(self, origin: Checkpoint, target: Checkpoint, codec: str) -> Manifest:
        """The manifest of what was added; every tensor of the fine-tune has a record by construction."""
        missed = set(target.tensors) - set(self.records)
        if missed:
            raise CodecError(f"tensor '{min(missed)}' was left out of the artifact; report this as a bug.")
        for name in self.models.missing:
            self._hash_base(name)
        base = {name: leaf.result() for name, leaf in self._base_leaves.items()}
        goal = {name: leaf.result() for name, leaf in self._target_leaves.items()}
        decoded = {name: leaf.result() for name, leaf in self._decoded_leaves.items()}
        return Manifest(
            created_by=f"deltakeeper {version('deltakeeper')}",
            codec=codec,
            base=Source(origin.name_or_path, origin.revision, root_of(base), base),
            target=Source(target.name_or_path, target.revision, root_of(goal)),
            reconstruction=Source(target.name_or_path, None, root_of(decoded), decoded),
            exact=self.exact,
            tensors=self.records,
            missing=tuple(self.models.missing),
        )

    def _hash_base(self, name: str) -> None:
        info = self.models.base.tensors[name]
        raw = self.models.base.raw(name)
        self._base_leaves[name] = self.pool.submit(leaf_hash, name, info.st_dtype, info.shape, raw)


@contextmanager
def _leave_cores(n: int) -> Iterator[None]:
    """Take `n` threads from torch for a while: OpenMP threads that wait for a core spin, and stall every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - n))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _encode(codec: Codec, matrix: torch.Tensor, name: str, value: torch.Tensor) -> list[tuple[int | None, Layout]]:
    """Terms of one tensor; a tensor of experts is encoded expert by expert, unless the codec stores its value."""
    if matrix.ndim == 2:
        return [(None, term) for term in codec.encode(matrix, name=name, tuned=value)]
    terms: list[tuple[int | None, Layout]] = []
    for i, part in enumerate(matrix):
        packed = codec.encode(part, name=f"{name}[{i}]", tuned=value)
        if packed[0].replaces:
            return [(None, packed[0])]
        terms += [(i, term) for term in packed]
    return terms


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def _side_files(base: Path, tuned: Path) -> list[Path]:
    """Files of the fine-tune that say what the weights do not, where they differ from the base's."""
    found = []
    for name in SIDE_FILES:
        ours, theirs = base / name, tuned / name
        if theirs.is_file() and (not ours.is_file() or ours.read_bytes() != theirs.read_bytes()):
            found.append(theirs)
    return found


def _tensor_report(value: dict[str, Any]) -> TensorReport:
    figures = value["fidelity"]
    return TensorReport(
        str(value["encoding"]), int(value["stored_bytes"]), None if figures is None else Fidelity(**figures)
    )
