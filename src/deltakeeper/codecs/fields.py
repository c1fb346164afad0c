"""The settings of a codec as typed fields: strict checks, and their spelling on a command line.

A setting is `int`, `float`, `bool`, a `Literal` of words, or one of these `| None`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from deltakeeper.codecs.base import Codec
from deltakeeper.errors import CodecError, DeltakeeperError
from deltakeeper.suggestion import suggest

MAX_SEED = 2**64 - 1
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d{1,20}")
_FLAGS = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one field of a codec accepts.

    Attributes:
        name: field name.
        kind: `int`, `float`, `bool` or `str`.
        words: the choices of a `str` field.
        optional: whether None (spelled `none`) is allowed.
        default: the default, or `dataclasses.MISSING`.
    """

    name: str
    kind: type
    words: tuple[str, ...]
    optional: bool
    default: Any

    @property
    def wanted(self) -> str:
        """What a value must be, for error messages and tables."""
        plain = {int: "a whole number", float: "a number", bool: "true or false"}
        text = plain.get(self.kind) or "one of " + ", ".join(self.words)
        return text + (" or none" if self.optional else "")

    def accepts(self, value: object) -> bool:
        """Whether `value` has the right type; true and false are not numbers, and numbers are finite."""
        if value is None:
            return self.optional
        if self.kind is str:
            return isinstance(value, str) and value in self.words
        if self.kind is float:
            return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
        return type(value) is self.kind

    def parse(self, text: str) -> Any:
        """Value of a spelled setting; raises ValueError where the text is not one."""
        if self.optional and text == "none":
            return None
        if self.kind is bool and text in _FLAGS:
            return _FLAGS[text]
        if self.kind is int and _WHOLE.fullmatch(text):
            return int(text)
        if self.kind is float and _NUMBER.fullmatch(text):
            return float(text)
        if self.kind is str and text in self.words:
            return text
        raise ValueError(text)

    def spell(self, value: Any) -> str:
        """The text that `parse` reads back as `value`."""
        if value is None:
            return "none"
        if isinstance(value, bool):
            return str(value).lower()
        return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


@cache
def settings_of(kind: type[Any]) -> dict[str, Setting]:
    """The fields of a codec, or of another dataclass that is spelled like one, by name, in order.

    Raises:
        TypeError: a field has a type that cannot be spelled (a mistake in the class, not of its user).
    """
    hints = get_type_hints(kind)
    return {
        field.name: _setting(field.name, hints[field.name], field.default)
        for field in dataclasses.fields(kind)
        if field.init
    }


def _setting(name: str, hint: Any, default: Any) -> Setting:
    arms = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [arm for arm in arms if arm is not NoneType]
    words: tuple[str, ...] = get_args(kinds[0]) if get_origin(kinds[0]) is Literal else ()
    kind = str if words else kinds[0]
    if len(kinds) != 1 or (kind not in (int, float, bool) and not words):
        raise TypeError(f"codec setting '{name}' must be int, float, bool or a Literal of words, not {hint}")
    return Setting(name, kind, words, len(kinds) < len(arms), default)


def read_values(
    text: str | None, known: Mapping[str, Setting], owner: str, whole: str, error: type[DeltakeeperError]
) -> dict[str, Any]:
    """Values of settings spelled `name=value,name=value`; None (no colon in the spelling) gives none.

    Args:
        text: what stands behind the colon.
        known: the settings that there are.
        owner: whose they are, for messages.
        whole: the same, or all that was spelled.
        error: what to raise.

    Raises:
        DeltakeeperError: of the type `error`: an unknown setting (with the nearest known one), one that stands twice,
            or a value that does not fit.
    """
    values: dict[str, Any] = {}
    for item in () if text is None else text.split(","):
        name, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not name:
            raise error(f"cannot read '{item}' in {whole}; write it as setting=value.")
        if name not in known:
            raise error(f"{owner} has no setting '{name}'; {suggest(name, known)}")
        if name in values:
            raise error(f"setting '{name}' stands twice in {whole}; keep one.")
        try:
            values[name] = known[name].parse(value)
        except ValueError:
            raise error(f"setting '{name}' of {owner} is '{value}' but must be {known[name].wanted}.") from None
    return values


def check_kinds(thing: Any, owner: str, error: type[DeltakeeperError]) -> None:
    """Refuse settings of a dataclass of the wrong type; whole numbers given for a `float` field become floats.

    Raises:
        DeltakeeperError: of the type `error`, naming the owner, the setting and what it must be.
    """
    for name, setting in settings_of(thing.__class__).items():
        value = getattr(thing, name)
        if not setting.accepts(value):
            raise error(f"setting '{name}' of {owner} is {value!r} but must be {setting.wanted}.")
        if setting.kind is float and isinstance(value, int):
            object.__setattr__(thing, name, float(value))


def check_types(codec: Codec) -> None:
    """`check_kinds` of a codec; raises CodecError."""
    check_kinds(codec, f"codec '{codec.name}'", CodecError)


def check_range(codec: Codec, name: str, low: float, high: float, *, above: bool = False, below: bool = False) -> None:
    """Refuse a number outside `[low, high]`; `above` and `below` make an end exclusive. None passes.

    Raises:
        CodecError: naming the codec, the setting and the range.
    """
    value = getattr(codec, name)
    if value is None or ((low < value if above else low <= value) and (value < high if below else value <= high)):
        return
    ends = f"{'above' if above else 'at least'} {low:g} and {'below' if below else 'at most'} {high:g}"
    raise CodecError(f"setting '{name}' of codec '{codec.name}' is {value!r} but must be {ends}.")
