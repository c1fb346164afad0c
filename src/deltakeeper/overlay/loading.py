"""Read an artifact for an overlay: every tensor of it finds its place in the live model, or all of it is refused."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping

import torch

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.errors import OverlayError
from deltakeeper.layouts.signs import Signs
from deltakeeper.overlay.names import Location
from deltakeeper.overlay.placing import Collector, LiveModel, no_place
from deltakeeper.overlay.settings import check_settings
from deltakeeper.overlay.side_files import hash_side_files
from deltakeeper.overlay.tenant import TenantDelta


def load_tenant(model: LiveModel, artifact: DeltaArtifact, planes: int | None) -> TenantDelta:
    """Read, check and hold everything that an artifact changes; nothing of the live model is touched.

    Raises:
        OverlayError: it does not fit the live model, or has fewer planes than asked for.
        ArtifactError: its payload was altered.
    """
    tied = check_settings(model.config, artifact.path)
    _check_planes(artifact, planes)
    targets = _targets(model, artifact, tied)
    collected = Collector(model, artifact, planes)
    try:
        for name, locations in targets.items():
            collected.take(name, locations)
    except BaseException:
        collected.release()
        raise
    depth = max((len(numbers) for numbers in collected.lanes.values()), default=1)
    numbers = torch.zeros(model.lanes, depth, dtype=torch.int64)
    for lane, found in collected.lanes.items():
        numbers[lane, : len(found)] = torch.tensor(found)
    beside = hash_side_files(artifact.path)
    return TenantDelta(
        version=_version(artifact, planes, beside),
        vocabulary=_vocabulary(model, collected),
        terms=collected.terms,
        numbers=numbers,
        parts=collected.parts(),
        side_folder=artifact.path.resolve(),  # a link may lead elsewhere by the time that they are read
        side_files=beside,
    )


def version_of(artifact: DeltaArtifact, planes: int | None) -> str:
    """The identity of what is served: base, manifest (which hashes every payload), planes, files beside the weights.

    A tenant's end of text or its chat template is part of what it says, so they tell versions apart too.
    """
    return _version(artifact, planes, hash_side_files(artifact.path))


def _version(artifact: DeltaArtifact, planes: int | None, beside: Mapping[str, str]) -> str:
    text = json.dumps([artifact.manifest.base.root, planes, artifact.manifest_sha256, dict(beside)])
    return hashlib.sha256(text.encode()).hexdigest()


def _vocabulary(model: LiveModel, collected: Collector) -> int:
    if model.embedding is None:
        return int(getattr(model.config, "vocab_size", 0))
    site = model.sites.get(model.embedding.rpartition(".")[0])
    size: int = len(model.names.tensors[model.embedding])
    return size if site is None else collected.vocabularies.get(site, size)


def _check_planes(artifact: DeltaArtifact, planes: int | None) -> None:
    if planes is None:
        return
    terms = (term for record in artifact.manifest.tensors.values() for term in record.terms)
    most = max((int(term.settings["planes"]) for term in terms if term.layout == Signs.name), default=0)
    if not 1 <= planes <= most:
        have = f"1 to {most}" if most else "none"
        raise OverlayError(
            f"{artifact.path}: {planes} sign planes were asked for and it has {have}; choose one of them."
        )


def _targets(model: LiveModel, artifact: DeltaArtifact, tied: bool) -> dict[str, list[Location]]:
    """Places of every stored tensor that changes something; aliases go where the tensor goes that they repeat.

    Raises:
        OverlayError: a tensor that changes something has no place, or a parameter of the model has no tensor.
    """
    names = model.names
    found: dict[str, list[Location]] = {}
    owners: dict[Location, str] = {}
    for name, record in artifact.manifest.tensors.items():
        where = names.locate(name) or (names.locate(record.base_name) if record.base_name else None)
        if where is None:
            if record.encoding == "terms":
                raise no_place(artifact, name)
            continue
        if where in owners:
            raise OverlayError(
                f"{artifact.path}: tensors '{owners[where]}' and '{name}' are one in the live model; "
                "get the artifact again."
            )
        owners[where] = record.tied_to or name
        found.setdefault(owners[where], []).append(where)
    _check_experts(model, artifact, owners)
    told = {where.parameter: source for where, source in owners.items()}
    shared = {id(names.tensors.get(parameter)): source for parameter, source in told.items()}
    for parameter, tensor in names.tensors.items():
        if parameter in told or not isinstance(tensor, torch.nn.Parameter):
            continue
        source = shared.get(id(tensor))
        if source is None and parameter == model.head and tied and model.embedding is not None:
            source = told.get(model.embedding)
        if source is None:
            raise _untold(artifact, parameter)
        found.setdefault(source, []).append(Location(parameter))
    return found


def _check_experts(model: LiveModel, artifact: DeltaArtifact, owners: Mapping[Location, str]) -> None:
    """A parameter of many experts needs a tensor for each, of both halves."""
    parts: defaultdict[str, set[tuple[int, int | None]]] = defaultdict(set)
    for where in owners:
        if where.expert is not None:
            parts[where.parameter].add((where.expert, where.half))
    for parameter, given in parts.items():
        halves = {half for _, half in given}
        experts = range(len(model.names.tensors[parameter]))
        if given != {(expert, half) for expert in experts for half in ((0, 1) if halves != {None} else (None,))}:
            raise _untold(artifact, parameter)


def _untold(artifact: DeltaArtifact, parameter: str) -> OverlayError:
    return OverlayError(
        f"{artifact.path} does not say what becomes of '{parameter}', which the live model has; load the base "
        "that it was made from."
    )
