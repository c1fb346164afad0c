"""The other end of an upload: an artifact's files as one archive, sent to a service as they are read."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltakeeper.artifact import open_artifact
from deltakeeper.errors import DataError
from deltakeeper.service.uploads.archive import BLOCK, STATEMENT

_PIECE = 1 << 20
_SECONDS = 600.0
"""How long the service may take over a piece, or over its checks at the end."""


def send_artifact(folder: Path, address: str, name: str, *, key: str | None = None) -> dict[str, Any]:
    """Put an artifact among the deltas of a service, with the signed statement that lies beside it, if one does.

    Args:
        folder: of the artifact.
        address: of the service, such as `http://127.0.0.1:8000`.
        name: what it is to be called there.
        key: an admin key; None for a service that has none yet.

    Returns:
        What the service says of it.

    Raises:
        ArtifactError: there is none in the folder.
        DataError: the service cannot be reached, or does not take it.
    """
    try:
        import httpx
    except ImportError as error:
        raise DataError("pushing to a service needs httpx; install deltakeeper[serve].") from error
    open_artifact(folder)
    files = _files(folder.resolve())
    length = sum(BLOCK + size + -size % BLOCK for _, size in files.values()) + 2 * BLOCK
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(length)}
    headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.put(
            f"{address.rstrip('/')}/admin/artifacts/{name}", content=_archive(files), headers=headers, timeout=_SECONDS
        )
    except httpx.InvalidURL as error:
        raise DataError(f"'{address}' is no address of a service; give one such as http://127.0.0.1:8000.") from error
    except httpx.HTTPError as error:
        raise DataError(
            f"{address} did not take the artifact ({error}); see whether the service runs there."
        ) from error
    try:
        found: dict[str, Any] = answer.json()
        if not answer.is_error:
            return found
        says = found["error"]["message"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{address} answered with status {answer.status_code} and nothing that a service says; check the address."
        ) from error
    raise DataError(f"{address} does not take the artifact: {says}")


def _files(folder: Path) -> dict[str, tuple[Path, int]]:
    """Path and bytes of each file, by its name in the archive."""
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    if (beside := folder.with_name(f"{folder.name}.{STATEMENT}")).is_file():
        found[STATEMENT] = beside
    return {name: (path, path.stat().st_size) for name, path in found.items()}


def _archive(files: dict[str, tuple[Path, int]]) -> Iterator[bytes]:
    for name, (path, size) in files.items():
        head = tarfile.TarInfo(name)
        head.size = size
        yield head.tobuf(tarfile.USTAR_FORMAT)
        left = size
        with path.open("rb") as source:
            while piece := source.read(min(left, _PIECE)):
                left -= len(piece)
                yield piece
        if left:
            raise DataError(f"{path} became shorter while it was sent; send it again when nobody writes to it.")
        yield bytes(-size % BLOCK)
    yield bytes(2 * BLOCK)
