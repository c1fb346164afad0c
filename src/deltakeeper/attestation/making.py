"""Making a statement: the measured cell of an artifact, what the run says of its arm, and the signature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from deltakeeper.artifact import MANIFEST_NAME, DeltaArtifact, open_artifact
from deltakeeper.attestation.envelope import MAX_BYTES, seal
from deltakeeper.attestation.keys import read_private_key
from deltakeeper.attestation.statement import (
    Artifact,
    Digest,
    JudgedBy,
    Measured,
    Predicate,
    Prompts,
    Statement,
    Subject,
    Tool,
)
from deltakeeper.attestation.strict_json import canonical
from deltakeeper.attestation.subject import files_of
from deltakeeper.errors import AttestationError
from deltakeeper.study.cells import Cell, Probe, RunInfo
from deltakeeper.study.groups import Group, comparable, group_cells
from deltakeeper.study.store import RunStore
from deltakeeper.study.summarising import rows_of
from deltakeeper.study.summary import Number, Row
from deltakeeper.whole_files import write_atomically

METRICS = ("absolute", "relative", "recovered", "attack_kept", "skill_kept", "selectivity", "over_shrinking", "loss")


def attest(
    run: Path | str,
    key: Path | str,
    out: Path | str,
    *,
    artifact: Path | str | None = None,
    variant: str | None = None,
    attack: str | None = None,
    seed: int | None = None,
    passphrase: str | None = None,
    date: datetime | None = None,
) -> Statement:
    """State what a run measured of an artifact, and sign it.

    The artifact is known by the hash of its manifest, which the run recorded when it measured it: no statement can be
    made of one that was not.

    Args:
        run: the run folder.
        key: private key in PEM.
        out: file to write, outside of the artifact's folder, which may hold the attested files only.
        artifact: folder of the artifact; by default the run's own, chosen by the three that follow.
        variant: arm that the artifact is of.
        attack: attack whose fine-tune it stands for, where the run has several.
        seed: seed of that fine-tune, where it has several.
        passphrase: of the key; what the environment says by default.
        date: when it is signed; now by default.

    Raises:
        AttestationError: the run did not measure the artifact, or more is needed to know which one is meant.
        RunError: the run folder cannot be read.
    """
    signer = read_private_key(key, passphrase)
    store, target = RunStore(run), Path(out)
    cells, info = store.read_cells(), store.read_run()
    chosen = _chosen(cells, artifact, variant, attack, seed)
    folder = _folder(store, chosen) if artifact is None else Path(artifact)
    if target.resolve().is_relative_to(folder.resolve()):
        raise AttestationError(f"{target} lies in the artifact's folder, which would change it; write it elsewhere.")
    statement = _statement(open_artifact(folder), chosen, cells, info, date or datetime.now(UTC))
    sealed = seal(statement.payload(), signer)
    if len(sealed) > MAX_BYTES:
        raise AttestationError(f"the statement would be larger than {MAX_BYTES} bytes; attest a smaller run.")
    write_atomically(target, sealed.decode("ascii"))
    return statement


def measured_folder(
    run: Path | str,
    *,
    artifact: Path | str | None = None,
    variant: str | None = None,
    attack: str | None = None,
    seed: int | None = None,
) -> Path:
    """The folder of the artifact that `attest` would speak of; arguments and errors are the same."""
    store = RunStore(run)
    chosen = _chosen(store.read_cells(), artifact, variant, attack, seed)
    return _folder(store, chosen) if artifact is None else Path(artifact)


def _chosen(
    cells: Sequence[Cell], artifact: Path | str | None, variant: str | None, attack: str | None, seed: int | None
) -> Cell:
    found = [cell for cell in cells if cell.artifact is not None and cell.kind != "merged"]
    if artifact is not None:
        known = open_artifact(artifact).manifest_sha256
        found = [cell for cell in found if cell.artifact == known]
        if not found:
            raise AttestationError(
                f"the run did not measure {artifact}; run a study on it, or give one of the run's own."
            )
    elif variant is None:
        raise AttestationError("give the folder of an artifact, or the variant that the run measured.")
    for name, wanted in (("variant", variant), ("attack", attack), ("seed", seed)):
        if wanted is not None:
            there = sorted({str(getattr(cell, name)) for cell in found})
            found = [cell for cell in found if getattr(cell, name) == wanted]
            if not found:
                raise AttestationError(f"no measured artifact has the {name} {wanted!r}; there are {', '.join(there)}.")
    if len(found) > 1:
        for name in ("variant", "attack", "seed"):
            there = sorted({str(getattr(cell, name)) for cell in found})
            if len(there) > 1:
                raise AttestationError(f"several artifacts fit; say which {name} with --{name}: {', '.join(there)}.")
    return found[0]


def _folder(store: RunStore, cell: Cell) -> Path:
    """The run's own folder of the artifact that a cell measured."""
    for file in sorted((store.path / "deltas").rglob(MANIFEST_NAME)):
        if hashlib.sha256(file.read_bytes()).hexdigest() == cell.artifact:
            return file.parent
    raise AttestationError(
        f"{store.path} no longer holds the artifact of {cell.attack}/{cell.variant}, seed {cell.seed}; give its folder."
    )


def _statement(artifact: DeltaArtifact, cell: Cell, cells: Sequence[Cell], info: RunInfo, date: datetime) -> Statement:
    if artifact.manifest_sha256 != cell.artifact:
        raise AttestationError(f"{artifact.path} changed while it was attested; check it and try again.")
    for name in artifact.names:
        artifact.terms(name)  # holds every payload against its hash
    groups = group_cells(comparable(cells)[0])
    own = next(group for group in groups if group.attack == cell.attack)
    alone = _at_seed(own, cell.seed)
    study = [_measured(group, row) for group in groups for row in rows_of(group, [cell.variant]) if _counts(group, row)]
    aimed = any(cell.variant in group.arms and _works(group) for group in groups)
    manifest = artifact.manifest
    predicate = Predicate(
        artifact=Artifact(
            manifest_sha256=artifact.manifest_sha256,
            base_root=manifest.base.root,
            base=manifest.base.name_or_path,
            codec=manifest.codec,
            bytes=artifact.nbytes,
        ),
        measurement=_measured(alone, rows_of(alone, [cell.variant])[0]),
        prompts={name: _prompts(probe) for name, probe in cell.probes.items()},
        study=tuple(study),
        evidence="adaptive" if aimed else "non-adaptive",
        judges=tuple(JudgedBy(name=j.name, version=j.version, sha256=j.sha256) for j in info.judges),
        model=str(info.model.get("name", "unnamed")),
        command=info.command,
        cell_sha256=_cell_hash(cell),
        tool=Tool(name="deltakeeper", version=metadata.version("deltakeeper")),
        date=date.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    files = files_of(artifact.path)
    return Statement(
        subject=tuple(Subject(name=name, digest=Digest(sha256=files[name])) for name in sorted(files)),
        predicate=predicate,
    )


def _at_seed(group: Group, seed: int) -> Group:
    """The attack under one seed alone."""
    cells = [group.cell(group.base, seed), *(r[seed] for n, r in group.arms.items() if n != group.base and seed in r)]
    return group_cells(cells)[0]


def _works(group: Group) -> bool:
    """Whether an attacker who knew the codec reached anything, in full precision or compressed with it.

    An attack that failed is no evidence that an arm withstands one.
    """
    if group.adaptive is None:
        return False
    rows = {row.variant: row for row in rows_of(group)}
    floor = rows[group.base].attack.high or 0.0
    return any((row.attack.low or 0.0) > floor for row in rows.values())  # the base's own low is not above its high


def _counts(group: Group, row: Row) -> bool:
    return row.variant in group.arms and row.versus is not None


def _measured(group: Group, row: Row) -> Measured:
    versus = row.versus
    if versus is None:
        raise AttestationError(f"{row.variant} is base or fine-tune and no delta; attest a compressed one.")
    metrics: dict[str, Number] = {"attack": row.attack, "skill": row.skill, "over_refusal": row.over_refusal}
    metrics |= {name: getattr(versus, name) for name in METRICS}
    metrics["over_refusal_change"] = versus.over_refusal_change
    metrics["gained_share"] = versus.gained_share
    metrics |= {f"contrast {name}": number for name, number in row.contrasts.items()}
    metrics |= {f"loss on {name}": number for name, number in versus.utility.items()}
    return Measured(
        attack=group.attack,
        family=group.family,
        variant=row.variant,
        kind=row.kind,
        label=row.label,
        seeds=row.seeds,
        recipe_sha256=group.recipe,
        adaptive=group.adaptive,
        metrics=metrics,
        loss_bound=versus.loss_bound,
    )


def _prompts(probe: Probe) -> Prompts:
    listed = sorted((answer.id, answer.prompt) for answer in probe.answers)
    return Prompts(count=len(listed), sha256=hashlib.sha256(canonical(listed)).hexdigest())


def _cell_hash(cell: Cell) -> str:
    """Hash of all that was measured, wall time left out."""
    facts = {name: value for name, value in cell.to_json().items() if name != "seconds"}
    return hashlib.sha256(canonical(facts)).hexdigest()
