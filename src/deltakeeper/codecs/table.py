"""The table of codecs for the docs, generated from the registry so that it cannot go stale."""

from __future__ import annotations

import dataclasses

from deltakeeper.codecs.base import CODECS, Codec
from deltakeeper.codecs.fields import Setting, settings_of

_HEAD = ("| codec | title | what it keeps | settings (default first) | paper |", "|---|---|---|---|---|")


def codec_table() -> str:
    """One Markdown row for each registered codec: name, title, summary, settings with defaults, paper."""
    return "\n".join((*_HEAD, *(_row(codec) for _, codec in sorted(CODECS.items())))) + "\n"


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
