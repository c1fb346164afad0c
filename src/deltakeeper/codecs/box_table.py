"""Which codecs have a box, generated from the registry for the docs."""

from __future__ import annotations

from deltakeeper.codecs.base import CODECS, Codec
from deltakeeper.codecs.sum import SumCodec

_HEAD = ("| codec | deltas that it cannot tell apart |", "|---|---|")


def has_box(codec: type[Codec]) -> bool:
    """Whether a codec declares what it does not see, at least for some of its settings."""
    return codec.box is not Codec.box


def box_table() -> str:
    """One Markdown row for each codec: its box in words, or why it has none."""
    codecs: list[type[Codec]] = [*(codec for _, codec in sorted(CODECS.items())), SumCodec]
    return "\n".join((*_HEAD, *(f"| `{codec.name}` | {_text(codec)} |" for codec in codecs))) + "\n"


def _text(codec: type[Codec]) -> str:
    if not has_box(codec):
        return f"none declared: {codec.boxless}"
    return " ".join((codec.box.__doc__ or "").split())
