"""The manifest of an artifact, `delta_config.json`: typed, versioned, and read as the untrusted input it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from deltakeeper.errors import ArtifactError
from deltakeeper.fingerprint import root_of
from deltakeeper.manifest_fields import FieldReader, is_count, is_hash, parse_json
from deltakeeper.safetensors_header import DTYPES, is_name

FORMAT = "deltakeeper-delta"
VERSION = "1.1"
MAX_BYTES = 64 << 20
INEXACT = "lowrank"
"""The one layout that machines may decode to bytes of their own, within the bound of the specification."""
ENCODINGS = ("terms", "unchanged", "base", "tied")
ROLES = ("embedding", "head", "norm", "bias", "linear", "other")

Encoding = Literal["terms", "unchanged", "base", "tied"]


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
        encoding: `terms` (packed), `unchanged` (the base's), `base` (taken from the base although the fine-tune
            differs, as the options asked), or `tied` (another name of `tied_to`).
        base_name: the base's tensor, or None if the fine-tune brought this one.
        base_shape: shape of that tensor.
        transposed: whether it is stored `(in, out)`; terms are always `(out, in)`.
        terms: packed terms; their sum is the delta over the rows that base and fine-tune share.
        added_rows: rows that the fine-tune added at the end, stored as they are.
        tied_to: the tensor that this one is an alias of.
        stored_bytes: payload bytes.
        sha256: hash over the payload, None where there is none.
        codec: spelling of the codec of this tensor where it is not the artifact's.
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
    codec: str | None = None

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
            ArtifactError: it is not JSON, of another format or major version, or a field is malformed or at odds with
                another.
        """
        read = FieldReader(parse_json(raw, where), where)
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
        if odd := [name for name in tensors.value if not is_name(name)]:
            raise ArtifactError(f"{where} has a tensor name that is no printable text, {odd[0][:80]!r}; get it again.")
        found = cls(
            created_by=read.text("created_by"),
            codec=read.text("codec"),
            base=_source(read.object("base"), leaves=True),
            target=_source(read.object("target")),
            reconstruction=_source(read.object("reconstruction"), leaves=True),
            exact=read.flag("exact"),
            tensors={name: _tensor(tensors.object(name)) for name in tensors.value},
            missing=tuple(read.texts("missing")),
        )
        _check_whole(found, read, tensors)
        return found


def _source(read: FieldReader, leaves: bool = False) -> Source:
    found = read.value.get("leaves", {})
    if not isinstance(found, Mapping) or not all(isinstance(v, str) and is_hash(v) for v in found.values()):
        raise read.fail("leaves", "hashes by tensor name")
    name = "".join(c if c.isprintable() else "?" for c in read.text("name_or_path"))  # errors quote it
    source = Source(name, read.optional_text("revision"), read.hash("root"), dict(found) if leaves else {})
    if leaves and root_of(source.leaves) != source.root:
        raise read.fail("root", "the root over its leaves")
    return source


def _tensor(read: FieldReader) -> TensorRecord:
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
        codec=read.optional_text("codec"),
    )
    _check_consistent(record, read)
    return record


def _check_consistent(record: TensorRecord, read: FieldReader) -> None:
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
    delta = record.encoding == "terms" and not any(replaced)
    if record.added_rows and not delta:
        raise read.fail("added_rows", "0 where no delta is stored")
    if delta or record.encoding in ("unchanged", "base"):
        _check_base_shape(record, read, delta and len(record.shape) != 3)
    for term in record.terms:
        if (term.slice is not None) != (len(record.shape) == 3 and delta):
            raise read.fail("terms", "by slice for a tensor of three dimensions, and for no other")
        if term.slice is not None and term.slice >= record.shape[0]:
            raise read.fail("terms", "of slices that the tensor has")
    if delta and len(record.shape) == 3 and len({term.slice for term in record.terms}) != record.shape[0]:
        raise read.fail("terms", "given for every slice")


def _check_base_shape(record: TensorRecord, read: FieldReader, resizable: bool) -> None:
    shape, base = record.shape, record.base_shape
    if record.base_name is None or base is None or base[1:] != shape[1:] or len(base) != len(shape):
        raise read.fail("base_shape", "the shape of a base tensor that fits")
    if shape and record.added_rows != max(0, shape[0] - base[0]):
        raise read.fail("added_rows", "the rows that the base lacks")
    if base != shape and not resizable:
        raise read.fail("base_shape", "the shape of the tensor itself")


def _check_whole(found: Manifest, read: FieldReader, tensors: FieldReader) -> None:
    """Every tensor has its hashes, every alias its tensor, and nothing but matrix products excuses other bytes."""
    if found.exact == any(term.layout == INEXACT for record in found.tensors.values() for term in record.terms):
        raise read.fail("exact", f"false where a term is '{INEXACT}', and true elsewhere")
    stored = {name for name, record in found.tensors.items() if record.encoding != "tied"}
    if set(found.reconstruction.leaves) != stored:
        raise read.object("reconstruction").fail("leaves", "given for every stored tensor, and for no other")
    for name, record in found.tensors.items():
        if record.base_name is not None and record.base_name not in found.base.leaves:
            raise tensors.object(name).fail("base_name", "a tensor that the base has a hash for")
        if record.tied_to is not None:
            other = found.tensors.get(record.tied_to)
            if (
                other is None
                or record.tied_to not in stored
                or (other.shape, other.dtype) != (record.shape, record.dtype)
            ):
                raise tensors.object(name).fail("tied_to", "a stored tensor of the same shape and dtype")


def _term(read: FieldReader) -> TermRecord:
    settings = read.value.get("settings", {})
    if not isinstance(settings, dict):
        raise read.fail("settings", "an object")
    found = read.value.get("slice")
    if found is not None and not is_count(found):
        raise read.fail("slice", "a whole number")
    return TermRecord(read.text("layout"), settings, found)
