"""The settings of a defence on a command line, spelled and checked as those of codecs are."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from deltakeeper.codecs.fields import Setting, settings_of
from deltakeeper.errors import DataError

if TYPE_CHECKING:
    from deltakeeper.codecs import Codec
    from deltakeeper.defences.base import Defence

D = TypeVar("D", bound="Defence")


def settings(defence: type[Defence]) -> dict[str, Setting]:
    """The fields of a defence by name, in order; raises as `settings_of`."""
    return settings_of(cast("type[Codec]", defence))  # which looks at dataclass fields alone


def read_settings(defence: type[D], text: str | None) -> D:
    """A defence from `field=value,field=value`; None (no colon in the spelling) leaves every default.

    Raises:
        DataError: an unknown setting (with the nearest known one), or a value that does not fit.
    """
    known = settings(defence)
    values: dict[str, Any] = {}
    for item in [] if text is None else text.split(","):
        name, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not name:
            raise DataError(f"cannot read '{item}' in defence '{defence.name}'; write it as setting=value.")
        if name not in known:
            raise DataError(f"defence '{defence.name}' has no setting '{name}'; {suggest(name, known)}")
        if name in values:
            raise DataError(f"setting '{name}' stands twice in defence '{defence.name}'; keep one.")
        try:
            values[name] = known[name].parse(value)
        except ValueError:
            raise DataError(
                f"setting '{name}' of defence '{defence.name}' is '{value}' but must be {known[name].wanted}."
            ) from None
    missing = [n for n, s in known.items() if s.default is dataclasses.MISSING and n not in values]
    if missing:
        raise DataError(f"defence '{defence.name}' needs {', '.join(missing)}; write {missing[0]}=value behind it.")
    return defence(**values)


def spell_settings(defence: Defence) -> str:
    """The shortest text that `read_settings` reads back as an equal defence: defaults are left out."""
    return ",".join(
        f"{name}={setting.spell(getattr(defence, name))}"
        for name, setting in settings(type(defence)).items()
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
    for name, setting in settings(type(defence)).items():
        value = getattr(defence, name)
        if not setting.accepts(value):
            raise DataError(f"setting '{name}' of defence '{defence.name}' is {value!r} but must be {setting.wanted}.")
        if setting.kind is float and isinstance(value, int):
            object.__setattr__(defence, name, float(value))
    for name, (low, high) in ranges.items():
        value = getattr(defence, name)
        if value is not None and not low <= value <= high:
            raise DataError(
                f"setting '{name}' of defence '{defence.name}' is {value!r} but must be at least {low:g} "
                f"and at most {high:g}."
            )


def suggest(word: str, known: Iterable[str]) -> str:
    """What was meant by an unknown word, or what there is to choose from."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose one of {', '.join(names)}." if names else "it takes none."
