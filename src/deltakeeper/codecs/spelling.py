"""Codecs as text: `bitdelta:bits=2,scale=row`, and `a+b` for a sum."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable

from deltakeeper.codecs.base import CODECS, Codec
from deltakeeper.codecs.fields import settings_of
from deltakeeper.codecs.sum import SumCodec
from deltakeeper.errors import CodecError

_PLUS = re.compile(r"\+(?=\s*[A-Za-z_])")  # not the plus of 1e+20


def parse_codec(text: str) -> Codec:
    """Codec of a spelling such as `bitdelta:bits=2,scale=row` or `bitdelta+svd:rank=8`.

    Raises:
        CodecError: an unknown codec or setting (with the nearest known one), or a value that does not fit.
    """
    if text.strip().endswith("+") or text.strip().startswith("+"):
        raise CodecError(f"a part of the sum '{text}' is empty; write it as a+b.")
    parts = [_parse_one(part.strip()) for part in _PLUS.split(text)]
    return parts[0] if len(parts) == 1 else SumCodec(tuple(parts))


def spell(codec: Codec) -> str:
    """The shortest spelling that `parse_codec` reads back as an equal codec: defaults are left out."""
    if isinstance(codec, SumCodec):
        return "+".join(spell(part) for part in codec.parts)
    changed = [
        f"{name}={setting.spell(getattr(codec, name))}"
        for name, setting in settings_of(type(codec)).items()
        if setting.default is dataclasses.MISSING or getattr(codec, name) != setting.default
    ]
    return codec.name + (":" + ",".join(changed) if changed else "")


def wants_text(codec: str | Codec) -> str:
    """Names of the parts of a codec that weigh errors by calibration text, joined by commas; empty where none does."""
    found = (parse_codec(codec) if codec.strip() != "auto" else None) if isinstance(codec, str) else codec
    parts = found.parts if isinstance(found, SumCodec) else [found]
    return ", ".join(part.name for part in parts if part is not None and part.uses_inputs)


def _parse_one(text: str) -> Codec:
    name, colon, rest = text.partition(":")
    if name not in CODECS:
        raise CodecError(f"unknown codec '{name}' in '{text}'; {_suggest(name, CODECS)}")
    settings = settings_of(CODECS[name])
    values: dict[str, object] = {}
    for item in rest.split(",") if colon else ():
        field, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not field:
            raise CodecError(f"cannot read '{item}' in codec '{text}'; write it as setting=value.")
        if field not in settings:
            raise CodecError(f"codec '{name}' has no setting '{field}'; {_suggest(field, settings)}")
        if field in values:
            raise CodecError(f"setting '{field}' stands twice in codec '{text}'; keep one.")
        try:
            values[field] = settings[field].parse(value)
        except ValueError:
            raise CodecError(
                f"setting '{field}' of codec '{name}' is '{value}' but must be {settings[field].wanted}."
            ) from None
    try:
        return CODECS[name](**values)
    except TypeError:
        missing = [n for n, s in settings.items() if s.default is dataclasses.MISSING and n not in values]
        raise CodecError(f"codec '{name}' needs {', '.join(missing)}; write {name}:{missing[0]}=value.") from None


def _suggest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose one of {', '.join(names)}." if names else "it takes none."
