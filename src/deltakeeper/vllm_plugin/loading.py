"""Read an artifact for vLLM's model: every tensor of it finds its place there, or all of it is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine.tenant_files import open_checked
from deltakeeper.errors import OverlayError
from deltakeeper.kernels.terms import HeldTerm, hold
from deltakeeper.layouts import Layout
from deltakeeper.manifest import TensorRecord
from deltakeeper.overlay.settings import check_settings
from deltakeeper.reconstruct import reconstruct
from deltakeeper.vllm_plugin.places import Place, Places
from deltakeeper.vllm_plugin.sites import EmbeddingSite, HeadSite, MatrixSite, NormSite

ELSEWHERE = (
    "serve it with `deltakeeper serve`, merge it with `deltakeeper apply`, or make an adapter with `export-lora`"
)


@dataclass(frozen=True, eq=False)
class HeldDelta:
    """What one artifact changes, ready to be put into a slot.

    Attributes:
        path: its folder.
        terms: packed terms, held for products as long as this is.
        numbers: numbers of the terms of each lane.
        values: what stands in the place of the base's values: matrices, norms and biases.
    """

    path: Path
    terms: list[HeldTerm] = field(default_factory=list)
    numbers: list[tuple[Place, list[int]]] = field(default_factory=list)
    values: list[tuple[Place, torch.Tensor]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(term.nbytes for term in self.terms) + sum(v.numel() * v.element_size() for _, v in self.values)

    def put(self, slot: int) -> None:
        """Put it into a slot, which was cleared before."""
        for place, numbers in self.numbers:
            place.lane.put(slot, numbers)
        for place, value in self.values:
            if isinstance(place.site, NormSite):
                place.site.put(slot, value)
            elif place.leaf == "bias":
                place.lane.put_bias(slot, value)
            else:
                place.lane.put_matrix(slot, value)


def load_delta(path: Path, base_root: str, config: Any, places: Places, dtype: torch.dtype) -> HeldDelta:
    """Read, check and hold everything that an artifact changes; nothing of the live model is touched.

    Args:
        path: the artifact's folder.
        base_root: fingerprint of the base that vLLM serves.
        config: the live model's configuration, of transformers.
        places: of the live model.
        dtype: in which whole matrices are held.

    Raises:
        BaseMismatchError: it was made from another base.
        OverlayError: a tensor that it changes has no place, or it computes something else with the same weights.
        ArtifactError: it is damaged.
    """
    artifact = open_checked(path, base_root)
    tied = check_settings(config, path)
    held = HeldDelta(path)
    for name, found in _targets(artifact, places, tied).items():
        _take(held, artifact, name, found, places, dtype)
    return held


def _targets(artifact: DeltaArtifact, places: Places, tied: bool) -> dict[str, list[Place]]:
    """Places of every stored tensor; aliases go where the tensor goes that they repeat."""
    found: dict[str, list[Place]] = {}
    for name, record in artifact.manifest.tensors.items():
        place = places.find(name) or places.find(record.base_name)
        if place is not None:
            found.setdefault(record.tied_to or name, []).append(place)
        elif record.encoding == "terms":
            raise OverlayError(f"{artifact.path} changes '{name}', which this plugin cannot change; {ELSEWHERE}.")
    told = [place for several in found.values() for place in several]
    for name in artifact.manifest.missing:
        lost = places.find(name)
        if lost is not None and lost not in told and not (tied and isinstance(lost.site, HeadSite)):
            raise OverlayError(f"{artifact.path} lacks '{name}', which the base has; {ELSEWHERE}.")
    if not any(isinstance(place.site, HeadSite) for place in told):
        _let_head_follow(artifact, found, places, tied)
    return found


def _let_head_follow(artifact: DeltaArtifact, found: dict[str, list[Place]], places: Places, tied: bool) -> None:
    """A head of which the artifact says nothing is the embedding, in the fine-tune as in the base."""
    embedding, head = places.end(EmbeddingSite), places.end(HeadSite)
    changed = [several for name, several in found.items() if embedding in several and artifact.record(name).terms]
    if tied != places.tied or (changed and head is None):
        raise OverlayError(
            f"{artifact.path} has another head than the base, which this plugin cannot change; {ELSEWHERE}."
        )
    for several in changed:
        if tied and head is not None:
            several.append(head)


def _take(
    held: HeldDelta, artifact: DeltaArtifact, name: str, found: list[Place], places: Places, dtype: torch.dtype
) -> None:
    record = artifact.record(name)
    origin = places.find(record.base_name)
    moved = [place for place in found if origin is None or not places.same(origin, place)]
    terms = artifact.terms(name) if record.encoding == "terms" else []
    replaced = bool(terms) and terms[0].replaces
    if moved and not replaced:
        raise OverlayError(f"{artifact.path} gives '{name}' in a place that is not its base's; {ELSEWHERE}.")
    if not terms:
        return
    shape = record.shape[::-1] if record.transposed else record.shape
    for place in found:
        if shape != place.shape:
            raise OverlayError(
                f"{artifact.path} has '{name}' of shape {shape} where the served model has {place.shape}; {ELSEWHERE}."
            )
    if replaced or len(shape) != 2:
        _hold_values(held, artifact, name, record, terms, found, dtype)
    else:
        kept: list[HeldTerm] = []
        for term in terms:
            kept.append(hold(term))
            held.terms.append(kept[-1])
        held.numbers.extend((place, [term.id for term in kept]) for place in found)


def _hold_values(
    held: HeldDelta,
    artifact: DeltaArtifact,
    name: str,
    record: TensorRecord,
    terms: list[Layout],
    found: list[Place],
    dtype: torch.dtype,
) -> None:
    for place in found:
        matrix = isinstance(place.site, MatrixSite) and place.leaf == "weight"
        if not (matrix or terms[0].replaces or place.vector is not None):
            raise OverlayError(f"{artifact.path} changes '{name}', which this plugin cannot change; {ELSEWHERE}.")
        value = reconstruct(record, terms, place.vector, None, dtype if matrix else torch.float32)
        held.values.append((place, value.T.contiguous() if record.transposed else value))
