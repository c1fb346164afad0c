"""Bytes of an artifact that are not payload: header, manifest and report, found by writing the planned ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from deltakeeper.artifact import COUNTED_SIDE_FILES, added_rows_key, payload_key
from deltakeeper.codecs import Codec, spell
from deltakeeper.delta import DeltaPair
from deltakeeper.fidelity import Fidelity
from deltakeeper.layouts import LAYOUTS
from deltakeeper.layouts.base import TensorSpec
from deltakeeper.layouts.settings import dtype_name
from deltakeeper.manifest import Manifest, Source, TensorRecord, TermRecord
from deltakeeper.payload import shard_name
from deltakeeper.payload_writer import HEADER_ROOM, PADDING_SHARE, SHARD_BYTES
from deltakeeper.plan import Choice, in_order
from deltakeeper.safetensors_header import DTYPE_NAMES, DTYPES

HASH = "0" * 64
OPENING = '{"__metadata__":{"format":"pt"}'
LONGEST = Fidelity(*[0.12345678901234567] * 6)
"""Figures as long as they are written; the average is a little shorter."""


@dataclass(frozen=True)
class Stored:
    """How one tensor would lie in the artifact; `zeros` says whether its delta has entries that did not change."""

    record: TensorRecord
    specs: Mapping[str, TensorSpec]
    zeros: bool = True

    @property
    def payload(self) -> int:
        """Payload bytes."""
        return sum(nbytes(spec) for spec in self.specs.values())

    def text(self, name: str, offset: int) -> int:
        """Bytes that the tensor takes in manifest, report and header, if its payload lies about `offset`."""
        manifest = _entry(name, asdict(self.record))
        report = _entry(name, _report(self))
        header = sum(len(_header_entry(key, spec, offset)) + 1 for key, spec in self.specs.items())
        return manifest + report + header


def stored(
    pair: DeltaPair,
    name: str,
    codec: Codec,
    choice: Choice,
    terms: tuple[TermRecord, ...] = (),
    *,
    same: bool = False,
    zeros: bool = True,
) -> Stored:
    """The record of a tensor and what its payload will be.

    Args:
        pair: base and fine-tune.
        name: the tensor.
        codec: codec of the artifact; another one is recorded with the tensor.
        choice: what is done with it.
        terms: planned terms, of a choice of `terms`.
        same: whether base and fine-tune have the same bytes there, so that nothing is stored.
        zeros: whether some entries of its delta are zero.
    """
    info, base_name = pair.tuned.tensors[name], pair.base_name(name)
    base_shape = None if base_name is None else pair.base.tensors[base_name].shape
    kept = same or choice.treatment in ("base", "tied")
    value = not kept and choice.treatment == "value"
    if value:
        terms = (TermRecord("dense", {"encoding": "value", "dtype": dtype_name(info.dtype)}),)
    whole = bool(terms) and terms[0].settings.get("encoding") == "value"
    delta = not kept and not whole
    rows = 0 if base_shape is None or not delta else max(0, info.shape[0] - base_shape[0])
    own = None if choice.codec is None or same or choice.codec == codec else spell(choice.codec)
    record = TensorRecord(
        shape=info.shape,
        dtype=info.st_dtype,
        role=pair.role(name),
        encoding="tied" if choice.treatment == "tied" else "unchanged" if same else "base" if kept else "terms",
        base_name=base_name,
        base_shape=base_shape,
        transposed=pair.transposed(name) and choice.treatment != "tied",
        terms=() if kept else terms,
        added_rows=rows,
        tied_to=pair.tied.get(name),
        sha256=None if kept else HASH,
        codec=own,
    )
    specs = {
        payload_key(name, i, suffix): spec
        for i, term in enumerate(record.terms)
        for suffix, spec in LAYOUTS[term.layout].expect(record.term_shape(term), term.settings).items()
    }
    if rows:
        specs[added_rows_key(name)] = TensorSpec(DTYPES[record.dtype], (rows, *info.shape[1:]))
    result = Stored(record, specs)
    return Stored(replace(record, stored_bytes=result.payload), specs, zeros)


def total_bytes(pair: DeltaPair, codec: Codec, tensors: Mapping[str, Stored]) -> int:
    """Bytes of the artifact with these tensors, as `DeltaArtifact.nbytes` counts them."""
    return _payload_files(tensors) + _manifest(pair, codec, tensors) + _report_bytes(codec, tensors) + _side(pair)


def _payload_files(tensors: Mapping[str, Stored]) -> int:
    """Payload and headers, cut into shards as `PayloadWriter` cuts them."""
    total = size = 0
    text, shards, opening = len(OPENING) + 1, 1, len(OPENING) + 1
    index: list[str] = []
    for name in in_order(tensors):
        specs = tensors[name].specs
        room = sum(len(_header_entry(key, spec, 10**18)) + 1 for key, spec in specs.items())
        if size and (size + tensors[name].payload > SHARD_BYTES or text + room > HEADER_ROOM):
            total, size, text, shards = total + _file_bytes(size, text), 0, opening, shards + 1
        for key, spec in specs.items():
            text += len(_header_entry(key, spec, size)) + 1
            size += nbytes(spec)
            index.append(key)
    total += _file_bytes(size, text)
    if shards > 1:
        mapping = dict.fromkeys(index, shard_name(1, shards))
        total += len(json.dumps({"metadata": {"total_size": total}, "weight_map": mapping}, indent=1)) + 1
    return total


def _file_bytes(size: int, text: int) -> int:
    """One safetensors file: the room kept for the header stays where it is a small share of the file."""
    header, room = text + -text % 8, max(HEADER_ROOM, text + 8)
    return 8 + size + (header if (room - header) * PADDING_SHARE > size else room)


def nbytes(spec: TensorSpec) -> int:
    """Bytes of one payload tensor."""
    return math.prod(spec.shape) * spec.dtype.itemsize


def _manifest(pair: DeltaPair, codec: Codec, tensors: Mapping[str, Stored]) -> int:
    used = {pair.base_name(name) for name in tensors} | set(pair.missing)
    leaves = dict.fromkeys((name for name in used if name is not None), HASH)
    kept = dict.fromkeys((name for name, item in tensors.items() if item.record.encoding != "tied"), HASH)
    manifest = Manifest(
        created_by=f"deltakeeper {version('deltakeeper')}",
        codec=spell(codec),
        base=Source(pair.base.name_or_path, pair.base.revision, HASH, leaves),
        target=Source(pair.tuned.name_or_path, pair.tuned.revision, HASH),
        reconstruction=Source(pair.tuned.name_or_path, None, HASH, kept),
        exact=False,
        tensors={name: item.record for name, item in tensors.items()},
        missing=tuple(pair.missing),
    )
    return len(json.dumps(manifest.to_json(), indent=1, sort_keys=True)) + 1


def _report_bytes(codec: Codec, tensors: Mapping[str, Stored]) -> int:
    report = {
        "codec": spell(codec),
        "seconds": 12345.678,
        "peak_rss": 10**11,
        "total": asdict(LONGEST),
        "tensors": {name: _report(item) for name, item in tensors.items()},
    }
    return len(json.dumps(report, indent=1, sort_keys=True)) + 1


def _report(item: Stored) -> dict[str, Any]:
    record = item.record
    whole = bool(record.terms) and record.terms[0].settings.get("encoding") == "value"
    figures = LONGEST if item.zeros else replace(LONGEST, zero_fraction=0.0)
    fidelity = asdict(figures) if record.terms and not whole else None
    return {"encoding": record.encoding, "stored_bytes": record.stored_bytes, "fidelity": fidelity}


def _side(pair: DeltaPair) -> int:
    """Configuration files of the fine-tune that the artifact carries, since they differ from the base's."""
    size = 0
    for name in COUNTED_SIDE_FILES:
        ours, theirs = pair.base.path / name, pair.tuned.path / name
        if theirs.is_file() and (not ours.is_file() or ours.read_bytes() != theirs.read_bytes()):
            size += theirs.stat().st_size
    return size


def _entry(name: str, value: dict[str, Any]) -> int:
    """Bytes of one more entry of an object that stands in another one, as indented JSON with sorted keys."""
    empty = json.dumps({"tensors": {"": 0}}, indent=1)
    return len(json.dumps({"tensors": {"": 0, name: value}}, indent=1)) - len(empty)


def _header_entry(key: str, spec: TensorSpec, offset: int) -> str:
    offsets = [offset, offset + nbytes(spec)]
    entry = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    return json.dumps({key: entry}, separators=(",", ":"))[1:-1]
