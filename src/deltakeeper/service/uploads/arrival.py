"""An artifact on its way in: under a hidden name until all of it is there and was read once, then among the deltas."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO

from deltakeeper.artifact import CARD_NAME, MANIFEST_NAME, REPORT_NAME, SIDE_FILES, DeltaArtifact
from deltakeeper.engine.tenant_files import open_checked
from deltakeeper.errors import ArtifactError, is_lasting
from deltakeeper.payload import is_payload_name
from deltakeeper.service.admission.inspection import statement_of
from deltakeeper.service.admission.placing import set_statement_aside
from deltakeeper.service.errors import BadRequest, Refused, TooLarge, Unavailable
from deltakeeper.service.uploads.archive import STATEMENT, ArchiveReader

INCOMING = ".incoming"
"""Hidden folder among the deltas; names with a dot in front are no tenants."""
_FILES = {MANIFEST_NAME, REPORT_NAME, CARD_NAME, STATEMENT, *SIDE_FILES}
_MOST_BESIDE = 64 << 20
"""Bytes of a file that is no payload; some of them are read whole."""
_STALE_SECONDS = 86_400.0


class Arrival:
    """The files of one upload; `discard` leaves nothing of them unless they were placed.

    Args:
        deltas: folder of the deltas.
        name: what the artifact is to be called there.
        most: bytes of all files together.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, deltas: Path, name: str, most: int) -> None:
        self._deltas, self._name, self._left = deltas, name, most
        incoming = deltas / INCOMING
        incoming.mkdir(exist_ok=True)
        _remove_stale(incoming)
        self._scratch = Path(mkdtemp(dir=incoming))
        self.folder = self._scratch / name
        self.folder.mkdir()
        self._statement = statement_of(self.folder)  # where admission looks for it, as long as the artifact is here
        self._reader = ArchiveReader(self._open)

    def feed(self, data: bytes) -> None:
        """The next piece of the archive.

        Raises:
            BadRequest: it is no archive of an artifact's files.
            TooLarge: it holds more than is allowed, or than there is room for.
            OSError: it cannot be written.
        """
        self._reader.feed(data)

    def check(self, base_root: str) -> DeltaArtifact:
        """The artifact, once every byte of it was held against its hashes.

        Raises:
            BadRequest: the archive is cut off.
            Refused: it is malformed, altered, or of another base.
            Unavailable: the disk does not give it back now.
        """
        self._reader.finish()
        try:
            artifact = open_checked(self.folder, base_root)
            for tensor in artifact.names:
                artifact.terms(tensor)
                artifact.added_rows(tensor)
        except ArtifactError as error:
            told = str(error).replace(str(self.folder), self._name)
            if not is_lasting(error):
                raise Unavailable(told, retry_after=5.0) from error
            raise Refused(told, code="artifact_refused") from error
        return artifact

    def place(self) -> None:
        """Let it stand among the deltas from now on, beside no statement but its own; raises OSError if that fails."""
        put_back = set_statement_aside(self._deltas, self._name)
        beside = self._deltas / self._statement.name
        try:
            if self._statement.is_file():  # first: without it the artifact may not be let in
                self._statement.replace(beside)
            self.folder.rename(self._deltas / self._name)
        except OSError:
            beside.unlink(missing_ok=True)
            put_back()
            raise

    def discard(self) -> None:
        """Leave nothing behind."""
        self._reader.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _open(self, name: str, size: int) -> BinaryIO:
        payload = is_payload_name(name)
        if not payload and name not in _FILES:
            raise BadRequest(
                f"{name[:140]!r} is no file of an artifact; send {MANIFEST_NAME}, payload and tokenizer files.",
                code="no_artifact_file",
            )
        most = self._left if payload else min(self._left, _MOST_BESIDE)
        if size > most:
            raise TooLarge(f"{name} has {size:,} bytes, and at most {most:,} more are taken.")
        if size > (free := shutil.disk_usage(self._scratch).free):
            raise TooLarge(f"{name} has {size:,} bytes, and the folder of the deltas has room for {free:,}.")
        self._left -= size
        place = self._statement if name == STATEMENT else self.folder / name
        try:
            return place.open("xb")
        except FileExistsError as error:
            raise BadRequest(f"The archive holds {name} twice; send each file once.", code="twice") from error


def _remove_stale(incoming: Path) -> None:
    """Remove what a service left behind that was killed while an artifact came in."""
    for folder in incoming.iterdir():
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
