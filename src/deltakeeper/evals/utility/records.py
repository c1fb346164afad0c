"""What is kept of an evaluation: one value for each item, so that models can be compared item by item."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from deltakeeper.errors import DataError

MOST_BYTES = 1 << 30


class Measure(NamedTuple):
    """What was measured: a metric of a task, after one of the task's filters."""

    task: str
    filter: str
    metric: str


@dataclass(frozen=True)
class ItemRecord:
    """One value of one item.

    Attributes:
        task: name of the task, as lm-evaluation-harness has it.
        doc_id: number of the item in the task's data.
        filter: how the answer was extracted; `none` where there is nothing to extract.
        metric: what was measured, such as `acc`.
        value: the value; nats for `nll`.
        doc_hash: SHA-256 of the item. Equal items of a file have equal hashes.
        prompt_hash: SHA-256 of the (first) prompt, few-shot examples included.
        stratum: subject or category of the item; empty where there is none.
        truncated: whether the start of a prompt was cut off because the model's context is too short.
        arm: whose answer it was.
    """

    task: str
    doc_id: int
    filter: str
    metric: str
    value: float
    doc_hash: str
    prompt_hash: str = ""
    stratum: str = ""
    truncated: bool = False
    arm: str = ""

    @property
    def measure(self) -> Measure:
        """What was measured."""
        return Measure(self.task, self.filter, self.metric)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Any, where: str) -> ItemRecord:
        """Read a record.

        Args:
            row: a JSON value.
            where: what it is called in errors.

        Raises:
            DataError: it is no record.
        """
        kinds = {f.name: f.type for f in fields(cls)}
        if not isinstance(row, dict) or set(row) - set(kinds):
            raise DataError(f"{where} is no item record; its keys are among {', '.join(kinds)}.")
        for name, kind in kinds.items():
            value = row.get(name, getattr(cls, name, None))
            if kind == "float" and type(value) is int:
                value = float(value)
            if type(value).__name__ != kind or (isinstance(value, float) and not math.isfinite(value)):
                raise DataError(f"the {name} of {where} is not a (finite) {kind}; write the records again.")
            row = row | {name: value}
        return cls(**row)


def to_lines(records: Iterable[ItemRecord]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(r.to_json(), ensure_ascii=False, sort_keys=True) + "\n" for r in records)


def read_lines(path: Path) -> list[ItemRecord]:
    """Read what `to_lines` wrote.

    Raises:
        DataError: the file is missing, larger than 1 GiB, or a line is no record.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} is no file of item records up to 1 GiB; check the path.")
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line:
                found.append(ItemRecord.from_json(json.loads(line), f"line {number} of {path}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON lines in UTF-8 ({error}); write it again.") from error
    return found


def by_measure(records: Iterable[ItemRecord]) -> dict[Measure, list[ItemRecord]]:
    """Records of one arm by what they measure, in the order of their items.

    Raises:
        DataError: an item has two values.
    """
    found: dict[Measure, list[ItemRecord]] = {}
    for record in sorted(records, key=lambda r: (r.measure, r.doc_id)):
        rows = found.setdefault(record.measure, [])
        if rows and rows[-1].doc_id == record.doc_id:
            raise DataError(
                f"item {record.doc_id} of {record.task} has two values of {record.metric} ({record.filter}); "
                "give the records of one arm."
            )
        rows.append(record)
    return found


def pair(
    reference: Sequence[ItemRecord], other: Sequence[ItemRecord], *, same_prompts: bool = True
) -> list[tuple[ItemRecord, ItemRecord]]:
    """Two arms' records of one measure, item by item.

    Args:
        reference: records of one arm.
        other: records of the other.
        same_prompts: whether the prompts have to be the same; not so where a model has a chat template of its own.

    Raises:
        DataError: the items, their content or their prompts are not the same.
    """
    first, second = {r.doc_id: r for r in reference}, {r.doc_id: r for r in other}
    if not first or first.keys() != second.keys():
        raise DataError(
            f"two arms have {len(first)} and {len(second)} items, not the same ones; evaluate them on the same samples."
        )
    pairs = [(first[key], second[key]) for key in sorted(first)]
    for a, b in pairs:
        asked_alike = a.prompt_hash == b.prompt_hash or not same_prompts
        if (a.measure, a.doc_hash) != (b.measure, b.doc_hash) or not asked_alike:
            raise DataError(
                f"item {a.doc_id} of {a.task} was another one, or was asked otherwise, in one of two arms; "
                "evaluate them on the same files with the same settings."
            )
    return pairs
