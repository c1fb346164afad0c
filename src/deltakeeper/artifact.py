"""The artifact: a folder with a manifest and a payload, validated against each other before they are believed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from deltakeeper.errors import ArtifactError, DeltakeeperError
from deltakeeper.layouts import LAYOUTS, Layout
from deltakeeper.layouts.base import TensorSpec
from deltakeeper.manifest import MAX_BYTES, Manifest, TensorRecord
from deltakeeper.payload import PAYLOAD_NAME as PAYLOAD_NAME
from deltakeeper.payload import Payload
from deltakeeper.safetensors_header import DTYPES

MANIFEST_NAME = "delta_config.json"
REPORT_NAME = "delta_report.json"
CARD_NAME = "README.md"
STATEMENT_SUFFIX = ".attestation.json"
"""The statement of `deltas/support` is `deltas/support.attestation.json`: in the folder it would be an extra file."""
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files beside the weights that an artifact carries where the fine-tune's differ from the base's."""
COUNTED_SIDE_FILES = ("config.json", "generation_config.json")
"""Those of them that count as bytes of the artifact; the others are the tokenizer's, and are listed apart."""


def payload_key(name: str, term: int, suffix: str) -> str:
    """Key of one payload tensor: `<tensor>::<term>.<suffix>`; `::` cannot occur in checkpoint names."""
    return f"{name}::{term}.{suffix}"


def added_rows_key(name: str) -> str:
    """Key of the rows that the fine-tune added to a tensor."""
    return f"{name}::added_rows"


def hash_payload(parts: Mapping[str, bytes | bytearray | memoryview]) -> str:
    """SHA-256 over a tensor's payload: key, NUL, bytes, in the order of the keys."""
    digest = hashlib.sha256()
    for key in sorted(parts):
        digest.update(key.encode() + b"\0")
        digest.update(parts[key])
    return digest.hexdigest()


def hash_manifest(folder: Path) -> str | None:
    """SHA-256 of the manifest that lies in a folder now, as it is; None where there is none that can be read."""
    try:
        with (folder / MANIFEST_NAME).open("rb") as manifest:
            return hashlib.file_digest(manifest, "sha256").hexdigest()
    except OSError:
        return None


class DeltaArtifact:
    """An opened artifact: headers were checked against the manifest; tensors are read and hashed one by one.

    Attributes:
        path: the folder.
        manifest: what `delta_config.json` says.
        manifest_sha256: hash of the bytes that were read; the manifest hashes every payload.
        nbytes: bytes of all its files but the tokenizer's and the model card.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / MANIFEST_NAME
        if not file.is_file():
            raise ArtifactError(f"{path} holds no {MANIFEST_NAME}; give the folder of a delta artifact.")
        if file.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{file} is larger than {MAX_BYTES} bytes, which no manifest is; get it again.")
        raw = file.read_bytes()
        self.manifest = Manifest.parse(raw, str(file))
        self.manifest_sha256 = hashlib.sha256(raw).hexdigest()
        self._payload = Payload(path)
        self._check_payload()

    @property
    def names(self) -> list[str]:
        """Names of the fine-tune's tensors, sorted."""
        return sorted(self.manifest.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the folder, tokenizer files and model card left out."""
        return sum(self.file_sizes.values())

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of each file that counts, by its path in the folder."""
        apart = {CARD_NAME, *SIDE_FILES} - set(COUNTED_SIDE_FILES)
        counted = (file for file in self._files() if file.name not in apart)
        return {str(file.relative_to(self.path)): file.stat().st_size for file in counted}

    @property
    def side_bytes(self) -> int:
        """Bytes of the files that are listed apart: tokenizer and model card."""
        return sum(file.stat().st_size for file in self._files()) - self.nbytes

    @property
    def weights(self) -> int:
        """Number of weights of the whole fine-tune, aliases counted once."""
        records = (r for r in self.manifest.tensors.values() if r.encoding != "tied")
        return sum(math.prod(r.shape) for r in records)

    @property
    def full_bytes(self) -> int:
        """Bytes of the whole fine-tune in its own dtypes, aliases counted once."""
        records = (r for r in self.manifest.tensors.values() if r.encoding != "tied")
        return sum(math.prod(r.shape) * DTYPES[r.dtype].itemsize for r in records)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight of the whole fine-tune."""
        return 8 * self.nbytes / self.weights

    def record(self, name: str) -> TensorRecord:
        """How a tensor is stored; raises ArtifactError for a name it does not have."""
        if name not in self.manifest.tensors:
            raise ArtifactError(f"{self.path} has no tensor '{name}'; give the name of a tensor of this fine-tune.")
        return self.manifest.tensors[name]

    def terms(self, name: str) -> list[Layout]:
        """The packed terms of a tensor, its payload checked against the hash in the manifest.

        Raises:
            ArtifactError: the payload was altered, or a term breaks its layout's rules.
        """
        record = self.record(name)
        parts = self._read(name, record)
        terms = []
        for i, term in enumerate(record.terms):
            kind = LAYOUTS[term.layout]
            shape = record.term_shape(term)
            specs = kind.expect(shape, term.settings)
            tensors = {suffix: parts[payload_key(name, i, suffix)] for suffix in specs}
            try:
                terms.append(kind.from_tensors(shape, term.settings, tensors))
            except DeltakeeperError as error:
                raise self._refusal(name, error) from error
        return terms

    def added_rows(self, name: str) -> torch.Tensor | None:
        """Rows that the fine-tune added to a tensor, in its own dtype, checked against the hash in the manifest.

        Raises:
            ArtifactError: the payload was altered.
        """
        record = self.record(name)
        return self._read(name, record)[added_rows_key(name)] if record.added_rows else None

    def _files(self) -> list[Path]:
        return [file for file in self.path.rglob("*") if file.is_file()]

    def _check_payload(self) -> None:
        entries = self._payload.entries
        unseen = set(entries)
        for name, record in self.manifest.tensors.items():
            expected = self._expected(name, record)
            for key, spec in expected.items():
                entry = entries.get(key)
                if entry is None:
                    raise ArtifactError(f"{self.path}: payload '{key}' is missing; get the artifact again.")
                if entry.dtype != spec.dtype or entry.shape != spec.shape:
                    raise ArtifactError(
                        f"{self.path}: payload '{key}' is {entry.dtype} {entry.shape} but must be {spec.dtype} "
                        f"{spec.shape}; get the artifact again."
                    )
                unseen.discard(key)
            if sum(entries[key].end - entries[key].start for key in expected) != record.stored_bytes:
                raise ArtifactError(f"{self.path}: the size of tensor '{name}' is not what the manifest says.")
        if unseen:
            raise ArtifactError(f"{self.path}: payload '{min(unseen)}' belongs to no tensor; get the artifact again.")

    def _expected(self, name: str, record: TensorRecord) -> dict[str, TensorSpec]:
        expected: dict[str, TensorSpec] = {}
        for i, term in enumerate(record.terms):
            if term.layout not in LAYOUTS:
                raise ArtifactError(
                    f"{self.path}: tensor '{name}' has the unknown layout {term.layout!r}; use a newer deltakeeper."
                )
            try:
                specs = LAYOUTS[term.layout].expect(record.term_shape(term), term.settings)
            except DeltakeeperError as error:
                raise self._refusal(name, error) from error
            expected |= {payload_key(name, i, suffix): spec for suffix, spec in specs.items()}
            if term.settings.get("encoding") == "value" and specs["delta"].dtype != DTYPES[record.dtype]:
                raise ArtifactError(f"{self.path}: the value of tensor '{name}' is not {record.dtype}; get it again.")
        if record.added_rows:
            expected[added_rows_key(name)] = TensorSpec(DTYPES[record.dtype], (record.added_rows, *record.shape[1:]))
        return expected

    def _refusal(self, name: str, error: DeltakeeperError) -> ArtifactError:
        text = str(error)  # which may quote a setting of any length
        if len(text) > 400:
            text = f"{text[:200]} … {text[-200:]}"
        return ArtifactError(f"{self.path}: tensor '{name}': {text}")

    def _read(self, name: str, record: TensorRecord) -> dict[str, torch.Tensor]:
        """The payload of a tensor by key; the bytes that are hashed are those that are used."""
        parts = {key: self._payload.read(key) for key in self._expected(name, record)}
        if (hash_payload(parts) if parts else None) != record.sha256:
            raise ArtifactError(f"{self.path}: the payload of tensor '{name}' was altered; get the artifact again.")
        found = {}
        for key, raw in parts.items():
            entry = self._payload.entries[key]
            flat = torch.frombuffer(raw, dtype=entry.dtype) if raw else torch.empty(0, dtype=entry.dtype)
            found[key] = flat.view(entry.shape)
        return found


def open_artifact(path: str | Path) -> DeltaArtifact:
    """Open an artifact: manifest and payload headers are checked against each other before a tensor is allocated.

    Raises:
        ArtifactError: there is none, its version is unknown, or manifest and payload do not fit.
    """
    return DeltaArtifact(Path(path))
