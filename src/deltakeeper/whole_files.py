"""Files that are there whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to for the length of a `with` block, put in the place of `path` unless the block fails.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    scratch = Path(temporary)
    try:
        yield scratch
        scratch.chmod(0o644)  # mkstemp makes private files, and these are there to be read
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all.

    A lone surrogate, which UTF-8 cannot hold, becomes its backslash escape, in JSON the same string again.
    """
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
