"""Artifacts as the tenant store meets them: names of tenants, a folder of them, headers first, and reading ahead."""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path

import torch

from deltakeeper.artifact import MANIFEST_NAME, STATEMENT_SUFFIX, DeltaArtifact
from deltakeeper.errors import BaseMismatchError, TenantError
from deltakeeper.layouts import LAYOUTS, Layout
from deltakeeper.manifest import TensorRecord
from deltakeeper.safetensors_header import DTYPES

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class LoadingArtifact(DeltaArtifact):
    """An artifact whose reading can be given up between two tensors, by setting `cancelled` on any thread.

    Attributes:
        tenant: the name that it is loaded for.
    """

    cancelled = False
    tenant: str | None = None

    def terms(self, name: str) -> list[Layout]:
        """See `DeltaArtifact.terms`; raises TenantError once it is cancelled."""
        self._go_on()
        return super().terms(name)

    def added_rows(self, name: str) -> torch.Tensor | None:
        """See `DeltaArtifact.added_rows`; raises TenantError once it is cancelled."""
        self._go_on()
        return super().added_rows(name)

    def _go_on(self) -> None:
        if self.cancelled:
            raise TenantError(f"{self.path} is not wanted any more, so its load was given up; load it again.")


def check_name(name: str) -> str:
    """The name itself, if a tenant may have it.

    Raises:
        TenantError: it is not 1 to 128 of the characters A-Z a-z 0-9 . _ - or it starts with a dot, or it is that of
            a signed statement.
    """
    if not _NAME.fullmatch(name):
        raise TenantError(
            f"{name[:140]!r} cannot be the name of a tenant; use 1 to 128 of A-Z a-z 0-9 . _ - and no dot in front."
        )
    if name.endswith(STATEMENT_SUFFIX):
        raise TenantError(
            f"'{name}' cannot be the name of a tenant, since it is that of a signed statement; give one that does not "
            f"end in {STATEMENT_SUFFIX}."
        )
    return name


def artifact_folders(folder: Path) -> list[Path]:
    """Subfolders that hold an artifact, sorted; hidden ones are left out, since writers build new artifacts in them.

    Raises:
        TenantError: the folder cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
        return sorted(path for path in found if (path / MANIFEST_NAME).is_file())
    except OSError as error:
        raise TenantError(f"{folder} cannot be listed ({error.strerror}); give the folder of the deltas.") from error


def open_checked(path: Path, base_root: str | None) -> LoadingArtifact:
    """Open an artifact, headers only, and check which base it is for.

    Args:
        path: its folder.
        base_root: fingerprint of the base that is served; None leaves the check to whoever applies the delta.

    Raises:
        ArtifactError: there is none, or its manifest and headers do not fit.
        BaseMismatchError: it was made from another base.
    """
    artifact = LoadingArtifact(path)
    base = artifact.manifest.base
    if base_root is not None and base.root != base_root:
        raise BaseMismatchError(
            f"{path} was made from {base.name_or_path} (fingerprint {base.root[:12]}…), which is not the base that is "
            f"served (fingerprint {base_root[:12]}…); serve it on its own base, or compress the fine-tune anew."
        )
    return artifact


def payload_bytes(artifact: DeltaArtifact, planes: int | None) -> int:
    """Bytes of the tensors that a load keeps, from the headers alone; sign planes beyond `planes` are not counted."""
    return sum(_tensor_bytes(record, planes) for record in artifact.manifest.tensors.values())


def read_ahead(path: Path, limit: int) -> int:
    """Ask the system to read an artifact's files into its page cache, and say how many bytes they are.

    It only gives advice: nothing is asked where the files are more than `limit` bytes, are no plain files, or the
    system knows no such advice, and what fails is left to the load to report.
    """
    try:
        files = [path / MANIFEST_NAME, *sorted(path.glob("delta_model*.safetensors*"))]
        found = {file: file.stat() for file in files}
        total = sum(info.st_size for info in found.values())
        plain = all(stat.S_ISREG(info.st_mode) for info in found.values())
        if total > limit or not plain or not hasattr(os, "posix_fadvise"):
            return 0
        for file in files:
            with file.open("rb", buffering=0) as source:
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    except OSError:
        return 0
    return total


def _tensor_bytes(record: TensorRecord, planes: int | None) -> int:
    total = record.added_rows * math.prod(record.shape[1:]) * DTYPES[record.dtype].itemsize
    for term in record.terms:
        settings = term.settings
        if planes is not None and "planes" in settings:
            settings = settings | {"planes": min(planes, settings["planes"])}
        specs = LAYOUTS[term.layout].expect(record.term_shape(term), settings).values()
        total += sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    return total
