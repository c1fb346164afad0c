"""Codecs as text: `bitdelta:bits=2,scale=row`, and `a+b` for a sum."""

from __future__ import annotations

import dataclasses
import re

from deltakeeper.codecs.base import CODECS, Codec
from deltakeeper.codecs.fields import read_values, settings_of
from deltakeeper.codecs.sum import SumCodec
from deltakeeper.errors import CodecError
from deltakeeper.suggestion import suggest

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
        raise CodecError(f"unknown codec '{name}' in '{text}'; {suggest(name, CODECS)}")
    settings = settings_of(CODECS[name])
    values = read_values(rest if colon else None, settings, f"codec '{name}'", f"codec '{text}'", CodecError)
    try:
        return CODECS[name](**values)
    except TypeError:
        missing = [n for n, s in settings.items() if s.default is dataclasses.MISSING and n not in values]
        raise CodecError(f"codec '{name}' needs {', '.join(missing)}; write {name}:{missing[0]}=value.") from None
