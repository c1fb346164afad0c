"""Compress a fine-tune into an artifact: tensors side by side, each read, encoded, decoded again and hashed once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

from deltakeeper.artifact import REPORT_NAME, SIDE_FILES
from deltakeeper.artifact_writer import ArtifactWriter
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.codecs import Codec, parse_codec, spell
from deltakeeper.compression_report import CompressionReport, TensorReport, peak_memory
from deltakeeper.delta import DeltaPair, pair
from deltakeeper.encode import Encoded, encode_tensor, working_bytes
from deltakeeper.errors import CodecError
from deltakeeper.fidelity import Sums, summarise
from deltakeeper.fingerprint import hash_tensor, root_of
from deltakeeper.manifest import Manifest, Source, TensorRecord
from deltakeeper.plan import Choice, Rules
from deltakeeper.survey import survey_delta
from deltakeeper.workers import map_in_order, one_thread_each

__all__ = ["CompressionReport", "compress"]

V = TypeVar("V")
Progress = Callable[[int, int, str], None]
"""Called before each tensor with (tensors done, tensors in all, name of the next)."""


def compress(
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path,
    out: str | Path,
    codec: Codec | str,
    *,
    embeddings: str = "codec",
    norms: Literal["dense", "base"] = "dense",
    overwrite: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> CompressionReport:
    """Compress the difference between two models into the artifact folder `out`.

    Args:
        base: the base model, opened or by name.
        tuned: its fine-tune, opened or by name; a LoRA adapter folder will do.
        out: folder to write; nothing is left there if anything fails.
        codec: a codec or its spelling, such as `bitdelta:bits=2` or `bitdelta+svd:rank=8`.
        embeddings: how input embeddings and heads are stored: `codec` as other matrices, `dense` as the fine-tune has
            them, `base` as the base has them, or the spelling of a codec of their own.
        norms: how norms, biases and other vectors are stored: `dense` as the fine-tune has them, or `base`.
        overwrite: replace an artifact that is there.
        progress: called before each tensor.
        workers: tensors that are worked on side by side, torch's number of threads by default. The bytes of the payload
            do not depend on it.

    Raises:
        CheckpointError: a model cannot be read, or the two do not belong together.
        CodecError: a setting of the codec does not fit, or a difference is not finite.
        ArtifactError: `out` exists and may not be replaced.
    """
    started = time.monotonic()
    method = parse_codec(codec) if isinstance(codec, str) else codec
    rules = Rules(method, embeddings, norms)
    with (
        opened(base) as origin,
        opened(tuned, base=origin) as target,
        ArtifactWriter(Path(out), overwrite, (origin.path, target.path)) as writer,
        one_thread_each() as threads,
    ):
        models = pair(origin, target)
        choices = plan_tensors(models, rules)
        run = _Run(models, writer)
        count = workers or threads
        results = map_in_order(
            lambda name: encode_tensor(models, name, choices[name]),
            _read_ahead(models, choices),
            cost=lambda name: working_bytes(models, name, choices[name]),
            workers=count,
        )
        for i, name in enumerate(choices):
            if progress:
                progress(i, len(choices), name)
            run.store(name, next(results), choices[name], rules)
        manifest = run.manifest(spell(method))
        for file in _side_files(origin.path, target.path):
            writer.copy(file)
        report = {
            "codec": spell(method),
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss": peak_memory(),
            "total": asdict(summarise(run.sums)),
            "tensors": {name: asdict(item) for name, item in run.reports.items()},
        }
        writer.write_text(REPORT_NAME, json.dumps(report, indent=1, sort_keys=True) + "\n")
        writer.finish(manifest)
    return CompressionReport.load(Path(out))


def _read_ahead(models: DeltaPair, names: Iterable[str]) -> Iterator[str]:
    """The names, each announced to the disk when it is asked for, which is before its turn comes."""
    for name in names:
        models.tuned.read_ahead(name)
        if (origin := models.base_name(name)) is not None:
            models.base.read_ahead(origin)
        yield name


def plan_tensors(models: DeltaPair, rules: Rules) -> dict[str, Choice]:
    """What is done with each tensor of the fine-tune, in the order of its layers.

    Raises:
        CodecError: a tensor was to be taken from the base, which does not have it in this shape.
    """
    names = sorted(models.names(), key=_natural)
    choices = {name: rules.decide(models, name) for name in names}
    asked = {choice.codec for choice in choices.values() if choice.codec is not None and choice.codec.surveys}
    for codec in asked:
        chosen = [name for name, choice in choices.items() if choice.codec == codec]
        spread = codec.spread(survey_delta(models, chosen))
        choices |= {name: Choice("terms", spread[name]) for name in chosen}
    return choices


class _Run:
    """One compression under way: records, figures and hashes as they come."""

    def __init__(self, models: DeltaPair, writer: ArtifactWriter) -> None:
        self.models, self.writer = models, writer
        self.records: dict[str, TensorRecord] = {}
        self.reports: dict[str, TensorReport] = {}
        self.sums: list[Sums] = []
        self.exact = True
        self.base_leaves: dict[str, str] = {}
        self.target_leaves: dict[str, str] = {}
        self.decoded_leaves: dict[str, str] = {}

    def store(self, name: str, found: Encoded, choice: Choice, rules: Rules) -> None:
        """Write one tensor and keep what the manifest needs of it."""
        record = found.record
        if found.terms:
            records, nbytes, digest = self.writer.add(name, found.terms, found.added)
            own = choice.codec if choice.codec not in (None, rules.codec) else None
            record = replace(
                record,
                terms=records,
                added_rows=0 if found.added is None else len(found.added),
                stored_bytes=nbytes,
                sha256=digest,
                codec=None if own is None else spell(own),
            )
        self.exact = self.exact and found.exact
        self.records[name] = record
        figures = None if found.sums is None else summarise([found.sums])
        self.reports[name] = TensorReport(record.encoding, record.stored_bytes, figures)
        if found.sums is not None:
            self.sums.append(found.sums)
        for leaves, key, leaf in (
            (self.base_leaves, record.base_name or name, found.base_leaf),
            (self.target_leaves, name, found.target_leaf),
            (self.decoded_leaves, name, found.decoded_leaf),
        ):
            if leaf is not None:
                leaves[key] = leaf

    def manifest(self, codec: str) -> Manifest:
        """The manifest of what was stored; every tensor of the fine-tune has a record by construction."""
        origin, target = self.models.base, self.models.tuned
        missed = set(target.tensors) - set(self.records)
        if missed:
            raise CodecError(f"tensor '{min(missed)}' was left out of the artifact; report this as a bug.")
        self.base_leaves |= {name: hash_tensor(origin, name) for name in self.models.missing}
        return Manifest(
            created_by=f"deltakeeper {version('deltakeeper')}",
            codec=codec,
            base=Source(origin.name_or_path, origin.revision, root_of(self.base_leaves), _sorted(self.base_leaves)),
            target=Source(target.name_or_path, target.revision, root_of(self.target_leaves)),
            reconstruction=Source(
                target.name_or_path, None, root_of(self.decoded_leaves), _sorted(self.decoded_leaves)
            ),
            exact=self.exact,
            tensors=_sorted(self.records),
            missing=tuple(self.models.missing),
        )


def _sorted(values: Mapping[str, V]) -> dict[str, V]:
    return dict(sorted(values.items()))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _side_files(base: Path, tuned: Path) -> list[Path]:
    """Files of the fine-tune that say what the weights do not, where they differ from the base's."""
    found = []
    for name in SIDE_FILES:
        ours, theirs = base / name, tuned / name
        if theirs.is_file() and (not ours.is_file() or ours.read_bytes() != theirs.read_bytes()):
            found.append(theirs)
    return found
