"""Put the tensors of an artifact in their places: as terms that are multiplied, or as values where that cannot be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.errors import OverlayError
from deltakeeper.kernels.terms import HeldTerm, hold
from deltakeeper.layouts import Layout
from deltakeeper.layouts.signs import Signs
from deltakeeper.manifest import TensorRecord
from deltakeeper.overlay.names import LiveNames, Location
from deltakeeper.overlay.site import Part, Place, Site
from deltakeeper.reconstruct import reconstruct


@dataclass(frozen=True)
class LiveModel:
    """What loading needs of a live model; none of it changes while the overlay is attached.

    Attributes:
        config: the model's configuration.
        names: its parameters by name.
        sites: by module path.
        lanes: rows of the overlay's table.
        embedding: name of the parameter of the input embedding, None if there is none.
        head: name of the parameter of the head, None if there is none.
    """

    config: Any
    names: LiveNames
    sites: Mapping[str, Site]
    lanes: int
    embedding: str | None
    head: str | None

    def place(self, where: Location) -> Place | None:
        """The place behind a location, None if the module there cannot serve tenants."""
        path, _, leaf = where.parameter.rpartition(".")
        site = self.sites.get(path)
        return None if site is None else site.place(leaf, where.expert, where.half)

    def base(self, where: Location) -> torch.Tensor | None:
        """The live values at a location, as the checkpoint has them; None where they are kept in another form."""
        place = self.place(where)
        live = self.names.tensors.get(where.parameter) if place is None else place.live
        plain = live is not None and type(live.data) is torch.Tensor and live.is_floating_point()
        return live.detach() if plain and live is not None else None

    def same(self, one: Location, other: Location) -> bool:
        """Whether two locations are one: that of a tied head is that of its embedding."""
        tensors = self.names.tensors
        if one == other:
            return True
        live = tensors.get(one.parameter)
        shared = live is not None and live is tensors.get(other.parameter)
        return shared and (one.expert, one.half) == (other.expert, other.half)


class Collector:
    """Everything of one artifact that was read so far, by where it goes.

    Attributes:
        terms: held for products, until they are released.
        lanes: their numbers by row of the overlay's table.
        vocabularies: rows of embeddings and heads that differ from the base's in number.
    """

    def __init__(self, model: LiveModel, artifact: DeltaArtifact, planes: int | None) -> None:
        self.model, self.artifact, self.planes = model, artifact, planes
        self.terms: list[HeldTerm] = []
        self.lanes: defaultdict[int, list[int]] = defaultdict(list)
        self.vocabularies: dict[Site, int] = {}
        self._values: defaultdict[Site, dict[Hashable, torch.Tensor]] = defaultdict(dict)
        self._added: dict[Site, torch.Tensor] = {}

    def release(self) -> None:
        """Give back what is held."""
        for term in self.terms:
            term.release()
        self.terms.clear()

    def parts(self) -> dict[Site, Part]:
        """What is no term, by site."""
        sites = {*self._values, *self._added, *self.vocabularies}
        return {s: Part(self._values.get(s, {}), self._added.get(s), self.vocabularies.get(s)) for s in sites}

    def take(self, name: str, locations: Sequence[Location]) -> None:
        """Read one tensor and put it wherever it goes: a tied one goes to the embedding and the head.

        Raises:
            OverlayError: a place cannot hold it, or its shape is not that of the live model.
            ArtifactError: its payload was altered.
        """
        record = self.artifact.record(name)
        origin = self.model.names.locate(record.base_name) if record.base_name else None
        relative = {where: origin is not None and self.model.same(origin, where) for where in locations}
        needed = [where for where in locations if record.encoding == "terms" or not relative[where]]
        if not needed:
            return
        places = {where: self._place(name, record, origin, where) for where in needed}
        terms = [self._coarser(term) for term in self.artifact.terms(name)]
        added = self.artifact.added_rows(name)
        held: dict[int, HeldTerm] = {}
        values: dict[tuple[torch.dtype, bool], torch.Tensor] = {}
        for where, place in places.items():
            lanes = self._lanes(record, terms, where, place) if relative[where] else None
            if lanes is None:
                form = (torch.float32 if place.precise or place.live is None else place.live.dtype, place.transposed)
                if form not in values:
                    values[form] = self._value(name, record, terms, origin, added, *form)
                self._values[place.site][place.key] = values[form]
            else:
                for i, lane in enumerate(lanes):
                    if i not in held:
                        held[i] = hold(terms[i])
                        self.terms.append(held[i])
                    self.lanes[lane].append(held[i].id)
                if added is not None:
                    self._added[place.site] = added if place.live is None else added.to(place.live.dtype)
            if place.resizable and place.key == "weight" and record.shape[0] != place.shape[0]:
                self.vocabularies[place.site] = record.shape[0]

    def _coarser(self, term: Layout) -> Layout:
        if self.planes is None or not isinstance(term, Signs):
            return term
        return term.with_planes(min(self.planes, term.planes))

    def _place(self, name: str, record: TensorRecord, origin: Location | None, where: Location) -> Place:
        place = self.model.place(where)
        if place is None:
            raise no_place(self.artifact, name)
        own, live = record.shape, place.shape
        fits = own == live or (place.resizable and own[1:] == live[1:] and len(own) == len(live))
        before = None if origin is None else self.model.place(origin)
        if before is not None and record.base_shape is not None:
            fits = fits and record.base_shape == before.shape
        if not fits:
            raise OverlayError(
                f"{self.artifact.path}: tensor '{name}' {own} does not fit the live model's {live}; load the base "
                "that it was made from."
            )
        return place

    def _lanes(self, record: TensorRecord, terms: Sequence[Layout], where: Location, place: Place) -> list[int] | None:
        """Row of the overlay's table for every term, or None where their value has to be held instead."""
        if not terms or terms[0].replaces or record.transposed != place.transposed:
            return None
        first = place.site.first_lane
        if record.terms[0].slice is None:
            matrix = place.shape[::-1] if place.transposed else place.shape
            fits = place.lane is not None and all(term.shape == matrix for term in terms)
            return [first + (place.lane or 0)] * len(terms) if fits else None
        slices = [self.model.place(Location(where.parameter, term.slice)) for term in record.terms]
        lanes = [None if found is None else found.lane for found in slices]
        return None if None in lanes else [first + lane for lane in lanes if lane is not None]

    def _value(
        self,
        name: str,
        record: TensorRecord,
        terms: Sequence[Layout],
        origin: Location | None,
        added: torch.Tensor | None,
        dtype: torch.dtype,
        transposed: bool,
    ) -> torch.Tensor:
        base = None if origin is None else self.model.base(origin)
        if not (terms and terms[0].replaces) and (base is None or tuple(base.shape) != record.base_shape):
            raise OverlayError(
                f"{self.artifact.path}: tensor '{name}' can only be held as a whole, and the live model does not have "
                "the plain weights that it is a difference to; load the base without quantisation."
            )
        value = reconstruct(record, terms, base, added, dtype)
        return (value.T if transposed else value).contiguous()


def no_place(artifact: DeltaArtifact, name: str) -> OverlayError:
    """The error for a tensor that no module of the live model can hold for a tenant."""
    return OverlayError(
        f"{artifact.path}: the live model has no place where tensor '{name}' could differ by tenant; merge it with "
        "`deltakeeper apply` and serve the result as a model of its own."
    )
