"""Files beside an artifact's weights: what was made of them holds for the bytes that they had, not for their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from deltakeeper.artifact import SIDE_FILES
from deltakeeper.errors import ChangedError, DeltakeeperError, SideFileError, TenantError, is_failure

_PIECE = 1 << 20
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What a library raises that misses a file in a copy, which has all that there are."""


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
        of_system = isinstance(error, OSError) and error.errno is not None  # else a library made it
        if isinstance(error, MemoryError) or (of_system and not isinstance(error, _MISSING)):
            raise TenantError(f"{what} cannot be read now ({_reason(error)}); try again later.") from error
        raise SideFileError(f"{what} cannot be read ({_reason(error)}); get the artifact again.") from error


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


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
