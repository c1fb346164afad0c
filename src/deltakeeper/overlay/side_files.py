"""Files beside an artifact's weights: what was made of them holds for the bytes that they had, not for their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deltakeeper.artifact import SIDE_FILES
from deltakeeper.errors import (
    ChangedError,
    DeltakeeperError,
    SideFileError,
    TenantError,
    first_line,
    is_failure,
    is_of_disk,
)

_PIECE = 1 << 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Of these one at least belongs to every tokenizer."""


def hash_side_files(folder: Path) -> dict[str, str]:
    """SHA-256, as hex, of each side file that an artifact's folder has.

    Raises:
        OSError: one cannot be read.
    """
    found = {}
    for name in SIDE_FILES:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@contextmanager
def checked_copy(folder: Path, files: Mapping[str, str], names: Iterable[str] | None = None) -> Iterator[Path]:
    """A folder with these files and no others, each with the bytes that its hash was made of, for the `with` block.

    Libraries open files by name, again and again, and look for further ones beside them; here they find only what was
    hashed.

    Args:
        folder: where they lie.
        files: their names, and the SHA-256 that each must have.
        names: those of them that are wanted; all by default.

    Raises:
        ChangedError: one has other bytes now, or is gone.
        TenantError: the disk does not give it now, or has no room for a copy.
    """
    with ExitStack() as stack:
        try:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="deltakeeper-side-")))
            for name in files if names is None else names:
                _copy(folder / name, scratch / name, files[name])
        except OSError as error:
            raise TenantError(f"the files beside {folder} cannot be copied now ({error}); check the disks.") from error
        yield scratch


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Tell what files do wrong from what this machine cannot do at the moment, while a library reads or uses them.

    Args:
        what: the files, as errors are to name them.

    Raises:
        SideFileError: they are at fault, so that reading them again does not help.
        TenantError: memory or the disk failed, which may pass.
    """
    try:
        yield
    except DeltakeeperError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if isinstance(error, MemoryError) or is_of_disk(error):  # what a copy lacks it lacks for good
            raise TenantError(f"{what} cannot be read now ({first_line(error)}); try again later.") from error
        raise SideFileError(f"{what} cannot be read ({first_line(error)}); get the artifact again.") from error


def has_tokenizer(files: Iterable[str]) -> bool:
    """Whether a delta's side files bring a tokenizer, and not at most a template for the base's."""
    return not set(_TOKENIZER_FILES).isdisjoint(files)


def read_tokenizer(folder: Path, files: Mapping[str, str]) -> Any:
    """A delta's own tokenizer, read by transformers from a copy of its files.

    Args:
        folder: that of the artifact.
        files: its side files, each with the SHA-256 that it must have.

    Raises:
        ChangedError: they are not what they were when it was loaded.
        SideFileError: they cannot be used.
        TenantError: they cannot be read now.
    """
    from transformers import AutoTokenizer

    with checked_copy(folder, files) as copied, reading(f"the tokenizer in {folder}"):
        return AutoTokenizer.from_pretrained(str(copied), local_files_only=True, trust_remote_code=False)


def _copy(source: Path, target: Path, expected: str) -> None:
    digest = hashlib.sha256()
    try:
        with source.open("rb") as read, target.open("wb") as write:
            while piece := read.read(_PIECE):
                digest.update(piece)
                write.write(piece)
    except FileNotFoundError as error:
        raise _changed(source) from error
    if digest.hexdigest() != expected:
        raise _changed(source)


def _changed(file: Path) -> ChangedError:
    return ChangedError(f"{file} is not what it was when its delta was loaded; load the delta anew.")
