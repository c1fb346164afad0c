"""`deltakeeper keys create`, `list` and `revoke`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from deltakeeper.commands.output import console, print_json
from deltakeeper.errors import DataError

if TYPE_CHECKING:
    from deltakeeper.service.tenancy.keys import KeyRing, KeyRole

keys = typer.Typer(
    name="keys",
    help="Make, list and revoke the API keys of a service, also while it runs.",
    no_args_is_help=True,
)

StateOption = Annotated[
    str,
    typer.Option(
        "--state",
        envvar="DELTAKEEPER_STATE",
        help="State of the service: a file, or a URL of PostgreSQL (in the variable, if it holds a password).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
_UNITS = {"d": 86_400, "h": 3_600, "m": 60}


@keys.command()
def create(
    state: StateOption,
    name: Annotated[str, typer.Option(help="What to call the key, for people.")],
    model: Annotated[list[str] | None, typer.Option(help="Model that the key may ask; give it once for each.")] = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="Let the key ask every model.")] = False,
    admin: Annotated[bool, typer.Option("--admin", help="Make a key that manages the service.")] = False,
    monitor: Annotated[
        bool, typer.Option("--monitor", help="Make a key that reads metrics alone, as Prometheus needs it.")
    ] = False,
    expires: Annotated[str | None, typer.Option(help="How long it is good for, such as 90d, 12h or 30m.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, this one time: only its hash is kept.

    The key alone goes to standard output, what there is to say about it to standard error.

    Example: deltakeeper keys create --state state.db --name support-team --model support
    """
    if admin + monitor + all_models + bool(model) != 1:
        raise DataError(
            "a key is for some models, for all, for an admin or for metrics; give --model, --all-models, --admin or "
            "--monitor."
        )
    role: KeyRole = "admin" if admin else "monitor" if monitor else "tenant"
    with _keys_of(state, make=True) as ring:
        lifetime = None if expires is None else _seconds(expires)
        made = ring.create(name, role, model or None, expires_in=lifetime)
    if as_json:
        print_json({**made.key.to_json(time.time()), "secret": made.secret})
        return
    typer.echo(made.secret)
    typer.echo(f"Made {made.key.id} ('{name}'); keep the key, it is not shown again.", err=True)


@keys.command("list")
def list_keys(state: StateOption, as_json: JsonOption = False) -> None:
    """List all keys that were ever made, without their secrets.

    Example: deltakeeper keys list --state state.db
    """
    from rich.table import Column, Table

    now = time.time()
    with _keys_of(state) as ring:
        found = ring.all()
    if as_json:
        print_json([key.to_json(now) for key in found])
        return
    table = Table(Column("id", no_wrap=True), "name", "role", "models", "made", "expires", "state")
    for key in found:
        models = "all" if key.models is None else ", ".join(sorted(key.models))
        table.add_row(key.id, key.name, key.role, models, _day(key.created_at), _day(key.expires_at), key.state(now))
    console().print(table if found else "No key was made yet.", markup=False)


@keys.command()
def revoke(
    state: StateOption,
    key_id: Annotated[str, typer.Argument(help="The key's id, as `keys list` shows it.")],
    as_json: JsonOption = False,
) -> None:
    """Revoke a key for good. A service that runs refuses it within a second.

    Example: deltakeeper keys revoke key-0a1b2c3d4e5f --state state.db
    """
    with _keys_of(state) as ring:
        key = ring.revoke(key_id)
    if as_json:
        print_json(key.to_json(time.time()))
        return
    typer.echo(f"Revoked {key.id} ('{key.name}').")


@contextmanager
def _keys_of(where: str, *, make: bool = False) -> Iterator[KeyRing]:
    try:
        from deltakeeper.service.tenancy.database import open_state
        from deltakeeper.service.tenancy.keys import KeyRing
    except ImportError as error:
        raise DataError("keys are kept with SQLAlchemy; install deltakeeper[serve].") from error
    state = open_state(where, make=make)
    try:
        yield KeyRing(state)
    finally:
        state.close()


def _seconds(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6})\s*([dhm])", text.strip())
    if found is None:
        raise DataError(f"--expires {text!r} is no time; write days, hours or minutes such as 90d, 12h or 30m.")
    return int(found[1]) * _UNITS[found[2]]


def _day(seconds: int | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
