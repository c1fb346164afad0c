"""Files beside an artifact's weights: what was made of them holds for the bytes that they had, not for their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from deltakeeper.artifact import SIDE_FILES
from deltakeeper.errors import ChangedError

_PIECE = 1 << 20


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
    """
    with TemporaryDirectory(prefix="deltakeeper-side-") as scratch:
        for name in files if names is None else names:
            _copy(folder / name, Path(scratch) / name, files[name])
        yield Path(scratch)


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
