"""The manifest of an artifact, `delta_config.json`: typed, versioned, and read as the untrusted input it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from deltakeeper.errors import ArtifactError
from deltakeeper.safetensors_header import DTYPES

FORMAT = "deltakeeper-delta"
VERSION = "1.0"
MAX_BYTES = 64 << 20
MAX_ELEMENTS = 1 << 40
ENCODINGS = ("terms", "unchanged", "tied")
ROLES = ("embedding", "head", "norm", "bias", "linear", "other")

Encoding = Literal["terms", "unchanged", "tied"]


@dataclass(frozen=True)
class TermRecord:
    """One packed term: its layout, that layout's settings, and the expert it belongs to in a 3-D tensor."""

    layout: str
    settings: dict[str, Any]
    slice: int | None = None


@dataclass(frozen=True)
class TensorRecord:
    """How one tensor of the fine-tune is stored.

    Attributes:
        shape: shape of the fine-tuned tensor.
        dtype: its dtype, as safetensors spells it.
        role: what it is for.
        encoding: `terms` (packed), `unchanged` (the base's), or `tied` (another name of `tied_to`).
        base_name: the base's tensor, or None if the fine-tune brought this one.
        base_shape: shape of that tensor.
        transposed: whether it is stored `(in, out)`; terms are always `(out, in)`.
        terms: packed terms; their sum is the delta over the rows that base and fine-tune share.
        added_rows: rows that the fine-tune added at the end, stored as they are.
        tied_to: the tensor that this one is an alias of.
        stored_bytes: payload bytes.
        sha256: hash over the payload, None where there is none.
    """

    shape: tuple[int, ...]
    dtype: str
    role: str
    encoding: Encoding
    base_name: str | None = None
    base_shape: tuple[int, ...] | None = None
    transposed: bool = False
    terms: tuple[TermRecord, ...] = ()
    added_rows: int = 0
    tied_to: str | None = None
    stored_bytes: int = 0
    sha256: str | None = None

    def term_shape(self, term: TermRecord) -> tuple[int, ...]:
        """Dense shape of one term."""
        if term.layout == "dense" and term.settings.get("encoding") == "value":
            return self.shape
        rows = self.shape[0] - self.added_rows
        if term.slice is not None:
            return self.shape[1:]
        shape = (rows, *self.shape[1:])
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Source:
    """A model that an artifact speaks of: its name, revision, and fingerprint."""

    name_or_path: str
    revision: str | None
    root: str
    leaves: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything in `delta_config.json`."""

    created_by: str
    codec: str
    base: Source
    target: Source
    reconstruction: Source
    exact: bool
    tensors: dict[str, TensorRecord]
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        return {"format": FORMAT, "format_version": VERSION, **asdict(self)}

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Manifest:
        """Read a manifest from untrusted bytes.

        Unknown keys are ignored within the major version that is known.

        Raises:
            ArtifactError: it is not JSON, of another format or major version, or a field is malformed.
        """
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where} is not JSON; get the artifact again.") from error
        read = _Reader(value, where)
        if read.value.get("format") != FORMAT:
            raise ArtifactError(f"{where} is not the manifest of a deltakeeper artifact; give an artifact's folder.")
        version = read.text("format_version")
        if version.split(".")[0] != VERSION.split(".")[0]:
            raise ArtifactError(
                f"{where} has format version {version!r} and this deltakeeper reads {VERSION}; use a newer release."
            )
        tensors = read.object("tensors")
        if not tensors.value:
            raise ArtifactError(f"{where} lists no tensors; get the artifact again.")
        return cls(
            created_by=read.text("created_by"),
            codec=read.text("codec"),
            base=_source(read.object("base"), leaves=True),
            target=_source(read.object("target")),
            reconstruction=_source(read.object("reconstruction"), leaves=True),
            exact=read.flag("exact"),
            tensors={name: _tensor(tensors.object(name)) for name in tensors.value},
            missing=tuple(read.texts("missing")),
        )


class _Reader:
    """One JSON object being read, with the path to it for error sentences."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise ArtifactError(f"{where} is not an object; get the artifact again.")
        self.value, self.where = value, where

    def fail(self, name: str, wanted: str) -> ArtifactError:
        return ArtifactError(f"{self.where}: '{name}' must be {wanted}; get the artifact again.")

    def text(self, name: str) -> str:
        found = self.value.get(name)
        if not isinstance(found, str):
            raise self.fail(name, "a text")
        return found

    def optional_text(self, name: str) -> str | None:
        return None if self.value.get(name) is None else self.text(name)

    def texts(self, name: str) -> list[str]:
        found = self.value.get(name, [])
        if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
            raise self.fail(name, "a list of texts")
        return found

    def flag(self, name: str) -> bool:
        found = self.value.get(name, False)
        if not isinstance(found, bool):
            raise self.fail(name, "true or false")
        return found

    def count(self, name: str) -> int:
        found = self.value.get(name, 0)
        if not _is_count(found):
            raise self.fail(name, "a whole number")
        return int(found)

    def choice(self, name: str, known: tuple[str, ...] | dict[str, Any]) -> str:
        found = self.value.get(name)
        if not isinstance(found, str) or found not in known:
            raise self.fail(name, f"one of {', '.join(known)}")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        found = self.value.get(name)
        if not isinstance(found, list) or len(found) > 8 or not all(map(_is_count, found)):
            raise self.fail(name, "a list of whole numbers")
        if math.prod(found) > MAX_ELEMENTS:
            raise self.fail(name, f"a shape of at most {MAX_ELEMENTS} entries")
        return tuple(found)

    def object(self, name: str) -> _Reader:
        return _Reader(self.value.get(name), f"{self.where}: '{name}'")

    def objects(self, name: str) -> list[_Reader]:
        found = self.value.get(name, [])
        if not isinstance(found, list):
            raise self.fail(name, "a list")
        return [_Reader(item, f"{self.where}: '{name}[{i}]'") for i, item in enumerate(found)]

    def hash(self, name: str) -> str:
        found = self.text(name)
        if not _is_hash(found):
            raise self.fail(name, "a SHA-256 in hex")
        return found


def _source(read: _Reader, leaves: bool = False) -> Source:
    found = read.value.get("leaves", {})
    if not isinstance(found, Mapping) or not all(isinstance(v, str) and _is_hash(v) for v in found.values()):
        raise read.fail("leaves", "hashes by tensor name")
    return Source(
        read.text("name_or_path"), read.optional_text("revision"), read.hash("root"), dict(found) if leaves else {}
    )


def _tensor(read: _Reader) -> TensorRecord:
    shape = read.shape("shape")
    record = TensorRecord(
        shape=shape,
        dtype=read.choice("dtype", DTYPES),
        role=read.choice("role", ROLES),
        encoding=read.choice("encoding", ENCODINGS),  # type: ignore[arg-type]
        base_name=read.optional_text("base_name"),
        base_shape=None if read.value.get("base_shape") is None else read.shape("base_shape"),
        transposed=read.flag("transposed"),
        terms=tuple(_term(item) for item in read.objects("terms")),
        added_rows=read.count("added_rows"),
        tied_to=read.optional_text("tied_to"),
        stored_bytes=read.count("stored_bytes"),
        sha256=None if read.value.get("sha256") is None else read.hash("sha256"),
    )
    _check_consistent(record, read)
    return record


def _check_consistent(record: TensorRecord, read: _Reader) -> None:
    if (record.encoding == "terms") != bool(record.terms):
        raise read.fail("terms", "given for the encoding 'terms', and for no other")
    if (record.encoding == "tied") != (record.tied_to is not None):
        raise read.fail("tied_to", "given for the encoding 'tied', and for no other")
    if record.transposed and len(record.shape) != 2:
        raise read.fail("transposed", "false for a tensor that is no matrix")
    if record.added_rows and (not record.shape or record.added_rows >= record.shape[0]):
        raise read.fail("added_rows", "fewer than the rows of the tensor")
    replaced = [t.layout == "dense" and t.settings.get("encoding") == "value" for t in record.terms]
    if any(replaced) and len(replaced) != 1:
        raise read.fail("terms", "one term alone where a value is stored")
    if not any(replaced) and record.encoding != "tied":
        rows = None if record.base_shape is None else record.base_shape[:1]
        shared = (record.shape[0] - record.added_rows,) if record.shape else ()
        if record.base_name is None or record.base_shape is None or record.base_shape[1:] != record.shape[1:]:
            raise read.fail("base_shape", "the shape of a base tensor that fits")
        if rows is not None and rows and rows < shared:
            raise read.fail("base_shape", "of at least the rows that are shared")
    for term in record.terms:
        if (term.slice is not None) != (len(record.shape) == 3 and not replaced[0]):
            raise read.fail("terms", "by slice for a tensor of three dimensions, and for no other")
        if term.slice is not None and term.slice >= record.shape[0]:
            raise read.fail("terms", "of slices that the tensor has")


def _term(read: _Reader) -> TermRecord:
    settings = read.value.get("settings", {})
    if not isinstance(settings, dict):
        raise read.fail("settings", "an object")
    found = read.value.get("slice")
    if found is not None and not _is_count(found):
        raise read.fail("slice", "a whole number")
    return TermRecord(read.text("layout"), settings, found)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ELEMENTS


def _is_hash(value: str) -> bool:
    return len(value) == 64 and all(c in "0123456789abcdef" for c in value)
