"""The run folder: the only module that knows the names of its files.

Layout: `run.json`, `cells/<attack>/<variant>.json`, `models/<attack>/`, `deltas/<attack>/<codec>/`, `report.json`,
`report.html`. Every write goes to a temporary name first and is then renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deltakeeper.errors import RunError
from deltakeeper.study.cells import Cell, RunInfo

_ATTACK_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class RunStore:
    """A run folder at `path`, made on the first write."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def report_json(self) -> Path:
        """Where the machine-readable report lies."""
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        """Where the report for people lies."""
        return self.path / "report.html"

    def model_dir(self, attack: str) -> Path:
        """The folder of the fine-tuned checkpoint of an attack."""
        return self.path / "models" / _attack_folder(attack)

    def delta_dir(self, attack: str, codec: str) -> Path:
        """The folder of an attack's delta compressed by a codec, named by the codec's spelling."""
        return self.path / "deltas" / _attack_folder(attack) / slug(codec)

    def write_cell(self, cell: Cell) -> Path:
        """Store a cell after checking it as a reader would; returns its path, raises RunError if it is malformed."""
        path = self._cell_path(cell.attack, cell.variant)
        text = to_text(cell.to_json())
        Cell.from_json(json.loads(text), f"cell {cell.attack}/{cell.variant}")
        write_atomically(path, text)
        return path

    def has_cell(self, attack: str, variant: str) -> bool:
        """Whether the cell of this attack and variant is stored."""
        return self._cell_path(attack, variant).is_file()

    def read_cells(self) -> tuple[Cell, ...]:
        """All cells, sorted by attack and variant.

        Raises:
            RunError: There are none, one is malformed, or one lies under a name that is not its own.
        """
        cells = []
        for path in sorted((self.path / "cells").glob("*/*.json")):
            cell = Cell.from_json(_read_json(path), str(path))
            if path != self._cell_path(cell.attack, cell.variant):
                raise RunError(f"{path} holds the cell {cell.attack}/{cell.variant}; move it back or delete it.")
            cells.append(cell)
        if not cells:
            raise RunError(f"{self.path} holds no cells; run a study into it first.")
        return tuple(sorted(cells, key=lambda cell: (cell.attack, cell.variant)))

    def write_run(self, info: RunInfo) -> Path:
        """Store where the run comes from; returns its path, raises RunError if it is malformed."""
        path = self.path / "run.json"
        text = to_text(info.to_json())
        RunInfo.from_json(json.loads(text), "run")
        write_atomically(path, text)
        return path

    def read_run(self) -> RunInfo:
        """Where the run comes from; raises RunError if the file is absent or malformed."""
        path = self.path / "run.json"
        return RunInfo.from_json(_read_json(path), str(path))

    def _cell_path(self, attack: str, variant: str) -> Path:
        return self.path / "cells" / _attack_folder(attack) / f"{slug(variant)}.json"


def slug(name: str) -> str:
    """A variant's file name: reversible, readable, valid on every file system (`bitdelta@bits=1`)."""
    if not name:
        raise RunError("A variant has an empty name; give it one.")
    quoted = quote(name, safe=":=,+").replace(":", "@")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def to_text(value: Any) -> str:
    """JSON text with sorted keys and a final newline; raises RunError for values JSON has no word for."""
    try:
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RunError(f"A value cannot be written as JSON ({error}); store plain, finite values only.") from error


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name in the same folder, then rename it over `path`.

    A lone surrogate, which UTF-8 cannot hold, becomes its backslash escape, in JSON the same string again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        Path(temporary).chmod(0o644)  # mkstemp makes private files, and a report is there to be read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _attack_folder(attack: str) -> str:
    if not _ATTACK_NAME.fullmatch(attack):
        raise RunError(f"The attack name {attack!r} cannot name a folder; use a-z, 0-9, '_' and '-' only.")
    return attack


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist; run a study into this folder first.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}); delete it and run the study again.") from error
