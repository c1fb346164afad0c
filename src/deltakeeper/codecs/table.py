"""The table of codecs for the docs, generated from the registry so that it cannot go stale."""

from __future__ import annotations

import dataclasses

from deltakeeper.codecs.base import CODECS, Codec
from deltakeeper.codecs.fields import Setting, settings_of
from deltakeeper.errors import CodecError

_HEAD = ("| codec | title | what it keeps | settings (default first) | paper |", "|---|---|---|---|---|")

_TEXT = (
    "With `--text`, {fed} weigh errors by what layers are fed on it, as does `dare` with `fit_q`; others look at it "
    "for a budget only. With `--target-size` or `--target-ratio`, the first of `rank`, `keep`, `p`, `bpw`, `cr` and "
    "`bits` that a codec has is chosen for each tensor, and `auto` chooses the codec too."
)


def codec_table() -> str:
    """One Markdown row for each registered codec: name, title, summary, settings with defaults, paper."""
    rows = "\n".join((*_HEAD, *(_row(codec) for _, codec in sorted(CODECS.items()))))
    fed = ", ".join(f"`{name}`" for name, codec in sorted(CODECS.items()) if _uses_text(codec))
    return f"{rows}\n\n{_TEXT.format(fed=fed)}\n"


def _uses_text(codec: type[Codec]) -> bool:
    try:
        return codec().uses_inputs
    except CodecError:  # settings that have no default
        return False


def settings_text(codec: type[Codec]) -> str:
    """The settings of a codec with their defaults, as they are spelled on the command line."""
    spelled = (
        setting.name if setting.default is dataclasses.MISSING else f"{setting.name}={setting.spell(setting.default)}"
        for setting in settings_of(codec).values()
    )
    return ", ".join(spelled)


def _row(codec: type[Codec]) -> str:
    settings = "<br>".join(_setting(setting) for setting in settings_of(codec).values()) or "none"
    paper = f"[{codec.paper.rstrip('/').rsplit('/', 1)[-1]}]({codec.paper})" if codec.paper else ""
    title = codec.title + (" (control)" if codec.control else "")
    return f"| `{codec.name}` | {title} | {codec.summary} | {settings} | {paper} |"


def _setting(setting: Setting) -> str:
    if setting.default is dataclasses.MISSING:
        return f"`{setting.name}`: {setting.wanted}"
    return f"`{setting.name}={setting.spell(setting.default)}`: {setting.wanted}"
