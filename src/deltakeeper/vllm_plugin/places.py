"""From names of tensors in a checkpoint to the modules of vLLM's model, which packs some of them into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltakeeper.vllm_plugin.lanes import Lane
from deltakeeper.vllm_plugin.sites import EmbeddingSite, HeadSite, MatrixSite, NormSite, Site


@dataclass(frozen=True)
class Place:
    """Where one tensor of a checkpoint lies.

    Attributes:
        site: the module.
        leaf: `weight` or `bias`.
        part: which of the matrices that vLLM has packed there; None where it is all of the module.
    """

    site: Site
    leaf: str
    part: int | None = None

    @property
    def lane(self) -> Lane:
        """What the slots hold there, of a module of matrices."""
        assert isinstance(self.site, MatrixSite)
        return self.site.lane(self.part)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, `(out, in)` of a matrix."""
        if isinstance(self.site, NormSite):
            return tuple(self.site.weight.shape)
        return self.lane.shape if self.leaf == "weight" else self.lane.shape[:1]

    @property
    def vector(self) -> torch.Tensor | None:
        """The base's values of a norm or a bias, float32; None where the base has none, and of matrices."""
        if isinstance(self.site, NormSite):
            return self.site.weight
        return self.lane.bias if self.leaf == "bias" else None


@dataclass(frozen=True)
class Places:
    """All places of one model.

    Attributes:
        sites: modules that know slots, by path.
        packing: names of the modules that vLLM packs, by the name of the one that it makes of them.
        rename: from a name in the checkpoint to vLLM's.
        tied: whether the base's head is its embedding.
    """

    sites: Mapping[str, Site]
    packing: Mapping[str, Sequence[str]]
    rename: Any
    tied: bool

    def find(self, name: str | None) -> Place | None:
        """The place of a tensor, None if there is none that knows slots."""
        renamed = name if name is None or self.rename is None else self.rename(name)
        path, _, leaf = (renamed or "").rpartition(".")
        place = self._whole(path, leaf) or self._packed(path, leaf)
        known = place is not None and (leaf == "weight" or (leaf == "bias" and place.vector is not None))
        return place if known else None

    def same(self, one: Place, other: Place) -> bool:
        """Whether two places hold one tensor of the base: a tied head is the embedding."""
        ends = {type(one.site), type(other.site)}
        return one == other or (self.tied and ends <= {EmbeddingSite, HeadSite} and one.leaf == other.leaf)

    def end(self, kind: type[MatrixSite]) -> Place | None:
        """The embedding or the head, None if it does not know slots."""
        return next((Place(site, "weight") for site in self.sites.values() if type(site) is kind), None)

    def _whole(self, path: str, leaf: str) -> Place | None:
        site = self.sites.get(path)
        return None if site is None else Place(site, leaf)

    def _packed(self, path: str, leaf: str) -> Place | None:
        parent, _, last = path.rpartition(".")
        for packed, members in self.packing.items():
            site = self.sites.get(f"{parent}.{packed}")
            if last in members and isinstance(site, MatrixSite) and len(site.parts) == len(members):
                return Place(site, leaf, list(members).index(last))
        return None
