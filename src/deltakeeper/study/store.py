"""The run folder: the only module that knows the names of its files.

Layout: `run.json` (what was planned), `index.json` (which cell is which key), `cells/<key>.jsonl`, `timings.jsonl`,
`failures/<key>.json`, `lens/<attack>-<seed>.json` (which trace is which key), `directions/<attack>-<seed>.json`,
`traces/<key>.json`, `models/`, `deltas/`, `voices/`, `report.json`, `report.html`. Cells and traces are named by a hash
of everything that they depend on. Times and machines stand in `timings.jsonl` alone, so that all else is the same bytes
in every run. Whole files go to a temporary name first and are then renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltakeeper.errors import RunError
from deltakeeper.study.cell_file import (
    ENTRY_FIELDS,
    CellFile,
    Header,
    answer_line,
    end_line,
    facts_of,
    passage_lines,
    probe_facts,
    task_lines,
)
from deltakeeper.study.cells import KEY, Cell, RunInfo
from deltakeeper.study.lens_index import LENS_VERSION, read_lens_index
from deltakeeper.whole_files import write_atomically

if TYPE_CHECKING:
    from deltakeeper.lens.trace import LensTrace
    from deltakeeper.study.lens_directions import Directions

INDEX_VERSION = 1
_FOLDER_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


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

    @property
    def voices(self) -> Path:
        """Folder of what the base itself answers."""
        return self.path / "voices"

    def model_dir(self, name: str) -> Path:
        """The folder of a fine-tuned or defended checkpoint."""
        return self.path / "models" / _folder(name)

    def delta_dir(self, name: str) -> Path:
        """The folder of a compressed delta."""
        return self.path / "deltas" / _folder(name)

    def cell_file(self, key: str) -> CellFile:
        """The file of the cell of a key, there or not."""
        return CellFile(self._cell_path(key))

    def cell_keys(self) -> list[str]:
        """Keys of all cells, finished or not, in the index or not."""
        return sorted(path.stem for path in (self.path / "cells").glob("*.jsonl") if KEY.fullmatch(path.stem))

    def write_cell(self, cell: Cell) -> Path:
        """Store a finished cell that was not measured here, under a key of its content; returns its path.

        Raises:
            RunError: it is malformed.
        """
        Cell.from_json(json.loads(to_text(cell.to_json())), f"cell {cell.attack}/{cell.variant}")
        entry = entry_of(cell)
        key = hashlib.sha256(to_text([entry, facts_of(cell)]).encode(errors="backslashreplace")).hexdigest()[:20]
        probes = {name: probe_facts(probe) for name, probe in cell.probes.items()}
        passages = len(cell.perplexity.nll) if cell.perplexity else 0
        tasks = tuple(cell.utility)
        path = self._cell_path(key)
        path.unlink(missing_ok=True)
        file = CellFile(path)
        file.begin(Header(key, key, facts_of(cell), probes, passages, tasks, 1 << 30))
        for name, probe in cell.probes.items():
            file.append([answer_line(name, answer) for answer in probe.answers])
        if cell.perplexity:
            file.append(passage_lines(cell.perplexity))
        for name, task in cell.utility.items():
            file.append([*task_lines(name, task), end_line(name)])
        entries = [e for e in self.read_index() if _place(e) != _place(entry)] if self.has_index() else []
        self.write_index([*entries, {**entry, "key": key}])
        self.note_time({"cell": key, "seconds": cell.seconds})
        return path

    def has_cell(self, attack: str, variant: str, seed: int = 0) -> bool:
        """Whether the cell of this attack, seed and variant is finished."""
        if not self.has_index():
            return False
        found = (entry for entry in self.read_index() if _place(entry) == (attack, seed, variant))
        return any(self.cell_file(entry["key"]).complete for entry in found)

    def has_index(self) -> bool:
        """Whether a study or cells were stored here."""
        return (self.path / "index.json").is_file()

    def read_cells(self) -> tuple[Cell, ...]:
        """All finished cells, sorted by attack, seed and variant.

        Raises:
            RunError: there are none, one is malformed, or one lies under a name that is not its own.
        """
        if not self.has_index():
            raise RunError(f"{self.path} holds no cells; run a study into it first.")
        seconds: dict[str, float] = {}
        for line in self.read_times():
            if isinstance(line.get("cell"), str) and isinstance(line.get("seconds"), int | float):
                seconds[line["cell"]] = float(line["seconds"])
        files: dict[str, CellFile] = {}
        cells = []
        for entry in self.read_index():
            key = entry["key"]
            file = files.get(key) or files.setdefault(key, self.cell_file(key))
            if not file.complete:
                continue
            if file.header is not None and file.header.key != key:
                raise RunError(f"{file.path} holds the cell {file.header.key}; move it back or delete it.")
            cells.append(file.cell(entry, round(seconds.get(key, 0.0), 3)))
        if not cells:
            raise RunError(f"{self.path} holds no finished cells; run a study into it first.")
        return tuple(sorted(cells, key=lambda cell: (cell.attack, cell.seed, cell.variant)))

    def write_index(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Store which cells there are: fields of `ENTRY_FIELDS` and the key of each."""
        value = {"version": INDEX_VERSION, "cells": sorted(map(dict, entries), key=_place)}
        write_atomically(self.path / "index.json", to_text(value))

    def read_index(self) -> list[dict[str, Any]]:
        """The entries of the index; raises RunError if it is absent or malformed."""
        path = self.path / "index.json"
        value = _read_json(path)
        if not isinstance(value, dict) or value.get("version") != INDEX_VERSION:
            raise RunError(f"{path} is of another version; use the matching release or run the study again.")
        entries = value.get("cells")
        if not isinstance(entries, list):
            raise RunError(f"{path} holds no list of cells; run the study again.")
        wanted = {*ENTRY_FIELDS, "key"}
        for entry in entries:
            if not isinstance(entry, dict) or entry.keys() != wanted or not KEY.fullmatch(str(entry["key"])):
                raise RunError(f"{path} holds a malformed entry; run the study again.")
        return entries

    def write_run(self, info: RunInfo) -> Path:
        """Store where the run comes from; returns its path, raises RunError if it is malformed.

        Hardware, stages and the date go to the timings, so that the file is the same wherever the study runs.
        """
        path = self.path / "run.json"
        RunInfo.from_json(json.loads(to_text(info.to_json())), "run")
        versions = {name: value for name, value in info.versions.items() if name != "date"}
        write_atomically(path, to_text(replace(info, hardware={}, stages={}, versions=versions).to_json()))
        known = [line for line in self.read_times() if "machine" in line]
        machine = {"machine": info.hardware, "date": info.versions.get("date", "")}
        if machine not in known:
            self.note_time(machine)
        for name, seconds in info.stages.items():
            self.note_time({"stage": name, "seconds": seconds})
        return path

    def read_run(self) -> RunInfo:
        """Where the run comes from, with machine and times; raises RunError if the file is absent or malformed."""
        path = self.path / "run.json"
        info = RunInfo.from_json(_read_json(path), str(path))
        hardware: dict[str, Any] = {}
        stages: dict[str, float] = {}
        versions = dict(info.versions)
        for line in self.read_times():
            if isinstance(line.get("machine"), dict):
                hardware |= line["machine"]
                if line.get("date"):
                    versions["date"] = str(line["date"])
            elif isinstance(line.get("stage"), str) and isinstance(line.get("seconds"), int | float):
                stages[line["stage"]] = round(stages.get(line["stage"], 0.0) + line["seconds"], 1)
            elif isinstance(line.get("peak, GiB"), int | float):
                key = "peak memory, GiB"
                hardware[key] = max(hardware.get(key, 0.0), line["peak, GiB"])
        return replace(info, hardware=hardware, stages=stages, versions=versions)

    def note_time(self, line: Mapping[str, Any]) -> None:
        """Add one line to the timings, whole even where several processes write."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, sort_keys=True, ensure_ascii=False, allow_nan=False)
        with (self.path / "timings.jsonl").open("ab") as file:
            file.write(text.encode() + b"\n")

    def read_times(self) -> list[dict[str, Any]]:
        """All lines of the timings; a line that a kill tore is left out."""
        path = self.path / "timings.jsonl"
        if not path.is_file():
            return []
        lines = []
        for raw in path.read_bytes().split(b"\n"):
            try:
                value = json.loads(raw)
            except ValueError:
                continue
            if isinstance(value, dict):
                lines.append(value)
        return lines

    def note_failure(self, key: str, place: str, sentence: str) -> None:
        """Record why an arm failed; a later success removes it."""
        write_atomically(self._failure_path(key), to_text({"arm": place, "sentence": sentence}))

    def forget_failure(self, key: str) -> None:
        """Remove the record of a failure, if there is one."""
        self._failure_path(key).unlink(missing_ok=True)

    def read_failures(self, keys: Iterable[str]) -> dict[str, str]:
        """Sentences of arms that failed, by the arm's name; of these keys only, as others are of earlier plans."""
        found = {}
        for path in sorted(self._failure_path(key) for key in keys):
            value = _read_json(path) if path.is_file() else None
            if isinstance(value, dict):
                found[str(value.get("arm"))] = str(value.get("sentence"))
        return found

    def has_lens(self) -> bool:
        """Whether a lens looked into any fine-tune."""
        return any((self.path / "lens").glob("*.json"))

    def has_trace(self, key: str) -> bool:
        """Whether the lens trace of a key is there."""
        return self._trace_path(key).is_file()

    def write_trace(self, key: str, trace: LensTrace) -> None:
        """Store what the lens saw of one arm on one prompt, under a hash of all that it depends on."""
        from deltakeeper.lens.trace_file import write_trace

        write_trace(trace, self._trace_path(key))

    def write_lens(self, attack: str, seed: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Store which traces there are of a fine-tune: `probe`, `sample`, arms that `flipped`, and `traces` by arm."""
        # As a list, since the order of arms is that in which they are shown, and JSON here sorts its keys.
        listed = [
            {**sample, "traces": [{"arm": arm, "key": key} for arm, key in sample["traces"].items()]}
            for sample in samples
        ]
        value = {"version": LENS_VERSION, "attack": attack, "seed": seed, "samples": listed}
        write_atomically(self._lens_path(attack, seed), to_text(value))

    def read_lens(self, attack: str, seed: int = 0) -> list[dict[str, Any]]:
        """What `write_lens` stored, in its order; nothing where no lens looked.

        Raises:
            RunError: it is malformed.
        """
        path = self._lens_path(attack, seed)
        return read_lens_index(_read_json(path), str(path)) if path.is_file() else []

    def traces_of(self, attack: str, sample: str, seed: int = 0, probe: str | None = None) -> dict[str, LensTrace]:
        """What the lens saw of a sample, by arm, base first; nothing where it did not look.

        Args:
            attack: name of the fine-tune.
            sample: id of the prompt.
            seed: of the fine-tune.
            probe: its probe, where two of them have the id.

        Raises:
            RunError: the index is malformed.
            DataError: a trace is missing or malformed.
        """
        for entry in self.read_lens(attack, seed):
            if entry["sample"] == sample and probe in (None, entry["probe"]):
                return {arm: self.read_trace(key) for arm, key in entry["traces"].items()}
        return {}

    def write_directions(self, attack: str, seed: int, found: Directions) -> None:
        """Store how far each arm of a fine-tune holds two sets of prompts apart."""
        write_atomically(self._directions_path(attack, seed), to_text(found.model_dump(mode="json")))

    def read_directions(self, attack: str, seed: int = 0) -> Directions | None:
        """What `write_directions` stored; None where nothing did; raises RunError where it is malformed."""
        from deltakeeper.study.lens_directions import parse_directions

        path = self._directions_path(attack, seed)
        return parse_directions(_read_json(path), str(path)) if path.is_file() else None

    def lens_page(self, attack: str, seed: int) -> Path:
        """The page of what the lens saw of a fine-tune, beside the index of its traces."""
        return self._lens_path(attack, seed).with_suffix(".html")

    def lens_figure(self, name: str) -> Path:
        """A figure of what the lens saw, as SVG."""
        return self.path / "lens" / "figures" / f"{name}.svg"

    def read_trace(self, key: str) -> LensTrace:
        """A trace by the key that `read_lens` gives; raises DataError where it is missing or malformed."""
        from deltakeeper.lens.trace_file import read_trace

        return read_trace(self._trace_path(key))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from running a study into this folder for the length of a `with` block.

        What an earlier process left half-written is removed at the beginning.

        Raises:
            RunError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.path} is being filled by another process; wait for it or stop it.") from error
            for folder in ("models", "deltas"):
                for scratch in (self.path / folder).glob(".*"):
                    shutil.rmtree(scratch, ignore_errors=True)
            for place in (self.path, *(self.path / name for name in ("failures", "lens", "traces", "directions"))):
                for scratch in place.glob(".*.tmp"):
                    scratch.unlink(missing_ok=True)
            yield

    def _cell_path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise RunError(f"{key[:80]!r} is no key of a cell; run the study again.")
        return self.path / "cells" / f"{key}.jsonl"

    def _trace_path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise RunError(f"{key[:80]!r} is no key of a lens trace; run the study again.")
        return self.path / "traces" / f"{key}.json"

    def _lens_path(self, attack: str, seed: int) -> Path:
        return self.path / "lens" / f"{_folder(attack)}-{seed}.json"

    def _directions_path(self, attack: str, seed: int) -> Path:
        return self.path / "directions" / f"{_folder(attack)}-{seed}.json"

    def _failure_path(self, key: str) -> Path:
        return self.path / "failures" / f"{key}.json"


def entry_of(cell: Cell) -> dict[str, Any]:
    """What the index says of a cell, its key left out."""
    value = asdict(cell)
    return {name: value[name] for name in ENTRY_FIELDS}


def _place(entry: Mapping[str, Any]) -> tuple[str, int, str]:
    return str(entry["attack"]), int(entry["seed"]), str(entry["variant"])


def to_text(value: Any) -> str:
    """JSON text with sorted keys and a final newline; raises RunError for values JSON has no word for."""
    try:
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RunError(f"A value cannot be written as JSON ({error}); store plain, finite values only.") from error


def _folder(name: str) -> str:
    if not _FOLDER_NAME.fullmatch(name):
        raise RunError(f"The name {name!r} cannot name a folder; use a-z, 0-9, '_', '.' and '-' only.")
    return name


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist; run a study into this folder first.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}); delete it and run the study again.") from error
