"""Which artifact stands behind a name: a folder of that name among the deltas, or a link there to another one.

The folder is the state, so that a service that starts again, or discovers a name when it is asked for, finds the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from deltakeeper.artifact import MANIFEST_NAME
from deltakeeper.service.admission.inspection import statement_of
from deltakeeper.service.errors import Conflict, NotFound

REMOVED = ".removed"
"""Hidden folder among the deltas where removed artifacts are kept; names with a dot in front are no tenants."""
_COMING = ".coming"
"""End of the hidden name of a link that is about to take its place."""


def find_artifact(deltas: Path, text: str) -> Path:
    """The artifact that a path from a request names, with links followed.

    Args:
        deltas: folder of the deltas.
        text: name of a subfolder, or its whole path.

    Raises:
        NotFound: there is no artifact, or not directly in that folder; both say the same, so that nobody can find out
            what else there is on the machine.
    """
    try:
        found = (deltas / text).resolve()
        inside = found.parent == deltas.resolve() and not found.name.startswith(".")
        if inside and (found / MANIFEST_NAME).is_file():
            return found
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
        pass
    raise NotFound(
        f"There is no artifact {text[:140]!r} among the deltas; give the name of a subfolder that holds one.",
        param="path",
        code="artifact_not_found",
    )


def link(deltas: Path, name: str, artifact: Path) -> Callable[[], None]:
    """Let a name stand for an artifact from now on; gives what takes that back.

    A folder that has the name is moved among the removed ones. The link is there under a hidden name before that, so
    that `finish_links` finds it if the process ends in between.

    Raises:
        Conflict: the folder of the deltas cannot be written.
    """
    place = deltas / name
    if place.resolve() == artifact:
        return lambda: None
    try:
        before = place.readlink() if place.is_symlink() else None
        coming = _coming(place, Path(artifact.name))
        try:
            put_back = remove(deltas, name) if before is None and place.is_dir() else lambda: None
            coming.replace(place)
        except BaseException:
            coming.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(error) from error

    def undo() -> None:
        if before is not None:
            _coming(place, before).replace(place)
            return
        place.unlink(missing_ok=True)
        put_back()

    return undo


def remove(deltas: Path, name: str) -> Callable[[], None]:
    """Take an artifact's name away; gives what takes that back.

    A link goes; a folder is moved among the removed ones, and the statement beside it too, which another artifact of
    that name would otherwise be held against.

    Raises:
        Conflict: links lead to it, or the folder of the deltas cannot be written.
    """
    place = deltas / name
    try:
        if place.is_symlink():
            target = place.readlink()
            place.unlink()
            return lambda: place.symlink_to(target)
        if place.is_dir():
            real = place.resolve()
            if others := sorted(p.name for p in deltas.iterdir() if p.is_symlink() and p.resolve() == real):
                raise Conflict(f"'{others[0]}' stands for the same artifact as '{name}'; remove that name first.")
        there = [place] if place.exists() else []
        moved = _put_among_removed(deltas, [*there, *_statements(place)], name)
    except OSError as error:
        raise unwritable(error) from error
    return moved


def set_statement_aside(deltas: Path, name: str) -> Callable[[], None]:
    """Move a statement without its artifact among the removed ones; gives what takes that back; raises OSError."""
    return _put_among_removed(deltas, _statements(deltas / name), name)


def _statements(place: Path) -> list[Path]:
    """The statement beside an artifact, if there is one: a folder of that name is none."""
    return [path for path in [statement_of(place)] if path.is_file()]


def _put_among_removed(deltas: Path, paths: Sequence[Path], name: str) -> Callable[[], None]:
    """Move these, whose names begin with this one, to the first number that none of them has there; all or none."""
    done: list[tuple[Path, Path]] = []

    def put_back() -> None:
        for path, target in reversed(done):
            target.rename(path)

    if not paths:
        return put_back
    removed = deltas / REMOVED
    removed.mkdir(exist_ok=True)
    free = (removed / f"{name}-{number}" for number in itertools.count(1))
    folder = next(path for path in free if not path.exists() and not statement_of(path).exists())
    try:
        for path in paths:
            target = removed / (folder.name + path.name.removeprefix(name))
            path.rename(target)
            done.append((path, target))
    except OSError:
        put_back()
        raise
    return put_back


def finish_links(deltas: Path) -> list[str]:
    """Finish or drop links that a process left behind when it was killed; gives the names that were finished.

    Raises:
        Conflict: the folder of the deltas cannot be written.
    """
    finished = []
    try:
        for coming in sorted(deltas.glob(f".*{_COMING}")):
            if not coming.is_symlink():
                continue
            place = deltas / coming.name.removeprefix(".").removesuffix(_COMING)
            if place.exists() or place.is_symlink() or not (coming / MANIFEST_NAME).is_file():
                coming.unlink()  # the name has what it had, and nothing was answered
            else:
                coming.replace(place)
                finished.append(place.name)
    except OSError as error:
        raise unwritable(error) from error
    return finished


def _coming(place: Path, target: Path) -> Path:
    coming = place.with_name(f".{place.name}{_COMING}")
    coming.unlink(missing_ok=True)
    coming.symlink_to(target)
    return coming


def unwritable(error: OSError) -> Conflict:
    """What whoever wants a change is told where the folder of the deltas does not take it."""
    return Conflict(f"The folder of the deltas cannot be changed ({error.strerror}); let the service write to it.")
