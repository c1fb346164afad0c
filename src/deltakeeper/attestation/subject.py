"""The subject: every file of an artifact's folder by its hash, and what is wrong where a folder differs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from deltakeeper.artifact import MANIFEST_NAME
from deltakeeper.attestation.statement import MAX_FILES, Statement
from deltakeeper.errors import AttestationError, DeltakeeperError
from deltakeeper.manifest import MAX_BYTES, Manifest


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder and below, by its path there; links to files are followed.

    Raises:
        AttestationError: there is no such folder, or it holds something that is no file: a link to a folder or to
            nothing, a pipe, too many files.
    """
    return {name: _hash(folder / name) for name in names_in(folder)}


def names_in(folder: Path) -> list[str]:
    """Paths of all files in a folder and below, sorted; see `files_of`."""
    if not folder.is_dir():
        raise AttestationError(f"{folder} is no folder; give the folder of a delta artifact.")
    names = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise AttestationError(f"{Path(place) / name} is a link to a folder; copy what it leads to.")
        for name in files:
            path = Path(place) / name
            if not path.is_file():
                raise AttestationError(f"{path} is no file; an attested artifact holds files only.")
            names.append(path.relative_to(folder).as_posix())
        if len(names) > MAX_FILES:
            raise AttestationError(f"{folder} holds more than {MAX_FILES} files, which no artifact does.")
    return sorted(names)


def check_files(statement: Statement, folder: Path) -> None:
    """Hold a folder against a statement, the manifest first, names before contents.

    Raises:
        AttestationError: a file is missing, extra or altered, or the folder is another artifact.
    """
    stated = statement.files
    _check_manifest(statement, folder)
    names = names_in(folder)
    if extra := sorted(set(names) - set(stated)):
        raise AttestationError(f"{folder / extra[0]} is not among the attested files; remove it or attest anew.")
    if missing := sorted(set(stated) - set(names)):
        raise AttestationError(f"{folder / missing[0]} is attested and missing; get the artifact again.")
    for name in names:
        if _hash(folder / name) != stated[name]:
            raise AttestationError(f"{folder / name} was altered since it was attested; get the artifact again.")


def _check_manifest(statement: Statement, folder: Path) -> None:
    file = folder / MANIFEST_NAME
    if not file.is_file():
        raise AttestationError(f"{folder} holds no {MANIFEST_NAME}; give the folder of the attested artifact.")
    if file.stat().st_size > MAX_BYTES:
        raise AttestationError(f"{file} is larger than {MAX_BYTES} bytes, which no manifest is; get it again.")
    raw = file.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if statement.files.get(MANIFEST_NAME) != statement.manifest_sha256:
        raise AttestationError("the statement contradicts itself on its manifest; have the artifact attested anew.")
    try:
        root = Manifest.parse(raw, str(file)).base.root
    except DeltakeeperError as error:
        if found == statement.manifest_sha256:
            raise AttestationError(f"the attested manifest cannot be read: {error}") from error
        raise AttestationError(f"{file} was altered since it was attested: {error}") from error
    if root != statement.base_root:
        raise AttestationError(
            f"the statement is of a delta of the base {statement.base_root[:12]} and {folder} is one of {root[:12]}; "
            "give the artifact that it was made for."
        )
    if found != statement.manifest_sha256:
        raise AttestationError(
            f"{folder} is not the attested artifact: its manifest is another or was altered; give the one that was "
            "signed, or have this one attested."
        )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raise(error: OSError) -> None:
    raise error
