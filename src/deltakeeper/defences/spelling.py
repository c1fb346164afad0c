"""Defences as text: `safelora:threshold=0.5`."""

from __future__ import annotations

from deltakeeper.defences.base import DEFENCES, Defence
from deltakeeper.errors import DataError
from deltakeeper.suggestion import suggest


def parse_defence(text: str) -> Defence:
    """Defence of a spelling such as `safelora:lowest=10` or `norm_matched:bitdelta:bits=2`.

    Raises:
        DataError: an unknown defence or setting (with the nearest known one), or a value that does not fit.
    """
    name, colon, rest = text.strip().partition(":")
    if name not in DEFENCES:
        raise DataError(f"unknown defence '{name}'; {suggest(name, DEFENCES)}")
    return DEFENCES[name].from_text(rest if colon else None)


def spell(defence: Defence) -> str:
    """The shortest spelling that `parse_defence` reads back as an equal defence."""
    settings = defence.to_text()
    return f"{defence.name}:{settings}" if settings else defence.name
