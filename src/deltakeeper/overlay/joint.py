"""Linear layers of one input, such as queries, keys and values, whose products are made in one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltakeeper.kernels.products import linears
from deltakeeper.overlay.current import CurrentPass
from deltakeeper.overlay.linears import LinearSite
from deltakeeper.overlay.tables import Tables


class JointLinears:
    """The products of several modules; one after another where a tenant changes more than packed terms of one."""

    def __init__(self, parts: Sequence[Any], tables: Tables, current: CurrentPass) -> None:
        """Join modules.

        Args:
            parts: the site of each module, or a module that has none.
            tables: the overlay's tables of terms.
            current: the overlay's pass.
        """
        self.parts, self.tables, self.current = list(parts), tables, current
        sites = [part for part in parts if type(part) is LinearSite]
        lanes = [site.first_lane for site in sites]
        weights = [site.parameters["weight"] for site in sites]
        self.sites = sites
        self.plain = (
            len(sites) == len(self.parts)
            and lanes == list(range(lanes[0], lanes[0] + len(lanes)))
            and all(w.dtype == torch.bfloat16 and w.device.type == "cpu" and w.is_contiguous() for w in weights)
            and all(site.parameters["bias"] is None for site in sites)
        )
        self.weights = weights
        self.lanes = slice(lanes[0], lanes[0] + len(lanes)) if self.plain else slice(0)
        self._numbers: torch.Tensor | None = None
        self._own: torch.Tensor | None = None

    def terms(self) -> torch.Tensor | None:
        """Tables of the modules for the pass under way, int64 `(modules, slots, depth)`; None if that is not all."""
        if not self.plain or self.current.groups is None or any(site.matrices or site.biases for site in self.sites):
            return None
        if self._numbers is not self.tables.numbers:  # they have grown
            self._numbers = self.tables.numbers
            self._own = self._numbers[self.lanes]
        return self._own

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """`(rows, in)` to one `(rows, out)` for each module."""
        current, terms = self.current, self.terms()
        groups = current.groups
        if terms is None or groups is None:
            return [part.forward(x) for part in self.parts]
        if x.shape[0] != current.rows:
            raise self.sites[0].misfit(x.shape[0])
        return linears(x, self.weights, terms, groups, merge_from=current.merge_from)
