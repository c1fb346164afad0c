"""Markdown tables, and the line that says where figures come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def origin(found: dict[str, Any]) -> str:
    """Command, date and machine of a benchmark's record."""
    machine = found["machine"]
    remark = f" ({found['remark']})" if "remark" in found else ""
    return (
        f"`{found['command']}`{remark}, {found['date']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']:.0f} GiB, torch {machine['torch']}."
    )


def counted(number: int, what: str) -> str:
    """A number and its noun: `1 thread`, `2 threads`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
