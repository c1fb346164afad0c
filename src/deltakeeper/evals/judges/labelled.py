"""Answers that people labelled, from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltakeeper.errors import DataError
from deltakeeper.evals.judges.base import Asked, Label, Seen

MAX_BYTES = 256 << 20
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "objective", "question", "goal"),
    "answer": ("answer", "completion", "response", "assistant_response"),
    "label": ("label", "final_label", "human_label", "human_score"),
    "arm": ("arm", "model"),
    "stratum": ("stratum",),
    "weight": ("weight",),
}
_LABELS: Mapping[str, Label] = {
    "refused": "refused",
    "refusal": "refused",
    "full_refusal": "refused",
    "2_full_refusal": "refused",
    "partial": "partial",
    "partial_refusal": "partial",
    "3_partial_refusal": "partial",
    "complied": "complied",
    "compliance": "complied",
    "full_compliance": "complied",
    "1_full_compliance": "complied",
    "safe_other": "safe_other",
    "1": "refused",
    "0": "complied",
}


@dataclass(frozen=True)
class LabelledAnswer:
    """One answer with what a person called it.

    Attributes:
        asked: prompt and answer.
        label: `refused`, `partial`, `complied` or `safe_other`; None in a file without labels.
        arm: which model gave the answer.
        stratum: what it was drawn by; all of one arm were drawn alike if that is empty.
        weight: how many answers of the population it stands for.
    """

    asked: Asked
    label: Label | None
    arm: str = ""
    stratum: str = ""
    weight: float = 1.0

    def has(self, event: Seen) -> bool:
        """Whether the person saw the event: partial refusals are refusals."""
        return self.label in ("refused", "partial") if event == "refused" else self.label == "complied"


def read_labels(path: str | Path, *, labelled: bool = True) -> list[LabelledAnswer]:
    """Read a CSV with a header: `prompt`, `answer`, `label`, and optionally `arm`, `stratum` and `weight`.

    The names in the published files of XSTest and PyRIT (whose score of 1 is a refusal) are understood too. Lines that
    begin with `# ` are skipped before the header.

    Args:
        path: the file.
        labelled: whether every row needs a label; else the column may be absent.

    Raises:
        DataError: the file is missing, too large, no CSV, empty, or a row of it is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file of labelled answers at {path}; check the path.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than 256 MiB, which no file of labelled answers is; check the path.")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it first.") from error
    skipped = 0
    while skipped < len(lines) and lines[skipped].startswith("# "):
        skipped += 1
    rows = csv.DictReader(io.StringIO("".join(lines[skipped:]), newline=""), strict=True)
    try:
        columns = _columns(rows.fieldnames or (), path, labelled)
        found = [_row(row, columns, f"{path}, line {skipped + rows.line_num},", labelled) for row in rows]
    except csv.Error as error:
        raise DataError(f"{path}, line {skipped + rows.line_num}, is not CSV ({error}); correct it.") from error
    if not found:
        raise DataError(f"{path} holds no answers below its header; check the file.")
    return found


def _columns(header: Sequence[str], path: Path, labelled: bool) -> dict[str, str]:
    present = {str(name).strip().casefold(): str(name) for name in header}
    found = {}
    for wanted, names in COLUMNS.items():
        known = [name for name in names if name in present]
        if known:
            found[wanted] = present[known[0]]
        elif wanted in ("prompt", "answer") or (wanted == "label" and labelled):
            raise DataError(f"{path} has no column '{wanted}'; it has: {', '.join(present) or 'no header'}.")
    return found


def _row(row: Mapping[str, str | None], columns: Mapping[str, str], where: str, labelled: bool) -> LabelledAnswer:
    def cell(name: str) -> str:
        return (row.get(columns[name]) or "") if name in columns else ""

    said = cell("label").strip().casefold().replace(" ", "_")
    label = _LABELS.get(said)
    if label is None and (labelled or said):
        raise DataError(
            f"{where} has the label '{cell('label')[:40]}'; it must be refused, partial, complied or safe_other."
        )
    if not cell("prompt").strip():
        raise DataError(f"{where} has no prompt; fill or remove the line.")
    weight = 1.0
    if cell("weight").strip():
        try:
            weight = float(cell("weight"))
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"{where} has the weight '{cell('weight')[:40]}'; it must be a positive number.")
    return LabelledAnswer(
        Asked(cell("prompt"), cell("answer")), label, cell("arm").strip(), cell("stratum").strip(), weight
    )
