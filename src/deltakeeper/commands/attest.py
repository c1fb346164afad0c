"""`deltakeeper attest sign`, `verify` and `keygen`."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltakeeper.commands.output import console, print_json

if TYPE_CHECKING:
    from deltakeeper.attestation import Statement
    from deltakeeper.study.summary import Number

attest = typer.Typer(
    name="attest",
    help="Sign what was measured of an artifact, and check such a statement before the artifact is served.",
    no_args_is_help=True,
)


@attest.command()
def keygen(
    out: Annotated[Path, typer.Option("--out", "-o", help="Private key to write; the public one gets `.pub` behind.")],
) -> None:
    """Make a pair of keys (ECDSA on P-256, PEM); the private one is readable by its owner alone.

    The variable DELTAKEEPER_KEY_PASSPHRASE, where it is set, locks the private key.

    Example: deltakeeper attest keygen -o signer.pem
    """
    from deltakeeper.attestation import make_keys

    private, public = make_keys(out)
    console().print(f"{private} (keep it secret) and {public}", highlight=False, soft_wrap=True)


@attest.command()
def sign(
    run: Annotated[Path, typer.Argument(help="Run folder that measured the artifact.")],
    key: Annotated[Path, typer.Option(help="Private key, made by `attest keygen`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Statement to write.")],
    artifact: Annotated[Path | None, typer.Argument(help="Folder of the artifact; the run's own by default.")] = None,
    variant: Annotated[str | None, typer.Option(help="Arm of the run, in place of a folder.")] = None,
    attack: Annotated[str | None, typer.Option(help="Attack, where the arm was run on several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, where it was run with several.")] = None,
    model_signature: Annotated[
        Path | None, typer.Option(help="Write a signature of OpenSSF model-signing over the files as well.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statement as JSON.")] = False,
) -> None:
    """State what a run measured of an artifact (in-toto Statement v1) and sign it (DSSE).

    The run knows its artifacts by their hashes: none is attested that it did not measure.

    Example: deltakeeper attest sign runs/embedded ./delta --key signer.pem -o delta.attestation.json
    """
    from deltakeeper.attestation import attest as make
    from deltakeeper.attestation.making import measured_folder
    from deltakeeper.attestation.model_signature import sign_folder

    folder = measured_folder(run, artifact=artifact, variant=variant, attack=attack, seed=seed)
    statement = make(run, key, out, artifact=folder, variant=variant, attack=attack, seed=seed)
    if model_signature is not None:
        sign_folder(folder, key, model_signature)
    _show(statement, f"Signed {folder}: {out}", as_json)


@attest.command()
def verify(
    statement: Annotated[Path, typer.Argument(help="Statement that `attest sign` wrote.")],
    artifact: Annotated[Path, typer.Option(help="Folder of the artifact.")],
    public_key: Annotated[Path, typer.Option(help="Public key of the signer.")],
    max_age: Annotated[str | None, typer.Option(help="Oldest statement to take, such as 30d or 12h.")] = None,
    base: Annotated[str | None, typer.Option(help="Base that it must be of: a folder, or its fingerprint.")] = None,
    model_signature: Annotated[Path | None, typer.Option(help="Signature of model-signing to check as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statement as JSON.")] = False,
) -> None:
    """Check that a statement is signed and is of this very artifact. Nothing is asked of the network.

    Exit status 1 means that something does not hold; one sentence says what.

    Example: deltakeeper attest verify delta.attestation.json --artifact ./delta --public-key signer.pem.pub
    """
    from deltakeeper.attestation import verify_statement
    from deltakeeper.attestation.model_signature import verify_folder
    from deltakeeper.errors import AttestationError

    age, root = None if max_age is None else _age(max_age), None if base is None else _root(base)
    try:
        found = verify_statement(statement, artifact, public_key, max_age=age, base_root=root)
        if model_signature is not None:
            verify_folder(artifact, model_signature, public_key)
    except AttestationError as error:
        if as_json:
            print_json({"holds": False, "reason": str(error)})
        else:
            console().print(f"Refused: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    _show(found, "It holds", as_json)


def _show(statement: Statement, lead: str, as_json: bool) -> None:
    if as_json:
        print_json(json.loads(statement.payload()))
        return
    said, own = statement.predicate, statement.predicate.measurement
    screen = console()
    screen.print(
        f"{lead}. {len(statement.subject)} files of {said.artifact.codec} on the base {said.artifact.base_root[:12]}, "
        f"{said.date}, deltakeeper {said.tool.version}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    shown = ("attack", "skill", "loss", "over_refusal_change")
    figures = "; ".join(f"{name.replace('_', ' ')} {_figure(own.metrics[name])}" for name in shown)
    lines = [f"{own.attack}, {own.variant}, seeds {', '.join(map(str, own.seeds))}: {figures}."]
    known = [one for one in said.study if one.adaptive is not None and one.variant == own.variant]
    worst = max(known, key=lambda one: one.metrics["attack"].value or 0.0, default=None)
    if worst is not None:
        lines.append(f"Attackers who knew the codec, at worst ({worst.attack}): {_figure(worst.metrics['attack'])}.")
    if said.evidence == "non-adaptive":
        lines.append("Evidence: non-adaptive, since no attack that worked was aimed at this arm.")
    for line in lines:
        screen.print(line, markup=False, highlight=False)


def _figure(number: Number) -> str:
    if number.value is None:
        return "not estimable"
    return f"{number.value:.3f} ({number.low or 0:.3f} to {number.high or 0:.3f})"


def _age(text: str) -> timedelta:
    from deltakeeper.errors import DataError

    found = re.fullmatch(r"(\d{1,6})\s*([dh])", text.strip())
    if found is None:
        raise DataError(f"--max-age {text!r} is no age; write a number of days or hours such as 30d or 12h.")
    return timedelta(**{"d": {"days": int(found[1])}, "h": {"hours": int(found[1])}}[found[2]])


def _root(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text
    from deltakeeper.fingerprint import read_root

    return read_root(text)
