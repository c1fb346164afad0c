"""One cell on disk: a header line, then one line per answered item, appended batch by batch and never changed.

What a kill leaves half-written is cut off at the next start: lines count only in whole batches, in the order of the
header, so a study that was interrupted anywhere ends in the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakeeper.errors import RunError
from deltakeeper.study.answers import Answer, Perplexity, Probe, Utility, UtilityItem
from deltakeeper.study.cells import CELL_VERSION, Cell, Fidelity
from deltakeeper.study.fields import Fields, check_version

MAX_BYTES = 1 << 30
MAX_LINE = 1 << 24
END = "end"
PARTS = ("probe", "passage", "task", END)
_DELETE = "delete the file and run the study again."


@dataclass(frozen=True)
class Unit:
    """Items that are asked and written together: `count` rows of a probe from `start`, the passages, or a task.

    How many lines a task makes is known when it is asked, so its `count` is None and a line of its own ends it.
    """

    part: str
    name: str
    start: int
    count: int | None


@dataclass(frozen=True)
class Header:
    """What is known of a cell before its first answer.

    Attributes:
        key: content hash that names the file.
        asked: the same without the judges: cells that share it were asked the same.
        facts: sizes, fidelity and artifact, as fields of `Cell`.
        probes: title, role, event and number of rows of each probe, in the order in which they are asked.
        passages: passages that are read.
        tasks: names of the utility tasks.
        batch: rows of a probe that are asked together.
    """

    key: str
    asked: str
    facts: dict[str, Any]
    probes: dict[str, dict[str, Any]]
    passages: int
    tasks: tuple[str, ...]
    batch: int

    def units(self) -> Iterator[Unit]:
        """What is asked together, in order."""
        for name, probe in self.probes.items():
            for start in range(0, probe["n"], self.batch):
                yield Unit("probe", name, start, min(self.batch, probe["n"] - start))
        if self.passages:
            yield Unit("passage", "", 0, self.passages)
        for name in self.tasks:
            yield Unit("task", name, 0, None)

    def to_json(self) -> dict[str, Any]:
        """The header as JSON; probes as a list, because their order counts."""
        probes = [{"name": name, **probe} for name, probe in self.probes.items()]
        return {"version": CELL_VERSION, **asdict(self), "probes": probes, "tasks": list(self.tasks)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Header:
        """Read a header strictly; raises RunError."""
        with Fields(value, where) as read:
            check_version(read, where, CELL_VERSION)
            probes: dict[str, dict[str, Any]] = {}
            for _, item in read.objects("probes"):
                with item as probe:
                    facts = {key: probe.text(key) for key in ("title", "role", "event")}
                    probes[probe.text("name")] = {**facts, "n": probe.count("n")}
            batch = read.count("batch")
            if batch == 0:
                raise RunError(f"{where}: 'batch' is 0; delete the file and run the study again.")
            return cls(
                key=read.text("key"),
                asked=read.text("asked"),
                facts=read.optional_mapping("facts") or {},
                probes=probes,
                passages=read.count("passages"),
                tasks=read.texts("tasks"),
                batch=batch,
            )


class CellFile:
    """The file of one cell, read and appended to.

    Attributes:
        path: where it lies.
        header: its header, None while there is none.
        lines: its items so far, as they were written.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; a torn end is left for `begin` to cut.

        Raises:
            RunError: the file is no cell, or holds lines that its header does not announce.
        """
        self.path = path
        self.header: Header | None = None
        self.lines: list[dict[str, Any]] = []
        self._whole = 0
        self._read()

    @property
    def complete(self) -> bool:
        """Whether every item is answered."""
        return self.header is not None and len(self.spans()) == len(list(self.header.units()))

    @property
    def units_done(self) -> int:
        """How many whole units are written."""
        return len(self.spans())

    def spans(self) -> list[slice]:
        """Which lines belong to each whole unit."""
        found: list[slice] = []
        at = 0
        for unit in self.header.units() if self.header is not None else ():
            if unit.count is not None:
                end = at + unit.count
            else:
                ends = (i for i in range(at, len(self.lines)) if self.lines[i].get("part") == END)
                end = next(ends, len(self.lines)) + 1
            if end > len(self.lines):
                break
            found.append(slice(at, end))
            at = end
        return found

    def begin(self, header: Header) -> None:
        """Go on with the file, or start it; another header than the one that is there starts it again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.header != header:
            self.header, self.lines, self._whole = header, [], 0
            self.path.write_bytes(b"")
            self._write([header.to_json()])
            return
        kept = max((span.stop for span in self.spans()), default=0)
        if kept < len(self.lines) or self.path.stat().st_size > self._whole:
            self.lines = self.lines[:kept]
            self._whole = len(_encode([header.to_json(), *self.lines]))
            os.truncate(self.path, self._whole)

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add the items of one unit in one write."""
        self._write(lines)
        self.lines += map(dict, lines)

    def cell(self, entry: Mapping[str, Any], seconds: float) -> Cell:
        """The whole cell, named as the index says; raises RunError if it is incomplete or malformed."""
        if self.header is None or not self.complete:
            raise RunError(f"{self.path} is not finished; run the study again to finish it.")
        facts = self.header.facts
        value = {
            "version": CELL_VERSION,
            **{key: entry[key] for key in ENTRY_FIELDS},
            **{key: facts.get(key) for key in FACT_FIELDS},
            **self._answers(),
            "seconds": seconds,
        }
        return Cell.from_json(value, str(self.path))

    def _answers(self) -> dict[str, Any]:
        header = self.header
        assert header is not None
        probes = {
            name: {**{k: probe[k] for k in ("title", "role", "event")}, "answers": []}
            for name, probe in header.probes.items()
        }
        utility: dict[str, dict[str, Any]] = {}
        nll: list[Any]
        tokens: list[Any]
        nll, tokens = [], []
        for line in self.lines:
            part, rest = line.get("part"), {k: v for k, v in line.items() if k not in ("part", "name")}
            name = str(line.get("name"))
            if part == "probe":
                probes[name]["answers"].append({"expected": None, "refused_by": {}, **rest})
            elif part == "passage":
                nll.append(rest.get("nll"))
                tokens.append(rest.get("tokens"))
            elif part == "task":
                task = utility.setdefault(name, {"metric": rest.get("metric"), "items": []})
                task["items"].append({"id": rest.get("id"), "score": rest.get("score")})
        perplexity = {"nll": nll, "tokens": tokens} if header.passages else None
        return {"probes": probes, "perplexity": perplexity, "utility": utility}

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_BYTES:
                    raise RunError(f"{self.path} is larger than {MAX_BYTES} bytes, which no cell is; delete it.")
                for raw in iter(lambda: file.readline(MAX_LINE), b""):
                    if not raw.endswith(b"\n"):
                        break
                    value = self._parse(raw)
                    if self.header is None:
                        self.header = Header.from_json(value, f"{self.path}, line 1")
                    else:
                        self.lines.append(value)
                        self._check(value, self.header)
                    self._whole += len(raw)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(f"{self.path} cannot be read ({error.strerror}); check its rights.") from error
        if self.complete and self.spans()[-1:] and (more := len(self.lines) - self.spans()[-1].stop):
            raise RunError(f"{self.path}, line {len(self.lines) + 2 - more}, holds more than was asked; {_DELETE}")

    def _check(self, line: Mapping[str, Any], header: Header) -> None:
        """Refuse a line that is no part of a cell, so that no study takes for measured what cannot be read."""
        part, where = line.get("part"), f"{self.path}, line {len(self.lines) + 1},"
        if part is None:
            raise RunError(f"{where} holds no part of a cell; {_DELETE}")
        if part not in PARTS:
            raise RunError(f"{where} holds the unknown part {part!r}; {_DELETE}")
        if part == "probe" and line.get("name") not in header.probes:
            raise RunError(f"{where} answers the unknown probe {line.get('name')!r}; {_DELETE}")

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{self.path} holds a line that is not JSON ({error}); {_DELETE}") from error
        if not isinstance(value, dict):
            raise RunError(f"{self.path} holds a line that is no object; {_DELETE}")
        return value

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        data = _encode(lines)
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(data)


ENTRY_FIELDS = ("attack", "family", "variant", "kind", "label", "seed", "recipe", "adaptive", "arm")
FACT_FIELDS = ("bytes", "full_bytes", "bits_per_weight", "fidelity", "merge_survival", "artifact")


def facts_of(cell: Cell) -> dict[str, Any]:
    """What a header keeps of a cell."""
    value = asdict(cell)
    return {key: value[key] for key in FACT_FIELDS}


def answer_line(probe: str, answer: Answer) -> dict[str, Any]:
    """One answer as a line; what is empty is left out."""
    value = {"part": "probe", "name": probe, **asdict(answer)}
    return {key: v for key, v in value.items() if not (key in ("expected", "refused_by") and not v and v != "")}


def passage_lines(perplexity: Perplexity) -> list[dict[str, Any]]:
    """Likelihoods of the passages as lines."""
    pairs = zip(perplexity.nll, perplexity.tokens, strict=True)
    return [{"part": "passage", "nll": nll, "tokens": tokens} for nll, tokens in pairs]


def task_lines(name: str, utility: Utility) -> list[dict[str, Any]]:
    """Scores of one metric of a utility task as lines; `end_line` ends a task."""

    def line(item: UtilityItem) -> dict[str, Any]:
        return {"part": "task", "name": name, "metric": utility.metric, "id": item.id, "score": item.score}

    return [line(item) for item in utility.items]


def end_line(name: str) -> dict[str, Any]:
    """The line that ends a utility task."""
    return {"part": END, "name": name}


def probe_facts(probe: Probe) -> dict[str, Any]:
    """What a header says of a probe."""
    return {"title": probe.title, "role": probe.role, "event": probe.event, "n": len(probe.answers)}


def fidelity_facts(fidelity: Fidelity | None) -> dict[str, float] | None:
    """Fidelity as plain JSON."""
    return None if fidelity is None else asdict(fidelity)


def _encode(lines: Sequence[Mapping[str, Any]]) -> bytes:
    try:
        texts = [json.dumps(line, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for line in lines]
    except (TypeError, ValueError) as error:
        raise RunError(f"A value cannot be written as JSON ({error}); store plain, finite values only.") from error
    return "".join(texts).encode("utf-8", errors="backslashreplace")
