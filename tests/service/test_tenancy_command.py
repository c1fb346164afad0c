"""`deltakeeper keys`, as a user types it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from deltakeeper.commands.keys import keys
from deltakeeper.errors import DataError, DeltakeeperError
from deltakeeper.service.errors import NotFound
from deltakeeper.service.tenancy.database import StateError, open_state
from deltakeeper.service.tenancy.gate import StateGate


@pytest.fixture
def run(tmp_path):
    """Runs the verb on one state; errors come out as they are, for the command line tells them."""

    def call(*arguments, state=str(tmp_path / "state.db"), **options):
        given = [*arguments, *(["--state", state] if state else [])]
        result = CliRunner().invoke(keys, given, **options)
        if isinstance(result.exception, DeltakeeperError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return call


def test_the_key_alone_goes_to_standard_output_and_opens_the_service(run, tmp_path):
    made = run("create", "--name", "team", "--model", "a", "--model", "b", "--expires", "90d")
    secret = made.stdout.strip()
    assert secret.startswith("dk-") and "\n" not in secret and secret not in made.stderr
    assert "is not shown again" in made.stderr
    opened = open_state(tmp_path / "state.db")
    gate = StateGate(opened)
    principal = gate.identify(f"Bearer {secret}")
    assert (principal.role, principal.models) == ("tenant", {"a", "b"})
    assert run("revoke", principal.key_id).stdout == f"Revoked {principal.key_id} ('team').\n"
    gate.refresh()
    assert gate.keys.get(principal.key_id).revoked_at is not None
    gate.close()
    opened.close()


def test_keys_are_listed_without_what_opens_anything(run):
    admin = json.loads(run("create", "--name", "me", "--admin", "--json").stdout)
    run("create", "--name", "[red]all[/red]", "--all-models", "--expires", "30m")
    table = run("list", env={"COLUMNS": "160"}).stdout
    assert admin["id"] in table and "[red]all[/red]" in table and admin["secret"] not in table
    listed = sorted(json.loads(run("list", "--json").stdout), key=lambda key: key["role"])  # made in one second
    assert [(key["role"], key["models"], key["state"]) for key in listed] == [
        ("admin", "all", "active"),
        ("tenant", "all", "active"),
    ]
    assert listed[1]["expires_at"] - listed[1]["created_at"] == 1800
    assert not any("secret" in key or "digest" in key for key in listed)


def test_the_state_may_come_from_the_environment(run, tmp_path):
    where = {"DELTAKEEPER_STATE": str(tmp_path / "other.db")}
    run("create", "--name", "me", "--admin", state=None, env=where)
    assert (tmp_path / "other.db").exists()


@pytest.mark.parametrize(
    "given", [(), ("--admin", "--all-models"), ("--model", "a", "--all-models"), ("--admin", "--monitor")]
)
def test_a_key_says_what_it_is_for(run, tmp_path, given):
    with pytest.raises(DataError, match="give --model, --all-models, --admin or --monitor"):
        run("create", "--name", "x", *given)
    assert not (tmp_path / "state.db").exists()


def test_what_cannot_be_done_is_told(run, tmp_path):
    for verb in (("list",), ("revoke", "key-nobody")):
        with pytest.raises(StateError, match="or make its first key"):  # a path that was mistyped makes no file
            run(*verb)
    assert list(tmp_path.iterdir()) == []
    open_state(tmp_path / "state.db").close()
    assert run("list").stdout == "No key was made yet.\n"
    with pytest.raises(DataError, match="write days, hours or minutes"):
        run("create", "--name", "x", "--admin", "--expires", "soon")
    with pytest.raises(NotFound, match="list the keys"):
        run("revoke", "key-nobody")
