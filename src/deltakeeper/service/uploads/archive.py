"""Archives as they come over the network: POSIX tar of plain files in one folder, and nothing else that tar can hold.

`tarfile` would believe what a header says of links, devices, owners and extended headers of any length; here a header
is 512 bytes, of which name, size and kind are looked at (POSIX.1-1988, ustar).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO

from deltakeeper.service.errors import BadRequest

BLOCK = 512
STATEMENT = "attestation.json"
"""Name in an archive of the signed statement, which lies beside an artifact and not in it."""
_SIZE = re.compile(rb"[0-7]{1,12}")


class ArchiveReader:
    """Takes an archive piece by piece and hands its files over.

    Args:
        open_file: asked for a place to write to, with a file's name and its bytes; it refuses by raising.
    """

    def __init__(self, open_file: Callable[[str, int], BinaryIO]) -> None:
        self._open_file = open_file
        self._head = bytearray()
        self._file: BinaryIO | None = None
        self._left = self._padding = 0
        self._ended = False

    def feed(self, data: bytes) -> None:
        """The next piece.

        Raises:
            BadRequest: it is no such archive, or holds something else than plain files.
        """
        view = memoryview(data)
        while view:
            if self._file is not None:
                view = view[self._write(self._file, view[: self._left]) :]
            elif self._padding:
                taken = min(self._padding, len(view))
                self._padding -= taken
                view = view[taken:]
            else:
                taken = BLOCK - len(self._head)
                self._head += view[:taken]
                view = view[taken:]
                if len(self._head) == BLOCK:
                    self._begin(bytes(self._head))
                    self._head.clear()

    def finish(self) -> None:
        """Nothing more comes; raises BadRequest if something is missing."""
        if not self._ended:
            raise BadRequest("The archive is cut off; send it again.", code="archive_cut_off")

    def close(self) -> None:
        """Close a file that was not read to its end."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, file: BinaryIO, piece: memoryview) -> int:
        file.write(piece)
        self._left -= len(piece)
        if not self._left:
            self.close()
        return len(piece)

    def _begin(self, head: bytes) -> None:
        if not any(head):  # two of these end an archive, and zeros may follow
            self._ended = True
            return
        if self._ended or head[257:262] != b"ustar" or not _sums_up(head):
            raise BadRequest("The body is no tar archive; make one with tar --format=ustar.", code="no_archive")
        name, size, kind = _text(head[:100]), head[124:136].strip(b" \0"), head[156:157]
        if kind == b"5" and name.rstrip("/") in (".", ""):
            return  # the folder itself, which tar puts in front
        if kind not in (b"0", b"\0") or not _SIZE.fullmatch(size) or (head[257:263] == b"ustar\0" and head[345]):
            raise BadRequest(
                f"{name[:140]!r} in the archive is no plain file with a short name; send the files of one artifact, "
                "packed with tar --format=ustar.",
                code="no_plain_file",
            )
        self._left = int(size, 8)
        self._padding = -self._left % BLOCK
        self._file = self._open_file(name.removeprefix("./"), self._left)
        if not self._left:
            self.close()


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")


def _sums_up(head: bytes) -> bool:
    told = head[148:156].strip(b" \0")
    return bool(_SIZE.fullmatch(told)) and int(told, 8) == sum(head) - sum(head[148:156]) + 8 * ord(" ")
