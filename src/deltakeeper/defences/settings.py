"""The settings of a defence on a command line, spelled and checked as those of codecs are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar

from deltakeeper.codecs.fields import check_kinds, read_values, settings_of
from deltakeeper.errors import DataError

if TYPE_CHECKING:
    from deltakeeper.defences.base import Defence

D = TypeVar("D", bound="Defence")


def read_settings(defence: type[D], text: str | None) -> D:
    """A defence from `field=value,field=value`; None (no colon in the spelling) leaves every default.

    Raises:
        DataError: an unknown setting (with the nearest known one), or a value that does not fit.
    """
    known = settings_of(defence)
    owner = f"defence '{defence.name}'"
    values = read_values(text, known, owner, owner, DataError)
    missing = [n for n, s in known.items() if s.default is dataclasses.MISSING and n not in values]
    if missing:
        raise DataError(f"defence '{defence.name}' needs {', '.join(missing)}; write {missing[0]}=value behind it.")
    return defence(**values)


def spell_settings(defence: Defence) -> str:
    """The shortest text that `read_settings` reads back as an equal defence: defaults are left out."""
    return ",".join(
        f"{name}={setting.spell(getattr(defence, name))}"
        for name, setting in settings_of(type(defence)).items()
        if setting.default is dataclasses.MISSING or getattr(defence, name) != setting.default
    )


def check_settings(defence: Defence, **ranges: tuple[float, float]) -> None:
    """Refuse settings of the wrong type or outside their range, ends included; whole numbers become floats if need be.

    Args:
        defence: the defence.
        ranges: lowest and highest value by setting; None passes.

    Raises:
        DataError: naming the defence, the setting and what it must be.
    """
    check_kinds(defence, f"defence '{defence.name}'", DataError)
    for name, (low, high) in ranges.items():
        value = getattr(defence, name)
        if value is not None and not low <= value <= high:
            raise DataError(
                f"setting '{name}' of defence '{defence.name}' is {value!r} but must be at least {low:g} "
                f"and at most {high:g}."
            )
