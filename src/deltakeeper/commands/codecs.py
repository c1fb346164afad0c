"""`deltakeeper codecs`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from deltakeeper.commands.output import console, print_json


def codecs(as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    """List the codecs with their settings and where they come from.

    Example: deltakeeper codecs
    """
    from deltakeeper.codecs import CODECS
    from deltakeeper.codecs.table import settings_text

    if as_json:
        print_json({n: {"title": c.title, "summary": c.summary, "paper": c.paper} for n, c in sorted(CODECS.items())})
        return
    table = Table(box=None, header_style="bold")
    for title in ("codec", "what it keeps", "settings", "paper"):
        table.add_column(title, overflow="fold")
    for name, codec in sorted(CODECS.items()):
        table.add_row(name, codec.summary, settings_text(codec), codec.paper)
    console().print(table)
